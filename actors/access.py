"""Who may ask for what, pure: where a request comes from, its bearer's key, the right that its path needs.

Invariant: a request is inside only if the connection is this host's (or the proxy's) and nothing says that it was
passed on; what passes requests on from other hosts says so in a header that the caller can not take away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from raymill.runtime.api_keys import ApiKey, Right

PASSED_ON = ("x-forwarded-for", "forwarded")
"""Headers that say that a request was passed on: the session's own TLS front sets the first, as most proxies do."""
_SCHEME = "bearer "
_LONGEST = 512
"""Characters of an `Authorization` header that can hold a key."""
_ANYBODY = (("healthz",), ("v2", "health", "live"), ("docs",))


class KeySet:
    """Keys by digest."""

    __slots__ = ("_by_digest", "_known")

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._by_digest = {bytes.fromhex(k.digest): k for k in keys}
        self._known: dict[str, ApiKey] = {}

    def bearer(self, authorization: str | None) -> ApiKey | None:
        """The key that an `Authorization` header holds, which may have expired; None: none of these.

        The comparison is a lookup of the SHA-256, whose bytes a caller can not choose; a header that was right is
        known again by itself, so that only wrong ones are hashed twice.
        """
        if authorization is None or len(authorization) > _LONGEST:
            return None
        found = self._known.get(authorization)
        if found is None and authorization[: len(_SCHEME)].lower() == _SCHEME:
            token = authorization[len(_SCHEME) :].strip(" ").encode()
            found = self._by_digest.get(hashlib.sha256(token).digest())
            if found is not None:
                if len(self._known) > 4 * len(self._by_digest):  # one key, spelt with ever more spaces
                    self._known.clear()
                self._known[authorization] = found
        return found


def is_passed_on(headers: Mapping[str, str]) -> bool:
    """Whether somebody between says that the request is another's; names in lower case."""
    return PASSED_ON[0] in headers or PASSED_ON[1] in headers


def right_for(parts: tuple[str, ...]) -> Right | None:
    """The right that a path needs; None: whether the server is alive, anybody may ask."""
    if parts in _ANYBODY:
        return None
    return Right.MANAGE if parts[0] == "raymill" else Right.PREDICT
