"""The prediction log: every answer is on disk before it is sent, and reaches the lake and the monitor once.

Invariants
- An answer is written to the spool (one `write` to the page cache, which outlives a SIGKILL of the process) before
  it is sent; a torn last write was never answered.
- The same id of the same model gets the same answer and is logged once: within a replica by its memory, after a
  kill by the spool it reads at start, between replicas by the sink, which knows what the lake holds.
- A segment is shipped until the sink has taken it; a dead replica's segments are shipped by the next one that
  looks. The sink is idempotent by segment name.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymill.actors.prediction_rows import Scored, decode, encode
from raymill.runtime.errors import StoreError
from raymill.runtime.ids import new_ids

_log = logging.getLogger(__name__)

SHIP_ROWS = 20_000  # few and large appends: one costs about 30 ms whatever its size
SHIP_APART_S = 1.0  # nor more than one a second, up to
SHIP_AT_ONCE_ROWS = 250_000  # 50 MB or so, as Arrow
SHIP_AFTER_S = 5.0
KEEP_SHIPPED_S = 120.0  # longer than a client goes on retrying by id: it finds its answer though that was shipped
REMEMBERED = 131_072  # answers a replica remembers per model, about 30 s of full load
REMEMBERED_NUMBERS = 16 << 20  # numbers in them, where a model has many a row
_TICK_S = 0.25
_LOCK, _OPEN, _SHIPPED = "lock", ".frames", ".shipped"


class Sink(Protocol):
    """Where segments go."""

    def ship(self, segment: str, rows: pa.Table) -> None:
        """Take a segment, once whatever number of times it is sent; raise if it could not be taken."""


class FileSink(Protocol):
    """Where segments go whose rows need not be read here."""

    def ship_file(self, segment: str, path: Path) -> int:
        """As `Sink.ship`, of the segment in a file; how many rows it had."""


class PredictionLog:
    """One replica's log; `record` is called by one thread at a time for a model, everything else by any."""

    def __init__(self, spool: Path, sink: Sink | FileSink, *, replica: str) -> None:
        self._spool = spool
        self._sink = sink
        self._replica = replica
        self._owner = new_ids(1)[0]
        self._recent: dict[str, _Recent] = {}
        self._lock = threading.Lock()  # of the open segment
        self._shipping = threading.Lock()
        self._segment: _Segment | None = None
        self._nameless: set[Path] = set()
        """Closed segments with no row that could come again."""
        self._number = 0
        self._held: Any = None
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None
        self.shipped_rows = 0
        self.last_error = ""

    def start(self) -> None:
        """Take a folder of the spool, learn what was answered lately, begin to ship."""
        folder = self._spool / self._owner
        folder.mkdir(parents=True, exist_ok=True)
        self._held = open(folder / _LOCK, "w")  # noqa: SIM115 - held as long as the process lives
        fcntl.flock(self._held, fcntl.LOCK_EX)
        self._learn()
        self._thread = threading.Thread(target=self._run, name="prediction-log", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ship what is there and end; what the sink does not take stays for the next replica."""
        if self._thread is None:
            return
        self._ends.set()
        self._thread.join()
        self._thread = None
        self.flush()
        self._held.close()

    def record(self, scored: Scored, shadows: list[Scored]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Log a batch; return the versions and answers to give (the logged ones for ids known).

        An id whose logged answer has another number of numbers (a version of that form is live since) is answered anew.

        Raises:
            StoreError: the spool can not be written; nothing of the batch may be answered.
        """
        recent = self._recent.setdefault(scored.model, _Recent())
        # The ids of ready vectors are always fresh ones, which no caller can send: only rows have a text.
        named = scored.texts.count(None) < len(scored.texts)
        known = recent.known(scored.ids) if named else {}
        versions, p = scored.versions, scored.p
        if known:
            known = {i: kept for i, kept in known.items() if np.shape(kept[1]) == p.shape[1:]}
        if known:
            fresh = [i for i in range(len(scored.ids)) if i not in known]
            versions, p = versions.copy(), p.copy()
            for i, (version, value) in known.items():
                versions[i], p[i] = version, value
            scored, shadows = scored.take(fresh), [s.take(fresh) for s in shadows]
        if scored.ids:
            wall_s = time.time()
            frames = [encode(s, self._replica, wall_s) for s in (scored, *shadows)]
            self._append(frames, sum(len(s.ids) for s in (scored, *shadows)), named)
            if named:
                answers = scored.p.tolist() if scored.p.ndim == 1 else list(scored.p.copy())
                recent.add(zip(scored.ids, zip(scored.versions.tolist(), answers, strict=True), strict=True))
        return versions, p

    def flush(self) -> bool:
        """Ship everything now, orphans too; whether all of it was taken."""
        self._close_segment()
        return self._ship_own() and self._adopt()

    @property
    def waiting_rows(self) -> int:
        """Rows of the open segment."""
        segment = self._segment
        return segment.rows if segment else 0

    def _append(self, frames: list[bytes], rows: int, named: bool) -> None:
        with self._lock:
            if self._segment is None:
                self._number += 1
                self._segment = _Segment(self._spool / self._owner / f"{self._number:06d}{_OPEN}")
            self._segment.append(frames, rows)
            self._segment.named = self._segment.named or named

    def _learn(self) -> None:
        """Know the newest answers of the spool again, whoever gave them."""
        found: list[pa.Table] = []
        for path in sorted(_segments(self._spool), key=_modified_s, reverse=True):
            with suppress(FileNotFoundError):  # its replica has dropped it meanwhile
                found.append(read_segment(path))
            if sum(t.num_rows for t in found) >= REMEMBERED:
                break
        for rows in reversed(found):  # the newest are forgotten last
            rows = rows.filter(rows.column("row").is_valid())
            columns = [rows.column(c).to_pylist() for c in ("model", "id", "version", "p", "scores", "role")]
            for model, name, version, p, scores, role in zip(*columns, strict=True):
                recent = self._recent.setdefault(model, _Recent())
                if role != "shadow" and not recent.known([name]):
                    recent.add([(name, (version, p if scores is None else np.array(scores, np.float32)))])

    def _run(self) -> None:
        look_at = 0.0
        while not self._ends.wait(_TICK_S):
            segment, now = self._segment, time.monotonic()
            full = segment and _is_full(segment.rows, now - segment.since)
            if not full and now < look_at:
                continue
            try:
                self._close_segment() if full else None
                self._ship_own()
                if now >= look_at:
                    self._adopt()
                    look_at = now + SHIP_AFTER_S
            except (StoreError, OSError) as err:
                self._failed("the spool", err)

    def _failed(self, what: object, err: Exception) -> None:
        self.last_error = f"{type(err).__name__}: {err}"
        _log.warning("%s: not shipped and kept: %s", what, self.last_error)

    def _close_segment(self) -> None:
        with self._lock:
            if self._segment is not None:
                self._segment.close()
                if not self._segment.named:
                    self._nameless.add(self._segment.path)
                self._segment = None

    def _ship_own(self) -> bool:
        with self._shipping:
            return self._ship_folder(self._spool / self._owner)

    def _adopt(self) -> bool:
        """Ship the segments of replicas that live no more; their locks are free."""
        taken = True
        for folder in sorted(p for p in self._spool.iterdir() if p.is_dir() and p.name != self._owner):
            try:
                with self._shipping, _try_lock(folder / _LOCK) as free:
                    if free:
                        taken = self._ship_folder(folder) and taken
                        if not list(_segments(self._spool, folder.name)) and _age_s(folder) > KEEP_SHIPPED_S:
                            (folder / _LOCK).unlink()
                            folder.rmdir()
            except FileNotFoundError:  # another replica has tidied it away
                continue
        return taken

    def _ship_folder(self, folder: Path) -> bool:
        with self._lock:  # a segment is open from the moment its file exists
            mine = self._segment.path if self._segment else None
            closed = [p for p in sorted(folder.glob("*" + _OPEN)) if p != mine]
        for path in sorted(folder.glob("*" + _SHIPPED)):
            if _age_s(path) > KEEP_SHIPPED_S:
                path.unlink()
        for path in closed:
            try:
                self.shipped_rows += self._ship(f"{folder.name}-{path.stem}", path)
            except Exception as err:  # noqa: BLE001 - edge of the shipping loop: kept, told, tried again
                self._failed(path, err)
                return False
            self.last_error = ""
            if path in self._nameless:  # gone before the kernel has written it to the disk, mostly
                path.unlink()
                self._nameless.discard(path)
            else:
                os.utime(path)
                path.rename(path.with_suffix(_SHIPPED))
        return True

    def _ship(self, segment: str, path: Path) -> int:
        if hasattr(self._sink, "ship_file"):
            return self._sink.ship_file(segment, path)
        rows = read_segment(path)
        self._sink.ship(segment, rows)
        return rows.num_rows


def _is_full(rows: int, age_s: float) -> bool:
    """Whether a segment is to be shipped."""
    return age_s >= SHIP_AFTER_S or (age_s >= SHIP_APART_S and rows >= SHIP_ROWS) or rows >= SHIP_AT_ONCE_ROWS


_Kept = tuple[int, float | npt.NDArray[np.float32]]
"""A version and its answer."""


class _Recent:
    """The newest answers of a model, at least `REMEMBERED` of them, or `REMEMBERED_NUMBERS` numbers, by id.

    Two generations: the older one is dropped whole, since a dict that loses its first entries one by one is searched
    from its beginning each time.
    """

    def __init__(self) -> None:
        self._young: dict[str, _Kept] = {}
        self._old: dict[str, _Kept] = {}

    def known(self, ids: list[str]) -> dict[int, _Kept]:
        """Version and answer of those that were answered, by their place."""
        young, old = self._young, self._old
        return {i: young.get(name) or old[name] for i, name in enumerate(ids) if name in young or name in old}

    def add(self, answers: Iterable[tuple[str, _Kept]]) -> None:
        """Remember these; answers of one model have one size."""
        self._young.update(answers)
        newest = next(reversed(self._young.values()))[1] if self._young else 0.0
        most = REMEMBERED if isinstance(newest, float) else min(REMEMBERED, REMEMBERED_NUMBERS // newest.size)
        if len(self._young) >= most:
            self._old, self._young = self._young, {}


class _Segment:
    """A file that grows by whole frames."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self.named = False
        """Whether a row in it has an id that may come again."""
        self.since = time.monotonic()
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by close()
        self._end = 0

    def append(self, frames: list[bytes], rows: int) -> None:
        self._write(memoryview(frames[0] if len(frames) == 1 else b"".join(frames)))
        self.rows += rows

    def close(self) -> None:
        self._file.close()

    def _write(self, data: memoryview) -> None:
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as err:
            self._file.truncate(self._end)  # a torn frame in the middle would hide those after it
            self._file.seek(self._end)
            raise StoreError(f"the prediction log {self.path} can not be written ({err}): make room there") from err
        self._end += len(data)


def read_segment(path: Path) -> pa.Table:
    """The rows of a segment; a torn last frame (its writer was killed, nothing of it was answered) is left out."""
    return decode(path.read_bytes())


def _segments(spool: Path, owner: str = "*") -> Iterator[Path]:
    yield from sorted(p for p in spool.glob(f"{owner}/*") if p.suffix in (_OPEN, _SHIPPED))


def _modified_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime


@contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Whether nobody else holds the lock; held inside the block if so."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
