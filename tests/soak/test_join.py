"""The other ways of the join at length: in order from files, in slices, by shards; random cases, 0 differences."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from raymill.actors.lake import Lake
from raymill.actors.point_in_time import join
from raymill.actors.scan import place_rows
from raymill.actors.sharding import divide, of_requests, part_of
from raymill.actors.shards import Shard
from raymill.actors.stream import stream
from tests.unit.actors.slow_join import PLAN, corrected, random_events, random_rows, table
from tests.unit.actors.test_offline_newest import differences

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("first", range(0, 10_000, 1_000))
def test_ten_thousand_joins_of_events_in_order_equal_the_slow_reference(tmp_path: Path, first: int) -> None:
    for case in range(first, first + 1_000):
        assert differences(case, tmp_path) == 0, f"case {case}"


@pytest.mark.parametrize("first", range(0, 10_000, 1_000))
def test_ten_thousand_joins_in_slices_and_by_shards_equal_the_join_at_once(tmp_path: Path, first: int) -> None:
    for case in range(first, first + 1_000):
        dice = random.Random(case)
        facts = table(corrected(dice, random_events(dice, dice.randrange(1, 60))))
        asked = table(random_rows(dice, dice.randrange(1, 26)))
        at = np.array([dice.randrange(-2, 50) * 1_000_000 for _ in range(len(asked))])
        whole = join(asked, PLAN, {"events": facts}, at=at)
        out = np.full_like(whole, 7)
        for rows, x in stream(asked, PLAN, {"events": facts}, at=at, memory_bytes=dice.choice([500, 3_000, 20_000])):
            out[rows] = x
        assert out.tobytes() == whole.tobytes(), f"case {case}, in slices"
        if case % 10 == 0:
            lake = tmp_path / f"{case}"
            version = Lake(lake).append("events", facts, batch_id="0")
            assert by_shards(lake, asked, at, version, dice).tobytes() == whole.tobytes(), f"case {case}, by shards"
            shutil.rmtree(lake)


def by_shards(lake: Path, asked: object, at: np.ndarray, version: int, dice: random.Random) -> np.ndarray:
    shard = Shard(str(lake), memory_bytes=dice.choice([20_000, 1 << 30]))
    out = np.full((len(at), len(PLAN.names)), 7, dtype=np.float32)
    for piece in divide(PLAN, dice.randrange(1, 5)):
        rows, x = shard.join(piece, PLAN.to_json(), asked, at, {"events": version})
        place_rows(x, rows, part_of(PLAN, piece.views)[1], out)
    part, columns = part_of(PLAN, of_requests(PLAN))
    place_rows(join(asked, part, {}, at=at), np.arange(len(at)), columns, out)
    return out
