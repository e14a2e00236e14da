"""Notes of who loads which program on this host, by which a load that ends its process is known afterwards.

A folder a program, named by its digest: a note for each process that loads it now (`*.loading`, locked, so that the
kernel tells who is no more), how it did alone (`alone.json`), and whether it was ever loaded well (`well`).

Invariants
- A note is whole and locked from the moment it is there, and goes when the load has ended, well or with an error.
- A program that was never loaded well on this host is loaded by one process at a time: of many replicas that are told
  to, one can die of it.
- What can not be noted (no space, no rights) is loaded all the same.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from raymill.actors.crash_breaker import Death, Step, Trial, decide, tried
from raymill.actors.model_files import Data
from raymill.actors.rollout import ModelSpec
from raymill.actors.tried_alone import tried_alone
from raymill.runtime.errors import DeadlyModel
from raymill.runtime.ids import new_ids

_log = logging.getLogger(__name__)

_NOTE, _ALONE, _WELL, _TURN = ".loading", "alone.json", "well", "turn"
_held: set[int] = set()
"""Descriptors with a lock. A child that is forked while a model loads must not keep them when its parent has died."""


class LoadNotes:
    """The notes that one process keeps."""

    def __init__(
        self,
        root: Path,
        who: str,
        *,
        try_alone: Callable[[ModelSpec, str, Data], str] = tried_alone,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`root` is the folder of all notes, `who` this process in an operator's words.

        `try_alone` loads a program in another process, and says what ended that.
        """
        self._root, self._try_alone, self._clock = root, try_alone, clock
        self._who = f"{who} (process {os.getpid()})"

    @contextmanager
    def loading(self, spec: ModelSpec, digest: str, data: Data) -> Iterator[None]:
        """Inside the block the program of this digest is loaded from its bytes.

        Raises:
            DeadlyModel: its load has ended a process, and would end this one.
        """
        folder = self._root / digest
        with ExitStack() as held:
            note = None
            try:
                note = self._begin(folder, held, lambda: self._try_alone(spec, digest, data))
            except (OSError, ValueError, TypeError) as err:  # the last two: of notes of other code
                _log.warning("program %s is loaded without a note: %s", digest[:12], err)
            try:
                yield
            except BaseException:
                _remove(note)
                raise
            with suppress(OSError):
                _came_through(folder, note)

    def _begin(self, folder: Path, held: ExitStack, try_alone: Callable[[], str]) -> Path:
        """Note that the load begins, when it may; the note's path."""
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _WELL).exists() or _deaths(folder) or _trial(folder):
            _lock(folder / _TURN, held)
        while True:
            deaths, trial = _deaths(folder), _trial(folder)
            decision = decide(deaths, trial, self._clock())
            if decision.step is Step.LOAD:
                break
            if decision.step is Step.REFUSE:
                raise DeadlyModel(f"program {folder.name[:12]}: {decision.why}; {DeadlyModel.remedy}")
            _log.warning("program %s is tried alone: its load has ended %d processes", folder.name[:12], len(deaths))
            _write(folder / _ALONE, json.dumps(asdict(tried(trial, deaths, try_alone(), self._clock()))))
        name = new_ids(1)[0]
        coming = folder / f"{name}.new"
        descriptor = _lock(coming, held)
        now_s = self._clock()
        at = datetime.fromtimestamp(now_s, UTC).isoformat(" ", "seconds")
        os.write(descriptor, json.dumps(asdict(Death(now_s, f"{self._who} at {at}"))).encode())
        note = folder / f"{name}{_NOTE}"
        coming.rename(note)
        return note


def _lock(path: Path, held: ExitStack) -> int:
    """A descriptor of the file with its lock, until `held` is closed."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    _held.add(descriptor)
    held.callback(_let_go, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _let_go(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _let_go_all() -> None:
    for descriptor in list(_held):
        _let_go(descriptor)


os.register_at_fork(after_in_child=_let_go_all)


def _of_the_dead(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """The notes of processes that are no more, and what stands in them."""
    for note in folder.glob(f"*{_NOTE}"):
        with suppress(FileNotFoundError, BlockingIOError), open(note, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield note, file.read()


def _deaths(folder: Path) -> list[Death]:
    return [Death(**json.loads(text)) for _, text in _of_the_dead(folder)]


def _trial(folder: Path) -> Trial | None:
    try:
        return Trial(**json.loads((folder / _ALONE).read_bytes()))
    except FileNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    coming = path.with_name(f"{new_ids(1)[0]}.new")
    coming.write_text(text)
    coming.replace(path)


def _remove(note: Path | None) -> None:
    if note is not None:
        with suppress(OSError):
            note.unlink()


def _came_through(folder: Path, note: Path | None) -> None:
    """Forget the deaths: whatever they were of, it is over."""
    _remove(note)
    (folder / _WELL).touch()
    (folder / _ALONE).unlink(missing_ok=True)
    for dead, _ in _of_the_dead(folder):
        dead.unlink(missing_ok=True)
