"""Where an online store is: LMDB environments, each open once in this process however many use it, or Redis.

LMDB's locks break when a process opens the same folder twice.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from raymill.actors.divided import DividedEnvironment, DividedPages
from raymill.actors.lmdb_pages import Pages
from raymill.actors.redis_store import RedisEnvironment, RedisTransaction
from raymill.runtime.errors import StoreError
from raymill.runtime.stores import Divided, Online, shown

_MAP_BYTES = 1 << 35
"""Address space set aside; the file is as large as what it holds."""


Place = Online
"""A folder, the URL of a Redis server with the pipeline's name as fragment, or a folder with an environment a share."""


def place_of(path: Online, pipeline: str) -> Place:
    """Where a pipeline's online store is: a folder below `path`, or a name on the server that it is the URL of."""
    if isinstance(path, Divided):
        return Divided(path.folder / pipeline, path.shares)
    return f"{path}#{pipeline}" if isinstance(path, str) and "://" in path else Path(path) / pipeline


def share_place(place: Divided, number: int) -> Path:
    """The environment of one share."""
    return place.folder / f"{number}-of-{place.shares}"


def _shares(place: Divided) -> list[Path]:
    return [share_place(place, i) for i in range(place.shares)]


def told(place: Place) -> str:
    """The place as it may be shown: without a password."""
    return shown(place) if isinstance(place, str) else str(place)


def is_filled(place: Place) -> bool:
    """Whether a writer was there, in every share."""
    if isinstance(place, Divided):
        return all(is_filled(p) for p in _shares(place))
    return (place / "data.mdb").exists() if isinstance(place, Path) else _redis(place).exists()


def clear(txn: Any, prefix: bytes) -> None:
    """Take all records away whose names begin so."""
    if isinstance(txn, RedisTransaction):
        txn.clear(prefix)
        return
    with txn.cursor() as cursor:
        found = cursor.set_range(prefix)
        while found and cursor.key().startswith(prefix):
            found = cursor.delete()


def fetch(txn: Any, names: Sequence[bytes]) -> None:
    """Say what is read next: over a network it comes in one go, and of one state."""
    if isinstance(txn, RedisTransaction):
        txn.fetch(names)


@contextmanager
def as_store_error(path: Place) -> Iterator[None]:
    """LMDB's errors as ours."""
    try:
        yield
    except lmdb.Error as err:
        raise store_error(path, err) from err


def store_error(path: Place, err: lmdb.Error) -> StoreError:
    """One of LMDB's errors as ours."""
    return StoreError(f"online store {path}: {err}; delete the folder and rebuild it from the lake")


_environments: dict[Path, tuple[lmdb.Environment, int]] = {}
"""What this process has open, and how often."""
_pages: weakref.WeakValueDictionary[Path, Pages] = weakref.WeakValueDictionary()
"""Their files as they are mapped for those who read many records at once."""
_servers: dict[str, RedisEnvironment] = {}
_environments_lock = threading.Lock()


def open_environment(path: Place) -> Any:
    """The environment at a place; give it back by `release`, as often as it was opened."""
    if isinstance(path, Divided):
        return DividedEnvironment([open_environment(p) for p in _shares(path)])
    if isinstance(path, str):
        return _redis(path)
    real = path.resolve()
    with _environments_lock:
        env, users = _environments.get(real, (None, 0))
        if env is None:
            env = lmdb.open(os.fspath(real), map_size=_MAP_BYTES, max_readers=1024, metasync=False)
        _environments[real] = (env, users + 1)
        return env


def pages_of(path: Place) -> Pages | DividedPages | None:
    """The file of an environment that is open here; None: records are to be asked for one by one."""
    if isinstance(path, Divided):
        pages = [p for p in map(pages_of, _shares(path)) if isinstance(p, Pages)]
        return DividedPages(pages) if len(pages) == path.shares else None
    if isinstance(path, str):
        return None
    real = path.resolve()
    with _environments_lock:
        found = _pages.get(real) or Pages.of(real / "data.mdb", _MAP_BYTES)
        if found is not None:
            _pages[real] = found
        return found


def _redis(place: str) -> RedisEnvironment:
    """The server's connections, shared by all who use it here; they close with the process."""
    with _environments_lock:
        if place not in _servers:
            url, _, name = place.rpartition("#")
            _servers[place] = RedisEnvironment(url, name)
        return _servers[place]


def release(path: Place) -> None:
    """Give one use of the environment back; the last one closes it."""
    if isinstance(path, Divided):
        for one in _shares(path):
            release(one)
        return
    if isinstance(path, str):
        return
    real = path.resolve()
    with _environments_lock:
        env, users = _environments[real]
        if users > 1:
            _environments[real] = (env, users - 1)
        else:
            del _environments[real]
            _pages.pop(real, None)
            env.close()
