"""An online store divided by entities over several environments, read as one.

An entity's share is a hash of its name, the same in every process. A batch is one transaction of each share: a reader
sees all or nothing of it within a share, and may for a moment see it in one share and not yet in another.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np

from raymill.actors.lmdb_pages import Bytes, Pages
from raymill.actors.online_records import ENTITY_AT, Progress

_OF_ENTITIES = (b"v", b"n")
"""First letters of records whose names end with an entity's."""
_PROGRESS = b"p"


def share_of(entity: bytes, shares: int) -> int:
    """Which share has an entity, by its name in the store."""
    return zlib.crc32(entity) % shares


class DividedEnvironment:
    """The environments of all shares, for those who read."""

    def __init__(self, environments: Sequence[Any]) -> None:
        self._environments = environments

    def begin(self, *, buffers: bool = False) -> DividedTransaction:
        """A transaction in each, as a context."""
        return DividedTransaction([e.begin(buffers=buffers) for e in self._environments])


class DividedTransaction:
    """One transaction a share; each is of one state."""

    def __init__(self, transactions: Sequence[Any]) -> None:
        self.of_shares = transactions

    def __enter__(self) -> DividedTransaction:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for transaction in self.of_shares:
            transaction.abort()

    def get(self, name: bytes, default: bytes | None = None) -> Any:
        """One record, of the share that its entity falls to; a view's progress: that of the share that is least far."""
        letter = name[:1]
        if letter in _OF_ENTITIES:
            return self.of_shares[share_of(name[ENTITY_AT:], len(self.of_shares))].get(name, default)
        found = [t.get(name) for t in self.of_shares]
        if letter == _PROGRESS:
            return default if None in found else _least_far([Progress.from_bytes(f) for f in found]).to_bytes()
        return next((f for f in found if f is not None), default)  # texts, which several shares may have


def _least_far(progresses: list[Progress]) -> Progress:
    return Progress(
        newest=max(p.newest for p in progresses),
        floor=max(p.floor for p in progresses),
        lake_version=min(p.lake_version for p in progresses),
    )


class DividedPages:
    """The mapped files of all shares."""

    def __init__(self, pages: Sequence[Pages]) -> None:
        self._pages = pages
        self.fewest = 8 * len(pages)
        """As that of `Pages`: a call for each share."""

    def of_names(self, txn: DividedTransaction, names: Sequence[bytes], nothing: Bytes) -> Bytes | None:
        """As `Pages.of_names`."""
        out = np.empty((len(names), len(nothing)), dtype=np.uint8)
        shares = np.array([share_of(n[ENTITY_AT:], len(self._pages)) for n in names], dtype=np.int64)
        for share, pages in enumerate(self._pages):
            mine = np.flatnonzero(shares == share)
            if len(mine):
                found = pages.of_names(txn.of_shares[share], [names[i] for i in mine.tolist()], nothing)
                if found is None:
                    return None
                out[mine] = found
        return out

    def of_integers(self, txn: DividedTransaction, prefix: Bytes, keys: Sequence[int], nothing: Bytes) -> Bytes | None:
        """As `Pages.of_integers`."""
        begin = prefix.tobytes()
        return self.of_names(txn, [begin + b"i%d;" % k for k in keys], nothing)
