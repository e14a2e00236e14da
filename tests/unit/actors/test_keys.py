"""A known key is never called new, and a shared hash never makes two keys one."""

import tracemalloc

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.keys import KeyIndex, first_alike, key_hashes


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 20))
def test_the_index_of_keys_never_calls_a_known_key_new(numbers, merge_at):
    index, seen = KeyIndex(), set()
    index.MERGE_AT = merge_at
    for n in numbers:
        keys = pa.table({"n": pa.array([n], pa.int64()), "s": [f"s{n}"]})
        assert index.maybe(key_hashes(keys)).tolist() == [n in seen]
        index.add(key_hashes(keys))
        seen.add(n)


def test_hashes_hang_on_values_alone_and_part_every_column():
    a = pa.table({"s": ["x", "y", "x"], "n": pa.array([1, 1, 2], pa.int64()), "f": [0.0, 0.5, -0.0]})
    assert key_hashes(a.slice(1)).tolist() == key_hashes(a).tolist()[1:]
    assert len(set(key_hashes(a).tolist())) == 3
    assert key_hashes(a.select(["f"])).tolist()[0] == key_hashes(a.select(["f"])).tolist()[2]
    assert key_hashes(pa.table({"s": ["flights"]})).tolist() == [4_155_314_270_854_651_504]


def test_rows_whose_hashes_collide_are_told_apart_by_value(monkeypatch):
    monkeypatch.setattr("raymill.actors.keys.key_hashes", lambda keys: np.zeros(keys.num_rows, np.uint64))
    assert first_alike(pa.table({"n": [1, 2, 1, 3, 2]})).tolist() == [0, 1, 0, 3, 1]


def test_the_index_takes_eight_bytes_a_key_and_twenty_while_it_is_merged():
    index, keys, n = KeyIndex(), np.random.default_rng(0).integers(0, 2**63, 1_070_000).astype(np.uint64), 1_000_000
    index.add(keys[:n])
    tracemalloc.start()
    index.add(keys[n:])
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == len(keys)
    assert held < 8.1 * len(keys) and most + 8 * n < 20 * len(keys)
    assert index.maybe(keys[::1000]).all() and not index.maybe(keys[:100] + np.uint64(2**63)).any()
