"""Corrected rows through the actors: each version once, and the newest one known at the moment wherever it is read."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from raymill.actors.contract import InLake, check
from raymill.actors.data import DataActor
from raymill.actors.features import FeatureActor
from raymill.actors.feed import Feed
from raymill.actors.lake import Lake
from raymill.actors.observed import Observed, _hashes
from raymill.actors.point_in_time import join
from raymill.actors.sources import file_batches
from raymill.jobs.replay import Recording, moment
from raymill.runtime.errors import Conflict
from raymill.runtime.expressions import col
from raymill.runtime.home import Home
from raymill.runtime.messages import TrainingSet
from raymill.runtime.spec import Cost, Directory, FeatureView, Label, Monitor, Pipeline, Replay, Source, Train
from tests.unit.actors import slow_join
from tests.unit.actors.slow_join import EVENTS, SECOND, event, random_events, random_rows
from tests.unit.actors.test_drift import PERIOD, world

FACTS = replace(
    EVENTS,
    schema={"ref" if name == "id" else name: column for name, column in EVENTS.schema.items()},
    key=["ref"],
    corrected=True,
)
VIEWS = [replace(v, source=FACTS) if isinstance(v, FeatureView) else v for v in slow_join.VIEWS]


def table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as those of `slow_join`; a request has an `id` of its own."""
    return slow_join.table(rows).rename_columns(list(FACTS.schema))


def no_model(inputs: int) -> Any:
    raise AssertionError("no model is built here")


PIPELINE = Pipeline(
    "corrected",
    views=VIEWS,
    label=Label("high", FACTS, col("x") > 1),
    train=Train(no_model),
    monitor=Monitor(cost=Cost(missed=2, false_alarm=1)),
    replay=Replay("1970-01-01"),
)


class Bench:
    """Data and feature actor on one home; what the first accepts the second takes."""

    def __init__(self, home: Path, source: Source = FACTS) -> None:
        self.lake = Lake(Home(home).lake)
        self.data = DataActor(home, [source], lambda events: None, "corrected")
        self.features = FeatureActor(home, PIPELINE, lambda events: None)
        self.data.start()
        self.features.start()

    def send(self, rows: list[dict[str, Any]] | pa.Table, batch_id: str) -> dict[str, int]:
        rows = rows if isinstance(rows, pa.Table) else table(rows)
        done = self.data.ingest("events", rows, batch_id=batch_id)
        self.features.take(done)
        return done.quarantined

    def labelled(self, until: int) -> list[tuple[int, bool]]:
        """(moment, label) of the rows whose label was known then."""
        made: TrainingSet = self.features.training_set(-(10**9), 10**9, until, 0)
        rows = pa.concat_tables([made.train_ref, made.evaluate_ref])
        return list(zip(rows["at"].cast(pa.int64()).to_pylist(), np.array(rows["y"]) != 0, strict=True))

    def close(self) -> None:
        self.features.stop()


@pytest.fixture
def bench(tmp_path: Path):
    made = Bench(tmp_path)
    yield made
    made.close()


def test_corrections_need_a_column_that_tells_versions_apart() -> None:
    with pytest.raises(ValidationError, match="known_at"):
        replace(FACTS, known_at=None)
    assert (EVENTS.version_key, FACTS.version_key) == (("id",), ("ref", "known"))


def test_a_version_is_taken_once_and_another_row_in_its_place_is_told_from_the_same_one(bench: Bench) -> None:
    first, second = event(x=None), event(known=5, x=2.0)
    assert bench.send([first, second, first, event(x=3.0)], "a") == {"duplicate_key": 1, "other_values": 1}
    assert bench.send([first, event(known=5, x=7.0), event(known=6), event(known=None)], "b") == {
        "duplicate_key": 1,
        "other_values": 1,
    }
    assert bench.send([event(known=None), event(known=None, x=8.0)], "c") == {"duplicate_key": 1, "other_values": 1}
    assert sorted(r["known"] is None for r in bench.lake.read("events").to_pylist()) == [False] * 3 + [True]
    assert bench.data.ingest("events", table([first, second, first, event(x=3.0)]), batch_id="a").duplicate


def test_versions_are_judged_as_a_row_by_row_reading_does() -> None:
    for seed in range(200):
        dice = random.Random(seed)
        rows = [
            event(id=dice.choice("ab"), known=dice.choice([None, 1, 2]), x=dice.choice([None, 1.0, 2.0]))
            for _ in range(dice.randrange(1, 12))
        ]
        cut = dice.randrange(len(rows))
        taken: dict[tuple[Any, ...], dict[str, Any]] = {}
        expected = [
            "" if (old := taken.setdefault((r["id"], r["known"]), r)) is r
            else "duplicate_key" if old == r else "other_values"
            for r in rows
        ]  # fmt: skip
        before = check(table(rows[:cut]), FACTS)
        held = {tuple(r.values()) for r in before.accepted.to_pylist()}
        keys = {(r["ref"], r["known"]) for r in before.accepted.to_pylist()}
        lake = InLake(
            keys=lambda k, keys=keys: np.array([(r["ref"], r["known"]) in keys for r in k.to_pylist()], np.bool_),
            rows=lambda t, held=held: np.array([tuple(r.values()) in held for r in t.to_pylist()], np.bool_),
        )
        after = check(table(rows[cut:]), FACTS, lake)
        assert [*before.reasons, *after.reasons] == expected, f"seed {seed}"


@pytest.mark.parametrize("seed", range(3))
def test_online_and_offline_agree_with_the_slow_reference_at_every_moment(bench: Bench, seed: int) -> None:
    dice = random.Random(seed)
    facts = slow_join.corrected(dice, random_events(dice, 60))
    for first in range(0, len(facts), 13):
        bench.send(facts[first : first + 13], f"{first}")
    held = bench.lake.read("events")
    assert len({(r["ref"], r["known"]) for r in held.to_pylist()}) == len(held) > len({*held["ref"].to_pylist()})
    asked = random_rows(dice, 40)
    at = np.array([r["at"] for r in asked], dtype=np.int64)
    online = bench.features.vectors(table(asked), at)
    assert online.tobytes() == join(table(asked), bench.features.plan(), {"events": held}, at=at).tobytes()
    facts = [{**r, "id": r["ref"], "happened": _us(r["happened"]), "known": _us(r["known"])} for r in held.to_pylist()]
    np.testing.assert_array_equal(online, slow_join.slow_join(asked, slow_join.with_hashes(facts), slow_join.VIEWS))


def _us(moment: Any) -> int | None:
    return None if moment is None else round(moment.timestamp() * SECOND)


def test_a_label_is_that_of_the_newest_version_known_and_the_row_is_the_one_that_could_ask(bench: Bench) -> None:
    bench.send([event(known=1, x=5.0), event(id="f", happened=7, known=8, x=0.0)], "a")
    bench.send([event(known=10, x=0.5), event(known=20, x=None), event(id="f", happened=7, known=9, x=3.0)], "b")
    assert bench.labelled(1) == [(0, True)]
    assert bench.labelled(8) == [(0, True), (7, False)]
    assert bench.labelled(10) == [(0, False), (7, True)]
    assert bench.labelled(20) == [(7, True)]
    with pytest.raises(Conflict, match="no row of"):
        bench.labelled(0)


def test_a_corrected_label_counts_for_the_monitor_from_when_it_is_known() -> None:
    predictions = world(0, 3)[0]
    keys = predictions["key"].to_pylist()
    versions = [(0, 1.0, 5), (0, 0.0, 9), (0, float("nan"), 12), (1, 1.0, 7)]
    for seed in range(6):
        some = versions + random.Random(seed).sample(versions, 2)
        random.Random(seed).shuffle(some)
        observed = Observed(2, PERIOD)
        observed.add_predictions(predictions)
        for row, y, known in some:
            observed.add_labels([keys[row]], np.array([y]), np.array([known]))
        ids = observed.rows(0, PERIOD, 0).key
        place = [int(np.flatnonzero(ids == k)[0]) for k in _hashes(keys[:2])]
        found = [observed.rows(0, PERIOD, t).y[place].tolist() for t in (4, 5, 8, 9, 12)]
        assert [[None if v != v else v for v in row] for row in found] == [
            [None, None], [1, None], [1, 1], [0, 1], [None, 1]
        ]  # fmt: skip


def test_files_and_a_watched_folder_bring_corrections_in_and_again_without_doubling(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    source = replace(FACTS, read=Directory(str(folder), "*.parquet"))
    bench = Bench(tmp_path / "home", source)
    pq.write_table(table([event(x=1.0)]), folder / "1.parquet")
    for _ in range(2):
        for batch_id, rows in file_batches(folder / "1.parquet", source):
            bench.send(rows, batch_id)
    pq.write_table(table([event(x=1.0), event(known=5, x=4.0)]), folder / "2.parquet")
    feed = Feed([source], bench.data, (bench.features,))
    stream = feed._streams["events"]
    stream.open()
    while (batch := stream.next(0)) is not None:
        feed._take(source, batch, feed._progress["events"])
        stream.acknowledge(batch)
    assert bench.data.tally()["ingested"] == {"events": 2}
    assert bench.data.tally()["quarantined"] == {"duplicate_key": 1}
    at = np.array([4, 5, 10**9])
    online = bench.features.vectors(table([event()] * 3), at)
    lake = join(table([event()] * 3), bench.features.plan(), {"events": bench.lake.read("events")}, at=at)
    place = bench.features.plan().names.index("newest.x")
    assert online.tobytes() == lake.tobytes() and online[:, place].tolist() == [1, 4, 4]
    bench.close()


def test_a_replayed_row_asks_once_and_as_its_first_version() -> None:
    rows = [event(known=9, place="b"), event(known=3, place="a"), event(id="f", happened=1, known=2)]
    recording = Recording(PIPELINE, {"events": table(rows)})
    (day,) = recording.days()
    assert sum(b.rows.num_rows for b in recording.batches(day)) == 3
    (request,) = recording.requests(moment("1970-01-01"), "R")
    assert [(r["id"], r["place"]) for r in request.to_pylist()] == [
        ("R-1970-01-01-00000", "a"), ("R-1970-01-01-00001", rows[2]["place"])
    ]  # fmt: skip
