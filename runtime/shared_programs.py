"""Programs in the object store, for the processes of a cluster: each put there once, read where it lies on each node.

The holder owns the objects: they go when it lets go of them and no reader holds a view, and with its process. What
lets go is the registry's change of a stage, so that what is retired or rejected takes no memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any


class SharedPrograms:
    """References by digest; safe to use from several threads."""

    def __init__(self, read: Callable[[str], bytes], put: Callable[[bytes], Any]) -> None:
        """`read` gives a program's bytes by digest, `put` puts them into the object store."""
        self._read, self._put = read, put
        self._held: dict[str, Any] = {}
        self._lock = threading.Lock()

    def ref(self, digest: str) -> Any:
        """Reference to the program; it is read and put there by the first who asks."""
        with self._lock:
            if digest not in self._held:
                self._held[digest] = self._put(self._read(digest))
            return self._held[digest]

    def keep(self, digests: Iterable[str]) -> None:
        """Let go of all others."""
        with self._lock:
            self._held = {digest: self._held[digest] for digest in set(digests) & self._held.keys()}


def put_bytes(data: bytes) -> Any:
    """Put bytes into the object store, as what is read without a copy."""
    import numpy as np
    import ray

    return ray.put(np.frombuffer(data, dtype=np.uint8))
