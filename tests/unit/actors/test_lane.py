"""The lane before a model when more is asked than it can answer in time."""

import asyncio
import time
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


async def overload(lane, seconds):
    """Three callers every few milliseconds, for so long after the first was refused: what they got, who was refused."""
    got, refused, begun = [], [], time.monotonic()
    while not refused or time.monotonic() < refused[0][0] + seconds:
        assert time.monotonic() < begun + 60, "nobody is refused"
        for _ in range(3):
            since = time.monotonic()
            try:
                lane.submit("x", lambda answer, since=since: got.append((time.monotonic() - since, answer)))
            except Overloaded as err:
                refused.append((since, err))
        await asyncio.sleep(0.004)
    while lane.is_busy:
        await asyncio.sleep(0.01)
    return got, refused, refused[0][0] - begun


def test_an_overloaded_lane_refuses_with_when_to_come_again_and_answers_the_others_sooner():
    async def test():
        with ThreadPoolExecutor(1) as thread:
            lane = Lane(compute, thread, max_batch_rows=4, max_rows=100_000)
            lane.target_s = 0.1
            lane.pace.note(1, ROW_S)  # it is known to be long: not on the event loop
            got, refused, first_s = await overload(lane, 1.5)
            lane.submit("x", lambda answer: got.append((0, answer)))  # the line is empty
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
                lane.submit("x", answered.append)
            with pytest.raises(Overloaded):
                lane.admit()
            while lane.is_busy:
                await asyncio.sleep(0.01)
            lane.admit()
            return answered

    assert asyncio.run(test()) == ["answer"] * 2
