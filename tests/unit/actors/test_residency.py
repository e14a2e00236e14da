"""Which models leave memory, and what their callers notice of it: nothing but time."""

import asyncio
import functools
import gc
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymill.actors.model_set import ModelSet
from raymill.actors.residency import Resident, to_unload
from raymill.actors.rollout import to_user_config
from raymill.actors.serving import ServingReplica
from raymill.runtime.errors import StoreError
from tests.unit.actors.serving_parts import ListSink, Reader, Records, http, load, model

RESIDENTS = st.lists(
    st.builds(Resident, name=st.text("abcdefgh", min_size=1, max_size=2), size_bytes=st.integers(0, 100),
              used_s=st.floats(0, 1000), busy=st.booleans()),
    max_size=8, unique_by=lambda r: r.name,
)  # fmt: skip
MIB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """As a replica does at its start: else each model that leaves costs a look at everything ever imported."""
    gc.freeze()


def in_loop(test):
    """Run a test's coroutine."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


@given(RESIDENTS, st.integers(0, 300), st.integers(0, 100), st.text("abcdefgh", min_size=1, max_size=2))
def test_no_more_leaves_than_must_and_never_a_busy_one_or_the_one_that_comes_in(residents, budget, coming, keep):
    names = to_unload(residents, budget_bytes=budget, coming_bytes=coming, keep=keep)
    by_name = {r.name: r for r in residents}
    gone = [by_name[n] for n in names]
    may_go = [r for r in residents if not r.busy and r.name != keep and r.size_bytes]
    assert all(r in may_go for r in gone) and len(set(names)) == len(names)
    total = sum(r.size_bytes for r in residents) + coming
    left = total - sum(r.size_bytes for r in gone)
    assert left <= budget or len(gone) == len(may_go)  # it fits, or nothing else may go
    if gone:
        assert left + gone[-1].size_bytes > budget  # without the last one it would not fit
        assert all(r.used_s >= gone[-1].used_s for r in may_go if r not in gone)  # the longest unused went first


class Counting(Records):
    """Programs of 600 KiB; counts who asks for them."""

    def __init__(self):
        super().__init__()
        self.fetched, self.away = [], False

    def program(self, digest):
        if self.away:
            raise StoreError("the program's file is gone")
        self.fetched.append(digest)
        return digest.encode().ljust(600 * 1024)


async def replica_of_three(home, records):
    """Models 1, 2 and 3, of which one fits into memory beside the one that is asked."""
    specs = [model((i, "live", 1.0), name=f"m{i}", memory_mib=1) for i in (1, 2, 3)]
    found = ServingReplica(
        home, records=records, sink=ListSink(), open_reader=lambda s: Reader(), load=lambda data: load(data.strip())
    )
    found.start()
    await found.reconfigure(to_user_config(specs))
    return found


def here(found):
    return sorted(r.name for r in found.models.residents())


async def asked(client, name):
    row = {"trip": 1, "zone": "a", "start": 0, "miles": 5}
    return await client.post(f"/predict/{name}", json={"rows": [row]})


@in_loop
async def test_models_take_turns_in_memory_and_every_caller_gets_its_own_models_answer(tmp_path):
    records = Counting()
    found = await replica_of_three(tmp_path, records)
    assert here(found) == ["m3"] and found.models.is_ready  # those that are away are served all the same
    async with http(found) as client:
        for i in (1, 2, 3, 3, 1):
            answer = await asked(client, f"m{i}")
            assert answer.status_code == 200
            assert answer.json()["predictions"][0]["long"] == pytest.approx(i / 10 + 0.005)
            assert here(found) == [f"m{i}"]
        assert records.fetched == ["d1", "d2", "d3", "d1", "d2", "d3", "d1"]
        together = await asyncio.gather(*(asked(client, f"m{1 + i % 3}") for i in range(30)))
    assert [a.status_code for a in together] == [200] * 30
    assert [a.json()["version"] for a in together] == [1 + i % 3 for i in range(30)]
    found.stop()


@in_loop
async def test_a_model_that_can_not_come_back_is_an_error_for_those_who_wait_and_the_next_one_finds_it(tmp_path):
    records = Counting()
    found = await replica_of_three(tmp_path, records)
    async with http(found) as client:
        records.away = True
        lost, kept = await asyncio.gather(asked(client, "m1"), asked(client, "m3"))
        assert (lost.status_code, kept.status_code) == (500, 200) and "file is gone" in lost.json()["error"]
        records.away = False
        assert (await asked(client, "m1")).status_code == 200
    found.stop()


@in_loop
async def test_a_change_of_one_model_brings_back_none_of_those_that_are_away(tmp_path):
    records = Counting()
    found = await replica_of_three(tmp_path, records)
    before = len(records.fetched)
    specs = [model((i, "live", 1.0), name=f"m{i}", memory_mib=1) for i in (1, 2)]
    await found.reconfigure(to_user_config([*specs, model((4, "live", 1.0), name="m3", memory_mib=1)]))
    assert records.fetched[before:] == ["d4"]
    async with http(found) as client:
        assert (await asked(client, "m2")).json()["version"] == 2
    found.stop()


def test_a_busy_model_stays_and_memory_goes_over_its_bound():
    busy = {"m1"}
    models = ModelSet(
        fetch=Counting().program, load=lambda data: load(data.strip()), open_reader=lambda s: None,
        is_busy=busy.__contains__,
    )  # fmt: skip
    models.apply(to_user_config([model((i, "live", 1.0), name=f"m{i}", plan=None, memory_mib=1) for i in (1, 2)]))
    assert {r.name for r in models.residents()} == {"m1", "m2"}
    busy.clear()
    models.apply(to_user_config([model((i, "live", 1.0), name=f"m{i}", plan=None, memory_mib=1) for i in (1, 2, 3)]))
    assert {r.name for r in models.residents()} == {"m3"}


def test_models_that_come_and_go_while_others_are_applied_are_never_lost():
    records = Counting()
    models = ModelSet(fetch=records.program, load=lambda data: load(data.strip()), open_reader=lambda s: None)
    specs = [model((i, "live", 1.0), name=f"m{i}", plan=None, memory_mib=1) for i in (1, 2, 3)]
    models.apply(to_user_config(specs))
    failures = []

    def go_round():
        for i in range(9):
            try:
                models.bring_back(f"m{1 + i % 3}")
            except StoreError as err:
                failures.append(err)

    threads = [threading.Thread(target=go_round) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        models.apply(to_user_config(specs))
        assert set(models.models) == {"m1", "m2", "m3"}
    for thread in threads:
        thread.join()
    assert not failures and sum(r.size_bytes for r in models.residents()) <= MIB


@in_loop
async def test_a_model_without_a_plan_may_refuse_unknown_values_and_neighbours_do_not_notice(tmp_path):
    def strict(data):
        def run(x):
            if np.isnan(x).any():
                raise ValueError("NaN")
            return x[:, 0]

        return run

    found = ServingReplica(tmp_path, records=Records(), sink=ListSink(), open_reader=lambda s: None, load=strict)
    found.start()
    await found.reconfigure(to_user_config([model((1, "live", 1.0), plan=None)]))
    tensor = {"name": "features", "datatype": "FP32", "shape": [1, 2]}
    async with http(found) as client:
        bad = np.array([np.nan, 1], "<f4").tobytes()
        good = {"inputs": [tensor | {"data": [2, 3]}]}
        head = b'{"inputs":[{"name":"features","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}}]}'
        sent = [client.post("/v2/models/taxi/infer", json=good) for _ in range(8)]
        header = {"inference-header-content-length": str(len(head))}
        refused, *answers = await asyncio.gather(
            client.post("/v2/models/taxi/infer", content=head + bad, headers=header), *sent
        )
    assert refused.status_code == 422 and "unknown" in refused.json()["error"]
    assert [a.json()["outputs"][0]["data"] for a in answers] == [[2.0]] * 8
    found.stop()
