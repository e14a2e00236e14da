"""Where a pipeline keeps its rows and online features: what is declared, and the places that follow from it.

A URL is shown, logged and written into JSON, so it carries no secret: those come from the environment of whoever
opens the store.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from raymill.runtime.column_spec import VALUE
from raymill.runtime.home import Home

REDIS_PASSWORD = "RAYMILL_REDIS_PASSWORD"
"""Environment variable with the password of Redis."""
REDIS_CA = "RAYMILL_REDIS_CA"
"""Environment variable with the file of the authority that signed Redis' certificate; absent: the system's."""

_LAKES = ("s3", "gs", "az", "abfss")
_SERVERS = ("redis", "rediss", "unix")


def _checked_lake(url: str) -> str:
    parts = _split(url, "lake", _LAKES, "s3://bucket/prefix")
    if not parts.hostname:
        raise ValueError(f"lake {url!r} names no bucket: give e.g. s3://bucket/prefix")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            f"lake {shown(url)!r} says more than bucket and prefix: keys and endpoint come from the environment, "
            "e.g. AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL"
        )
    return url.rstrip("/")


def _checked_online(url: str) -> str:
    parts = _split(url, "online", _SERVERS, "redis://host:6379/0")
    if parts.password:
        raise ValueError(f"online {shown(url)!r} carries a password: leave it out and set {REDIS_PASSWORD}")
    if parts.scheme == "unix":
        if not parts.path.startswith("/") or parts.hostname:
            raise ValueError(f"online {url!r} is no socket's path: give e.g. unix:///run/redis/redis.sock")
        if parts.fragment or (parts.query and not _is_database(parts.query.removeprefix("db="))):
            raise ValueError(f"online {url!r}: a socket's URL says at most ?db=NUMBER")
        return url
    if not parts.hostname or parts.query or parts.fragment or not _is_database(parts.path.removeprefix("/") or "0"):
        raise ValueError(f"online {url!r} is not {parts.scheme}://[user@]host[:port][/database number]")
    return url


def _split(url: str, what: str, schemes: tuple[str, ...], example: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as err:
        raise ValueError(f"{what} is no URL ({err}): give e.g. {example}") from err
    if parts.scheme not in schemes:
        told = " or ".join(f"{s}://" for s in schemes)
        raise ValueError(
            f"{what} {shown(url)!r} does not begin with {told}: give e.g. {example}, or leave it away for a folder "
            "of RAYMILL_HOME"
        )
    return parts


def _is_database(text: str) -> bool:
    return text.isascii() and text.isdigit()


@dataclass(frozen=True, config=VALUE | ConfigDict(hide_input_in_errors=True))
class Stores:
    """Where rows and online features are kept, if not on the head's host; secrets come from the environment."""

    lake: Annotated[str, AfterValidator(_checked_lake)] | None = None
    """Object-store URL of the lake, e.g. `s3://bucket/prefix`; absent: a folder of RAYMILL_HOME."""
    online: Annotated[str, AfterValidator(_checked_online)] | None = None
    """`redis://`, `rediss://` (TLS) or `unix://` URL of the online store; absent: LMDB in RAYMILL_HOME."""
    online_shards: Annotated[int, Field(ge=1, le=64)] = 1
    """Into how many shares of the entities the online store of RAYMILL_HOME is divided, each with a writing actor."""

    @model_validator(mode="after")
    def _shards_are_of_a_folder(self) -> Self:
        if self.online is not None and self.online_shards > 1:
            raise ValueError(
                f"online_shards={self.online_shards} divides the online store of RAYMILL_HOME, and online is a server: "
                "leave it out; Redis divides its keys itself (Redis Cluster, or a proxy)"
            )
        return self

    @property
    def of_one_host(self) -> tuple[str, ...]:
        """What other hosts can not reach, in words; empty: a replica may run anywhere."""
        found = [] if self.lake else ["the lake is a folder of RAYMILL_HOME"]
        if self.online is None:
            found.append("the online store is a folder of RAYMILL_HOME")
        elif is_of_one_host(self.online):
            found.append(f"the online store {self.online} means another place on each host")
        return tuple(found)


@plain_dataclass(frozen=True, slots=True)
class Divided:
    """A folder with an online store in several environments, each with a share of the entities."""

    folder: Path
    """Below it each pipeline has a folder."""
    shares: int
    """How many there are."""

    def __str__(self) -> str:
        return f"{self.folder} ({self.shares} shares)"


Online = Path | str | Divided
"""Where online stores are: a folder, the URL of a server, a folder divided by entities."""


@plain_dataclass(frozen=True, slots=True)
class Places:
    """The places of one pipeline's stores: folders or URLs."""

    lake: Path | str
    """What `actors.lake.Lake` opens."""
    online: Online
    """What `actors.online` opens."""


def places_of(home: Home, stores: Stores) -> Places:
    """Where a pipeline's stores are, seen from a process whose home that is."""
    folder: Path | Divided = home.online if stores.online_shards == 1 else Divided(home.online, stores.online_shards)
    return Places(lake=stores.lake or home.lake, online=stores.online or folder)


def declared(stores: Stores) -> dict[str, str | int | None]:
    """The stores as JSON, of which `Stores(**…)` makes them again."""
    shards = {"online_shards": stores.online_shards} if stores.online_shards > 1 else {}
    return {"lake": stores.lake, "online": stores.online, **shards}


def is_of_one_host(url: str) -> bool:
    """Whether an online store's URL means another server on each host."""
    parts = urlsplit(url)
    if parts.scheme == "unix" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def shown(url: str) -> str:
    """A URL as it may be logged: without a password."""
    scheme, mark, rest = url.partition("://")
    server, slash, path = rest.partition("/")
    user, at, host = server.rpartition("@")
    user = user.partition(":")[0]
    return f"{scheme}{mark}{user}{at if user else ''}{host}{slash}{path}"


def redis_secrets(url: str) -> dict[str, str]:
    """What the environment adds to an online store's URL, as the Redis client's options."""
    found = {"password": os.environ.get(REDIS_PASSWORD, "")}
    if url.startswith("rediss:"):
        found["ssl_ca_certs"] = os.environ.get(REDIS_CA, "")
    return {option: value for option, value in found.items() if value}
