"""The lane before a model when more is asked than it can answer in time."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from raymill.actors import asgi
from raymill.actors.batching import Pace
from raymill.actors.lane import Lane
from raymill.runtime.errors import Overloaded, RequestError, Unavailable

ROW_S = 0.01
SQUARE = np.ones((128, 128), np.float32)


class Asked:
    """A question of one row, with features to look up or without."""

    def __init__(self, columns=None):
        self.columns = columns

    def __len__(self):
        return 1


def compute(batches):
    """Takes a time for each row, on the core."""
    questions = [q for batch in batches for q in batch]
    end = time.thread_time() + ROW_S * len(questions)
    while time.thread_time() < end:
        SQUARE @ SQUARE  # others may go on meanwhile
    return ["answer"] * len(questions)


async def overload(lane, seconds):
    """Three callers every few milliseconds, for so long after the first was refused: what they got, who was refused."""
    got, refused, begun = [], [], time.monotonic()
    while not refused or time.monotonic() < refused[0][0] + seconds:
        assert time.monotonic() < begun + 60, "nobody is refused"
        for _ in range(3):
            since = time.monotonic()
            try:
                lane.submit(Asked(), lambda answer, since=since: got.append((time.monotonic() - since, answer)))
            except Overloaded as err:
                refused.append((since, err))
        await asyncio.sleep(0.004)
    while lane.is_busy:
        await asyncio.sleep(0.01)
    return got, refused, refused[0][0] - begun


@pytest.mark.long
def test_an_overloaded_lane_refuses_with_when_to_come_again_and_answers_the_others_sooner():
    async def test():
        with ThreadPoolExecutor(1) as thread:
            lane = Lane(compute, thread, max_batch_rows=4, max_rows=100_000)
            lane.target_s = 0.1
            lane.pace.note(1, ROW_S)  # it is known to be long: not on the event loop
            got, refused, first_s = await overload(lane, 1.5)
            lane.submit(Asked(), lambda answer: got.append((0, answer)))  # the line is empty
            while lane.is_busy:
                await asyncio.sleep(0.01)
        return got, refused, first_s

    got, refused, first_s = asyncio.run(test())
    waited = [seconds for seconds, answer in got if answer == "answer"]
    assert (got[-1][1], first_s >= 0.25) == ("answer", True)
    assert {type(answer) for _, answer in got} == {str, Overloaded}  # who had waited too long was let go
    assert np.median(waited[-6:-1]) <= 0.8 * max(waited)
    assert max(err.retry_after_s for _, err in refused) > 1


def test_who_is_refused_is_told_when_to_come_again():
    err = Overloaded("too much")
    err.retry_after_s = 7
    reply = asgi.error_reply(err)
    assert (reply.status, reply.headers) == (429, {"retry-after": "7"})
    assert b'"code":"overloaded"' in reply.body
    assert asgi.error_reply(Overloaded("too much")).headers == {"retry-after": "1"}


def test_a_request_is_refused_before_it_is_read_and_never_before_an_empty_line():
    async def test():
        with ThreadPoolExecutor(1) as thread:
            lane = Lane(compute, thread, max_batch_rows=4, max_rows=100_000)
            lane.target_s = 0.1
            for n in range(21):  # 33 rows a second: two may wait while one is computed
                lane.admission.turned(time.monotonic() + 0.03 * (n - 20), 1, 0.03, 5.0)
            lane.admit()
            answered = []
            for _ in range(2):
                lane.submit(Asked(), answered.append)
            with pytest.raises(Overloaded):
                lane.admit()
            while lane.is_busy:
                await asyncio.sleep(0.01)
            lane.admit()
            return answered

    assert asyncio.run(test()) == ["answer"] * 2


class Stages:
    """Two stages that wait for something else than a core, and what began and ended when."""

    def __init__(self, thread, beside):
        self.told, self.under_way, self.most = [], 0, 0
        self.lane = Lane(self.ask, thread, max_batch_rows=8, max_rows=1000, prepare=self.prepare, preparing=beside)
        for size in (1, 2, 4, 8):
            self.lane.pace.note(size, 0.02, 0.02)  # known to be long: not on the event loop

    def prepare(self, questions):
        self.told.append(("features", len(questions)))
        time.sleep(0.005)
        self.told.append(("looked up", len(questions)))
        if any(q.columns == "bad" for q in questions):
            raise RequestError("no such entity")
        return questions

    def ask(self, batches):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.told.append(("model", sum(map(len, batches))))
        time.sleep(0.03)
        self.told.append(("answered", sum(map(len, batches))))
        self.under_way -= 1
        return [q.columns for batch in batches for q in batch]


def staged(asked):
    """Answers to these, which come one after the other while the first is computed, and what was told."""

    async def test():
        with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as beside:
            stages = Stages(thread, beside)
            got = {}
            for i, columns in enumerate(asked):
                stages.lane.submit(Asked(columns), lambda answer, i=i: got.setdefault(i, answer))
                await asyncio.sleep(0.012)
            while stages.lane.is_busy:
                await asyncio.sleep(0.005)
            return got, stages

    return asyncio.run(test())


def test_features_are_looked_up_while_the_model_computes_and_it_takes_all_that_are_ready():
    got, stages = staged([f"c{i}" for i in range(6)])
    assert got == {i: f"c{i}" for i in range(6)}
    assert stages.most == 1
    first_answer = stages.told.index(("answered", 1))
    assert ("looked up", 1) in stages.told[3:first_answer]
    assert max(rows for what, rows in stages.told if what == "model") > 1


def test_features_that_can_not_be_looked_up_are_the_errors_of_those_callers_alone():
    got, stages = staged(["c0", "bad", "c2", "c3"])
    assert isinstance(got.pop(1), RequestError)
    assert got == {0: "c0", 2: "c2", 3: "c3"}
    assert stages.most == 1


def test_callers_without_features_to_look_up_are_one_batch_when_the_model_comes_free():
    got, stages = staged([None] * 4)
    assert got == dict.fromkeys(range(4))
    assert [rows for what, rows in stages.told if what == "model"] in ([1, 3], [1, 2, 1])


def test_the_model_takes_no_more_rows_at_once_than_a_batch_may_have():
    async def test():
        with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as beside:
            stages = Stages(thread, beside)
            got = []
            for n in range(60):
                stages.lane.submit(Asked(n), got.append)
                await asyncio.sleep(0.001)
            while stages.lane.is_busy:
                await asyncio.sleep(0.005)
            return got, stages

    got, stages = asyncio.run(test())
    assert sorted(got) == list(range(60))
    assert max(rows for what, rows in stages.told if what == "model") < 16  # two batches of less than 8


def test_a_stopped_executor_is_told_to_everybody_who_waits():
    async def test():
        thread, beside = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        stages = Stages(thread, beside)
        thread.shutdown()
        got = []
        for columns in ("a", None):
            stages.lane.submit(Asked(columns), got.append)
            while stages.lane.is_busy:
                await asyncio.sleep(0.005)
        beside.shutdown()
        stages.lane.submit(Asked("b"), got.append)
        while stages.lane.is_busy:
            await asyncio.sleep(0.005)
        return got

    assert [type(answer) for answer in asyncio.run(test())] == [Unavailable] * 3


def test_a_model_that_waits_for_a_device_is_not_short():
    pace = Pace()
    for _ in range(50):
        pace.note(1, 0.0001, 0.02)
    assert not pace.is_short(1)
    assert pace.rows_within(0.01) == 1


def test_a_batch_that_waited_for_a_core_is_as_short_as_it_was():
    pace = Pace()
    for n in range(50):
        pace.note(1, 0.0001, 0.0002 if n % 10 == 0 else 0.05)
    assert pace.is_short(1)


def test_a_thread_that_keeps_python_to_itself_for_seconds_makes_no_batch_long():
    pace = Pace()
    for _ in range(10):
        pace.note(4, 0.0001, 0.0002)
    for _ in range(1000):  # five seconds, as while a model loads beside
        pace.note(4, 0.0001, 0.005)
    assert pace.is_short(4)
    assert pace.rows_within(0.025) > 100
