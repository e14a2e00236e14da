"""LMDB environments, each open once in this process however many stores and readers use it.

LMDB's locks break when a process opens the same folder twice.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from raymill.runtime.errors import StoreError

_MAP_BYTES = 1 << 35
"""Address space set aside; the file is as large as what it holds."""


@contextmanager
def as_store_error(path: Path) -> Iterator[None]:
    """LMDB's errors as ours."""
    try:
        yield
    except lmdb.Error as err:
        raise store_error(path, err) from err


def store_error(path: Path, err: lmdb.Error) -> StoreError:
    """One of LMDB's errors as ours."""
    return StoreError(f"online store {path}: {err}; delete the folder and rebuild it from the lake")


_environments: dict[Path, tuple[lmdb.Environment, int]] = {}
"""What this process has open, and how often."""
_environments_lock = threading.Lock()


def open_environment(path: Path) -> lmdb.Environment:
    """The environment in a folder; give it back by `release`, as often as it was opened."""
    real = path.resolve()
    with _environments_lock:
        env, users = _environments.get(real, (None, 0))
        if env is None:
            env = lmdb.open(os.fspath(real), map_size=_MAP_BYTES, max_readers=1024, metasync=False)
        _environments[real] = (env, users + 1)
        return env


def release(path: Path) -> None:
    """Give one use of the environment back; the last one closes it."""
    real = path.resolve()
    with _environments_lock:
        env, users = _environments[real]
        if users > 1:
            _environments[real] = (env, users - 1)
        else:
            del _environments[real]
            env.close()
