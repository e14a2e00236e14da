"""A known key is never called new, and a shared hash never makes two keys one."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.keys import KeyIndex, key_hashes, repeats


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
    assert repeats(pa.table({"n": [1, 2, 1, 3, 2]})).tolist() == [False, False, True, False, True]
