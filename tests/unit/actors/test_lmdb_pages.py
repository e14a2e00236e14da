"""LMDB's pages read in place: what `get` gives, in every state, whatever the names, while a writer goes on."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.lmdb_pages import Pages

MAP_BYTES = 1 << 28
SIZE = 24
NOTHING = np.full(SIZE, 255, dtype=np.uint8)
PREFIX = np.frombuffer(b"n0123456789abcdef", dtype=np.uint8)


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    opened = lmdb.open(str(tmp_path_factory.mktemp("pages")), map_size=MAP_BYTES, sync=False)
    yield opened
    opened.close()


def pages_of(env: Any) -> Pages:
    found = Pages.of(Path(env.path()) / "data.mdb", MAP_BYTES)
    assert found is not None
    return found


def fill(env: Any, records: dict[bytes, bytes]) -> None:
    with env.begin(write=True) as txn:
        txn.drop(env.open_db(), delete=False)
        for name, record in records.items():
            txn.put(name, record)


def gets(txn: Any, names: list[bytes]) -> list[bytes]:
    return [txn.get(n, NOTHING.tobytes()) for n in names]


def rows(found: np.ndarray | None) -> list[bytes]:
    assert found is not None
    return [row.tobytes() for row in found]


NAMES = st.binary(min_size=1, max_size=40) | st.text("ab", min_size=1, max_size=20).map(str.encode)


@settings(max_examples=60, deadline=None)
@given(there=st.lists(NAMES, min_size=1, max_size=300), others=st.lists(NAMES, max_size=20), seed=st.integers(0, 99))
def test_names_of_any_length_and_order_give_what_get_gives(
    env: Any, there: list[bytes], others: list[bytes], seed: int
) -> None:
    dice = random.Random(seed)
    fill(env, {n: dice.randbytes(SIZE) for n in there})
    asked = [*there, *others, *(n + b"\0" for n in there[:9]), *(n[:-1] or b"z" for n in there[:9])]
    dice.shuffle(asked)
    with env.begin() as txn:
        assert rows(pages_of(env).of_names(txn, asked, NOTHING)) == gets(txn, asked)


INTEGERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-1000, 1000)


@settings(max_examples=60, deadline=None)
@given(there=st.lists(INTEGERS, min_size=1, max_size=300), others=st.lists(INTEGERS, max_size=20))
def test_integers_are_found_under_the_names_that_the_store_gives_them(
    env: Any, there: list[int], others: list[int]
) -> None:
    begin = PREFIX.tobytes()
    fill(env, {begin + b"i%d;" % n: b"%24d" % n for n in there})
    asked = [*others, *there]
    with env.begin() as txn:
        found = pages_of(env).of_integers(txn, PREFIX, asked, NOTHING)
        assert rows(found) == gets(txn, [begin + b"i%d;" % n for n in asked])
        assert pages_of(env).of_integers(txn, PREFIX, [2**63], NOTHING) is None
        with pytest.raises(TypeError):
            pages_of(env).of_integers(txn, PREFIX, [1, "2"], NOTHING)  # type: ignore[list-item]


def test_trees_of_several_levels_are_read_at_the_state_of_the_transaction(env: Any) -> None:
    names = [b"%d" % i for i in range(60_000)]
    fill(env, {n: b"%24d" % 0 for n in names})
    pages, asked = pages_of(env), names[::7]
    with env.begin() as before:
        assert env.stat()["depth"] >= 3
        with env.begin(write=True) as txn:
            for n in names[::2]:
                txn.put(n, b"%24d" % 1)
            for n in names[1::4]:
                txn.delete(n)
        with env.begin() as after:
            assert rows(pages.of_names(after, asked, NOTHING)) == gets(after, asked)
        found = pages.of_names(before, asked, NOTHING)  # its head may be written over any time now
        assert found is None or rows(found) == [b"%24d" % 0] * len(asked)


def test_nothing_is_read_of_an_empty_store_or_of_records_of_another_size_or_on_pages_of_their_own(env: Any) -> None:
    fill(env, {})
    with env.begin() as txn:
        assert pages_of(env).of_names(txn, [b"a"], NOTHING) is None
    for record in (b"short", b"x" * (SIZE + 1), b"x" * 9000):
        fill(env, {b"a": b"%24d" % 1, b"b": record})
        with env.begin() as txn:
            assert rows(pages_of(env).of_names(txn, [b"a"], NOTHING)) == [b"%24d" % 1]
            assert pages_of(env).of_names(txn, [b"a", b"b"], NOTHING) is None


def test_file_in_another_format_is_not_mapped(tmp_path: Path) -> None:
    lmdb.open(str(tmp_path / "there")).close()
    data = bytearray((tmp_path / "there" / "data.mdb").read_bytes())
    data[20] = 2  # the format's version
    (tmp_path / "other").write_bytes(data)
    (tmp_path / "short").write_bytes(data[:10])
    assert Pages.of(tmp_path / "other", MAP_BYTES) is None
    assert Pages.of(tmp_path / "short", MAP_BYTES) is None


def test_every_read_beside_a_writer_is_of_one_state(env: Any) -> None:
    names = [b"%d" % i for i in range(3000)]
    fill(env, {n: b"%24d" % 0 for n in names})
    pages, stop = pages_of(env), threading.Event()

    def write() -> None:
        round_ = 0
        while not stop.is_set():
            round_ += 1
            with env.begin(write=True) as txn:
                for n in names:
                    txn.put(n, b"%24d" % round_)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen, read = b"", 0
        for _ in range(3000):
            with env.begin() as txn:
                found = pages.of_names(txn, names[::31], NOTHING)
                if found is not None:
                    assert len(set(rows(found))) == 1
                    assert seen <= found[0].tobytes()
                    seen, read = found[0].tobytes(), read + 1
        assert read > 100
    finally:
        stop.set()
        writer.join()
