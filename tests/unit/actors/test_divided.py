"""An online store divided by entities: the same vectors as the join, whichever share an entity falls to."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from raymill.actors import online_intake
from raymill.actors.divided import share_of
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.features import FeatureActor
from raymill.actors.online import OnlineReader, OnlineStore, entity_key
from raymill.actors.online_intake import IN_FLIGHT, OnlineIntake, OnlineShards
from raymill.actors.point_in_time import join
from raymill.runtime.errors import RequestError, Unavailable
from raymill.runtime.home import Home
from raymill.runtime.stores import Divided, Stores, declared, places_of
from tests.unit.actors import test_lookups as lookups
from tests.unit.actors.test_features import HOUR, PIPELINE, Bench, assert_online_is_offline, stops, trips
from tests.unit.actors.test_online import MINUTE, NEWEST_VIEWS, RIDES, VIEWS, rides, table

SHARES = 3
PLAN = FeaturePlan.of_views([*VIEWS, *NEWEST_VIEWS], RIDES)


def stores_of(place: Divided, plan: FeaturePlan, keep: str) -> list[OnlineStore]:
    return [OnlineStore(place, plan, keep=keep, share_no=i) for i in range(place.shares)]


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**40))
def test_vectors_and_ages_are_those_of_one_environment(seed: int, tmp_path_factory: Any) -> None:
    dice = random.Random(seed)
    folder = tmp_path_factory.mktemp("online")
    facts = rides(dice, 90)
    place = Divided(folder / "divided", SHARES)
    stores = [*stores_of(place, PLAN, "9d"), OnlineStore(folder / "whole", PLAN, keep="9d")]
    for i in range(0, 90, 31):
        for store in stores:
            store.ingest("rides", table(facts[i : i + 31]))
    divided, whole = OnlineReader(place, PLAN), OnlineReader(folder / "whole", PLAN)
    asked, end = table(rides(dice, 25)), facts[-1]["left"]
    for at in (np.full(25, end + 60 * MINUTE), np.array([dice.randrange(end + 1) for _ in range(25)])):
        found, one = divided.look_up(asked, at), whole.look_up(asked, at)
        assert found.x.tobytes() == one.x.tobytes() == join(asked, PLAN, {"rides": table(facts)}, at=at).tobytes()
        assert found.ages.tolist() == one.ages.tolist()
        for keys in ([0, 1, 2, 99, -5], [*range(-20, 20)], [1], [2, None], [*range(-20, 20), None]):
            for mine, theirs in zip(*(r.latest("stop", keys, end) for r in (divided, whole)), strict=True):
                assert mine.tobytes() == theirs.tobytes()
    for opened in (divided, whole, *stores):
        opened.close()


def test_what_is_looked_up_may_lie_in_another_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shares:
        """The stores of all shares, as `assert_both_sides` uses one."""

        def __init__(self, folder: Path, plan: FeaturePlan, keep: str) -> None:
            self._path = Divided(folder, SHARES)
            self._stores = stores_of(self._path, plan, keep)

        def ingest(self, source: str, rows: Any) -> None:
            for store in self._stores:
                store.ingest(source, rows)

        def close(self) -> None:
            for store in self._stores:
                store.close()

    monkeypatch.setattr(lookups, "OnlineStore", Shares)
    for seed in range(5):
        lookups.assert_both_sides(seed, tmp_path / str(seed))


def test_each_share_has_about_as_many_entities_and_none_but_its_own(tmp_path: Path) -> None:
    for keys in ([entity_key((i,)) for i in range(8000)], [entity_key((f"user-{i}",)) for i in range(8000)]):
        counts = Counter(share_of(key, 4) for key in keys)
        assert min(counts.values()) > 1800
    facts = table(rides(random.Random(3), 200))
    place, named = Divided(tmp_path, SHARES), []
    for store in stores_of(place, PLAN, "9d"):
        store.ingest("rides", facts)
        with store._environment().begin() as txn:
            named.append({name for name, _ in txn.cursor() if name[:1] in b"vn"})
        store.close()
    assert all(named) and len(set().union(*named)) == sum(map(len, named))


def test_a_reader_waits_for_every_share_and_refuses_what_one_of_them_dropped(tmp_path: Path) -> None:
    place = Divided(tmp_path, 2)
    plan = FeaturePlan.of_views(NEWEST_VIEWS, RIDES)
    stores, facts = stores_of(place, plan, "2h"), rides(random.Random(2), 800)
    ask = OnlineReader(place, plan)
    stores[0].ingest("rides", table(facts))
    with pytest.raises(Unavailable, match="not filled"):
        ask.latest("stop", [0], 10**15)
    stores[1].ingest("rides", table(facts[:2]))
    with pytest.raises(RequestError, match="before"):
        ask.latest("stop", [0], 0)
    for opened in (ask, *stores):
        opened.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, replace(PIPELINE, stores=Stores(online_shards=2)))
    made.arrive("stops", stops(), "stops")
    yield made
    made.actor.stop()


def test_features_of_a_divided_store_come_from_the_lake_again_whatever_each_share_missed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online_intake, "PIECE_ROWS", 7)  # whatever the size of the pieces, too
    bench.arrive("trips", trips(0, 30), "one")
    bench.arrive("trips", trips(30, 10), "two", seen=False)
    late = bench.actor._own[1]
    late.ingest("trips", trips(30, 10), bench.lake.version("trips"))  # one share took it, the other was away
    assert bench.actor.health()["lake_versions"]["trips"] < (bench.lake.version("trips") or 0)
    bench.restart()
    assert bench.actor.health() == {
        "ok": True,
        "shards": 2,
        "lake_versions": {s: bench.lake.version(s) for s in ("stops", "trips")},
    }
    assert_online_is_offline(bench, 34)
    bench.actor.replay_to(20 * HOUR)  # no replay yet: filled anew, as of then
    bench.actor.replay_to(22 * HOUR)
    assert [i._store.horizon() for i in bench.actor._own] == [22 * HOUR] * 2
    bench.actor.rebuild()
    assert_online_is_offline(bench, 34)


class Waiting:
    """A share whose batches wait until they are let go."""

    def __init__(self) -> None:
        self.let_go, self.under_way = threading.Event(), threading.Semaphore(0)

    def ingest(self, source: str, rows: Any, lake_version: int | None) -> None:
        self.under_way.release()
        assert self.let_go.wait(20)


def test_one_batch_too_many_is_refused_until_there_is_room() -> None:
    slow = Waiting()
    shards = OnlineShards([slow], "demo")
    brought = [threading.Thread(target=shards.ingest, args=("trips", None, i)) for i in range(IN_FLIGHT)]
    for thread in brought:
        thread.start()
    for _ in brought:
        assert slow.under_way.acquire(timeout=20)
    with pytest.raises(Unavailable, match="wait and send this one again"):
        shards.ingest("trips", None, 9)
    slow.let_go.set()
    for thread in brought:
        thread.join()
    shards.ingest("trips", None, 9)
    shards.stop()


def test_a_share_that_fails_keeps_no_other_from_taking_the_batch_in(bench: Bench, tmp_path: Path) -> None:
    class Away:
        def ingest(self, source: str, rows: Any, lake_version: int | None) -> None:
            raise Unavailable("an actor does not answer")

    version = bench.lake.append("trips", trips(0, 30), batch_id="one")
    own = bench.actor._own
    actor = FeatureActor(bench.home, bench.pipeline, bench.told.extend, shards=[Away(), own[1]])
    with pytest.raises(Unavailable, match="does not answer"):
        actor.ingest("trips", trips(0, 30), "one", lake_version=version)
    assert isinstance(own[1], OnlineIntake)
    assert [i.health()["lake_versions"]["trips"] for i in own] == [-1, version]
    actor.stop()


def test_shards_are_declared_for_a_folder_and_refused_for_redis() -> None:
    home = Home(Path("/mill"))
    stores = Stores(online_shards=4)
    assert places_of(home, stores).online == Divided(home.online, 4)
    assert Stores(**declared(stores)) == stores  # type: ignore[arg-type]
    assert declared(Stores()) == {"lake": None, "online": None}
    with pytest.raises(ValidationError, match="Redis divides its keys itself"):
        Stores(online="redis://host/0", online_shards=2)
    with pytest.raises(ValidationError):
        Stores(online_shards=0)
