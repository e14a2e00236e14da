"""API keys: what one is, how it is made and known again; values and pure functions, standard library only.

Invariants
- A key is 256 random bits, so a plain SHA-256 of it is as hard to turn back as the key is to guess: nothing slower
  (bcrypt, argon2, which exist for guessable passwords) would add to it, and it can be checked for every request.
- The key itself is shown once, to whoever makes it; what is stored, sent to replicas and audited is its digest.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from raymill.runtime.errors import RequestError, Usage

PREFIX = "rm_"
"""Begins every key, so that scanners for leaked secrets find them."""
OPERATOR = "operator"
"""Tenant of the key by which raymill itself calls its endpoint; nobody else's."""
KEY_VARIABLE = "RAYMILL_API_KEY"
KEY_FILE_VARIABLE = "RAYMILL_API_KEY_FILE"
CA_FILE_VARIABLE = "RAYMILL_CA_FILE"
_TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)


class Right(StrEnum):
    """What a key lets one do."""

    PREDICT = "predict"
    """Ask models, and what they are."""
    MANAGE = "manage"
    """Everything under `/raymill/`: features, lineage, records, the replicas' state, flush."""


class KeyPolicy(StrEnum):
    """Who needs a key."""

    OFF = "off"
    """Callers from beyond this host are not let in at all."""
    BEYOND = "beyond"
    """Callers from beyond this host."""
    ALL = "all"
    """Everybody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key as it is stored."""

    digest: str
    """SHA-256 of the key, hexadecimal."""
    tenant: str
    """Whose it is."""
    rights: tuple[Right, ...]
    """What it lets its bearer do."""
    created_s: float
    """When it was made, seconds since 1970."""
    expires_s: float | None = None
    """From when on it is worth nothing; None: never."""
    revoked_s: float | None = None
    """Since when it is worth nothing; None: it is not revoked."""

    @property
    def id(self) -> str:
        """Its name: the beginning of its digest, so that a key that was found tells which one it is."""
        return self.digest[:12]

    def holds_at(self, now_s: float) -> bool:
        """Whether it is neither revoked nor expired."""
        return self.revoked_s is None and (self.expires_s is None or now_s < self.expires_s)


def new_key() -> str:
    """A fresh key: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def check_tenant(tenant: str) -> str:
    """The tenant's name.

    Raises:
        Usage: it is no name.
    """
    if not _TENANT.fullmatch(tenant):
        raise Usage(f"tenant {tenant!r}: lower case letters, digits, '.', '_' and '-', at most 63 characters")
    return tenant


def read_key_file(path: Path) -> str:
    """The key in a file that its owner alone may read.

    Raises:
        RequestError: it can not be read, others may read it, or it holds no key.
    """
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as err:
        raise RequestError(f"the API key's file {path} can not be read: {err}") from err
    if mode & 0o077:
        raise RequestError(f"the API key's file {path} has mode {mode:04o}, others may read it: chmod 600 {path}")
    return check_key(text, f"the file {path}")


def check_key(text: str, where: str) -> str:
    """A key that can be sent in a header.

    Raises:
        RequestError: it has not the form of a key; the text itself is not repeated.
    """
    if not (text.startswith(PREFIX) and text.isascii() and text.isprintable() and " " not in text):
        raise RequestError(f"{where} holds no API key: keys begin with {PREFIX!r}, `raymill keys create` makes one")
    return text


def key_of_environment() -> str | None:
    """The key that the environment names: `RAYMILL_API_KEY`, else the file `RAYMILL_API_KEY_FILE`; None: neither.

    Raises:
        RequestError: as `read_key_file`.
    """
    if key := os.environ.get(KEY_VARIABLE):
        return check_key(key, KEY_VARIABLE)
    file = os.environ.get(KEY_FILE_VARIABLE)
    return read_key_file(Path(file).expanduser()) if file else None
