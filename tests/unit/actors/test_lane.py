"""The lane before a model when more is asked than it can answer in time."""

import asyncio
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from raymill.actors import asgi
from raymill.actors.lane import Lane
from raymill.runtime.errors import Overloaded

ROW_S = 0.01
SQUARE = np.ones((128, 128), np.float32)


def compute(questions):
    """Takes a time for each row, on the core: a batch is long by what it computes, not by what it waits for."""
    end = time.thread_time() + ROW_S * sum(map(len, questions))
    while time.thread_time() < end:
        SQUARE @ SQUARE  # others may go on meanwhile
    return ["answer"] * len(questions)


async def overload(lane, per_turn, seconds):
    """So many callers every few milliseconds; what they got, and when those were refused who were not let in."""
    got, refused_at, begun = [], [], time.monotonic()
    while (now := time.monotonic() - begun) < seconds:
        for _ in range(per_turn):
            since = time.monotonic()
            try:
                lane.submit("x", lambda answer, since=since: got.append((time.monotonic() - since, answer)))
            except Overloaded as err:
                refused_at.append((now, err))
        await asyncio.sleep(0.004)
    while lane.is_busy:
        await asyncio.sleep(0.01)
    return got, refused_at


def test_an_overloaded_lane_refuses_with_when_to_come_again_and_answers_the_others_sooner():
    async def test():
        with ThreadPoolExecutor(1) as thread:
            lane = Lane(compute, thread, max_batch_rows=4, max_rows=100_000)
            lane.target_s = 0.1
            lane.pace.note(1, ROW_S)  # it is known to be long: not on the event loop
            got, refused = await overload(lane, 3, 3.0)
            lane.submit("x", lambda answer: got.append((0, answer)))  # the line is empty
            while lane.is_busy:
                await asyncio.sleep(0.01)
        return got, refused

    got, refused = asyncio.run(test())
    kinds = Counter(type(answer).__name__ for _, answer in got)
    assert kinds["str"] >= 20  # some 100 a second where nobody else wants the cores
    assert len(refused) > kinds["str"]
    assert refused[0][0] >= 0.25
    waited = [seconds for seconds, answer in got[:-1] if answer == "answer"]
    assert np.median(waited[-8:]) <= 0.5 * max(waited)
    assert max(err.retry_after_s for _, err in refused) > 1
    assert got[-1][1] == "answer"


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
                lane.submit("x", answered.append)
            with pytest.raises(Overloaded):
                lane.admit()
            while lane.is_busy:
                await asyncio.sleep(0.01)
            lane.admit()
            return answered

    assert asyncio.run(test()) == ["answer"] * 2
