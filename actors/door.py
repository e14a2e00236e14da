"""The endpoint's door: lets a request in, or has the reply ready that refuses it, before its body is looked at.

Invariants
- Both lanes and gRPC ask the same method.
- A key that was made or revoked is known here within `LOOK_S`; while the records can not be asked the keys known last
  go on, each until it expires.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from raymill.actors import asgi
from raymill.actors.access import KeySet, is_passed_on, right_for
from raymill.actors.asgi import Reply, Scope
from raymill.runtime.api_keys import ApiKey, KeyPolicy, Right
from raymill.runtime.errors import Closed, Forbidden, RaymillError, Unauthenticated

LOOK_S = 1.0
"""How often the records are asked whether keys have changed."""
_log = logging.getLogger(__name__)


class KeyBook(Protocol):
    """Who knows the keys: the actor `records`. Replicas on other hosts reach it too, which a file would not do."""

    def keys_changed_since(self, stamp: int) -> tuple[int, list[ApiKey]] | None:
        """The keys that are not revoked and a stamp; None: nothing changed since that stamp."""


class Door:
    """The door of one replica; refuses on the event loop, learns of keys on a thread of its own."""

    def __init__(self, policy: KeyPolicy, book: KeyBook, clock: Callable[[], float] = time.time) -> None:
        self._book, self._clock = book, clock
        self._all, self._off = policy is KeyPolicy.ALL, policy is KeyPolicy.OFF
        self._stamp = -1
        self._keys = KeySet(())
        self._ends = threading.Event()

    def start(self) -> None:
        """Learn the keys, and go on learning; nothing, where nobody needs one.

        Raises:
            Unavailable: the records do not answer, so nobody could be let in.
        """
        if not self._off:
            self.look()
            self._ends.clear()
            threading.Thread(target=self._watch, name="api-keys", daemon=True).start()

    def stop(self) -> None:
        """Learn no more."""
        self._ends.set()

    def look(self) -> None:
        """Ask once whether keys have changed."""
        found = self._book.keys_changed_since(self._stamp)
        if found is not None:
            self._stamp, keys = found
            self._keys = KeySet(keys)

    def refusal(self, headers: Mapping[str, str], right: Right | None, is_local: bool) -> Reply | None:
        """What to answer instead of what was asked; None: come in.

        Args:
            headers: names in lower case.
            right: what the request needs; None: nothing.
            is_local: whether whoever holds the connection is of this host, or the proxy.
        """
        if not is_local:
            return PROXY_ALONE
        if right is None or (not self._all and not is_passed_on(headers)):
            return None
        key = self._keys.bearer(headers.get("authorization"))
        if key is None or (key.expires_s is not None and self._clock() >= key.expires_s):
            return _PASSED_ON if self._off else _WRONG_KEY if "authorization" in headers else _NO_KEY
        return None if right in key.rights else _LACKS[right]

    def refusal_of(self, scope: Scope) -> Reply | None:
        """The same for a request to the ASGI application."""
        return self.refusal(asgi.headers_of(scope), right_for(asgi.parts_of(scope)), asgi.is_local(asgi.peer_of(scope)))

    def _watch(self) -> None:
        told = False
        while not self._ends.wait(LOOK_S):
            try:
                self.look()
                told = False
            except Exception as err:  # noqa: BLE001 - edge of the thread, which goes on asking
                if not told:
                    _log.warning("API keys may be out of date: %s: %s", type(err).__name__, err)
                told = True


def _refused(error: RaymillError, challenge: str) -> Reply:
    reply = asgi.error_reply(error)
    return Reply(reply.status, reply.body, headers={**reply.headers, "www-authenticate": challenge})


_REALM = 'Bearer realm="raymill"'
_NO_KEY = _refused(Unauthenticated("this endpoint asks for an API key, and the request has none"), _REALM)
_WRONG_KEY = _refused(
    Unauthenticated("the API key of the request is unknown, revoked or expired"), f'{_REALM}, error="invalid_token"'
)
_LACKS = {
    right: _refused(
        Forbidden(f"the API key has not the right `{right}`"), f'{_REALM}, error="insufficient_scope", scope="{right}"'
    )
    for right in Right
}
PROXY_ALONE = asgi.error_reply(Closed("this port answers the proxy on its own host alone"))
_PASSED_ON = asgi.error_reply(
    Closed(
        "another host's request was passed on to an endpoint without keys: behind a proxy, `raymill up --require-key`"
    )
)
