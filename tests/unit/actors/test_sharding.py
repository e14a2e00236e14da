"""Shards: the pieces together are the join, bit for bit; what dies is sent again; nobody has more than two."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.lake import Lake
from raymill.actors.point_in_time import join
from raymill.actors.scan import place_rows
from raymill.actors.sharding import ATTEMPTS, IN_FLIGHT, Dispatch, Piece, divide, of_requests, part_of
from raymill.actors.shards import Shard
from raymill.runtime.errors import StoreError
from tests.unit.actors.slow_join import PLAN, random_events, random_rows, table


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**40), of=st.integers(1, 4), memory_bytes=st.sampled_from([1, 1 << 30]))
def test_sharded_streamed_and_in_process_joins_are_equal_bit_for_bit(
    seed: int, of: int, memory_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dice = random.Random(seed)
    facts, asked = random_events(dice, 40), table(random_rows(dice, 20))
    at = np.array([dice.randrange(50) * 1_000_000 for _ in range(20)])
    folder = tmp_path_factory.mktemp("lake")
    version = Lake(folder).append("events", table(facts), batch_id="0")
    shard = Shard(str(folder), memory_bytes=20_000 if memory_bytes == 1 else memory_bytes)
    out = np.full((20, len(PLAN.names)), 7, dtype=np.float32)
    for piece in divide(PLAN, of):
        rows, x = shard.join(piece, PLAN.to_json(), asked, at, {"events": version})
        place_rows(x, rows, part_of(PLAN, piece.views)[1], out)
    part, columns = part_of(PLAN, of_requests(PLAN))
    place_rows(join(asked, part, {}, at=at), np.arange(20), columns, out)
    assert out.tobytes() == join(asked, PLAN, {"events": table(facts)}, at=at).tobytes()


@settings(max_examples=60, deadline=None)
@given(shares=st.integers(1, 8), shards=st.integers(1, 4), seed=st.integers(0, 2**30))
def test_every_piece_is_done_once_whoever_dies(shares: int, shards: int, seed: int) -> None:
    dice = random.Random(seed)
    pieces = [Piece((v,), share, shares) for v in ("a", "b") for share in range(shares)]
    dispatch = Dispatch(pieces, shards)
    working: list[tuple[int, Piece]] = []
    done: list[Piece] = []
    deaths = 0
    while not dispatch.finished:
        working += dispatch.next()
        assert all(sum(s == shard for s, _ in working) <= IN_FLIGHT for shard in range(shards))
        shard, piece = dice.choice(working)
        if deaths < ATTEMPTS - 1 and dice.random() < 0.3:
            deaths += 1
            dispatch.lost(shard)
            working = [w for w in working if w[0] != shard]
        else:
            dispatch.done(shard, piece)
            working.remove((shard, piece))
            done.append(piece)
    assert sorted(done, key=str) == sorted(pieces, key=str)


def test_piece_that_brings_every_shard_down_is_named() -> None:
    dispatch = Dispatch([Piece(("a",), 0, 1)], 1)
    for _ in range(ATTEMPTS - 1):
        dispatch.next()
        dispatch.lost(0)
    dispatch.next()
    with pytest.raises(StoreError, match="share 0 of 1 of views a"):
        dispatch.lost(0)


def test_version_that_is_gone_is_an_error_of_the_store(tmp_path: Path) -> None:
    Lake(tmp_path).append("events", table([]), batch_id="0")
    with pytest.raises(StoreError, match="events"):
        Shard(str(tmp_path)).join(divide(PLAN, 1)[0], PLAN.to_json(), table([]), np.empty(0, np.int64), {"events": 77})
