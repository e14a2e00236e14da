"""No answer goes to another caller: every request's answer is a function of its own inputs, and is held against them.

Clients that pipeline, clients that leave with requests under way, versions that change all the time; at a real server
on loopback with the fast lane open. The benchmark of rollouts holds answers against rows in the same way on Serve,
while replicas are killed and replaced.
"""

import asyncio
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import orjson
import pytest

from benchmarks.open_loop import Connection, Requests
from raymill.actors.rollout import Role, Route, to_user_config
from raymill.actors.selftest import spec
from tests.actors.test_serving_fuzz import endpoint

ROWS = 997
X = (np.arange(ROWS, dtype=np.float32) / 100)[:, None]
"""Inputs below ten: the model answers input / 100 + version / 10, so no two rows or versions have the same answer."""
EXPECTED = {v: X[:, 0] / 100 + v / 10 for v in (1, 2)}
REQUESTS = Requests("127.0.0.1", "selftest", X, EXPECTED)


class Callers:
    """Connections that ask one after the other, and what was wrong with their answers."""

    def __init__(self, port, wanted):
        self.port, self.wanted = port, wanted
        self.sent = self.left = 0
        self.answers, self.wrong = Counter(), Counter()

    async def run(self, seed):
        chance = random.Random(seed)
        while self.sent < self.wanted:
            await self._connection(chance, chance.randint(1, 30))

    async def _connection(self, chance, rounds):
        idle, ended = asyncio.Event(), asyncio.Event()
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(lambda _: idle.set(), lambda _: ended.set()), "127.0.0.1", self.port
        )
        for _ in range(rounds):
            idle.clear()
            for _ in range(chance.choice([1, 1, 1, 2, 5, 20])):
                number, self.sent = self.sent, self.sent + 1
                connection.send(REQUESTS.data(number), lambda *answer, n=number: self._judge(n, *answer))
            if chance.random() < 0.05:
                await asyncio.sleep(chance.choice([0, 0.0005, 0.002]))
                self.left += 1
                break
            await asyncio.wait_for(idle.wait(), 20)
        connection.abort()

    def _judge(self, number, status, body):
        version, wrong = REQUESTS.judge(number, status, body)
        self.answers[version] += 1
        if wrong:
            self.wrong[wrong] += 1


async def change_versions(replica, ends):
    """Weights of the two versions, again and again."""
    chance = random.Random(1)
    while not ends.is_set():
        weight = chance.choice([0.0, 0.2, 0.5, 1.0])
        routes = [
            Route(version=1, digest="1", role=Role.LIVE, weight=1 - weight),
            Route(version=2, digest="2", role=Role.CANARY, weight=weight),
        ]
        await replica.reconfigure(to_user_config([replace(spec(), routes=tuple(routes))]))
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("wanted", [3_000, pytest.param(100_000, marks=pytest.mark.soak)])
def test_every_answer_is_its_callers_own_whoever_leaves_and_whichever_version_answers(tmp_path, wanted):
    async def whole():
        async with endpoint(tmp_path) as (replica, port):
            ends = asyncio.Event()
            changing = asyncio.create_task(change_versions(replica, ends))
            callers = Callers(port, wanted)
            await asyncio.gather(*(callers.run(seed) for seed in range(24)))
            ends.set()
            await changing
            return callers, replica.fast.requests

    callers, fast = asyncio.run(whole())
    assert callers.wrong == {}
    assert callers.sent >= wanted and callers.left > wanted / 1000
    assert callers.answers[1] > wanted / 5 and callers.answers[2] > wanted / 5
    assert fast > wanted / 2


@pytest.mark.parametrize(
    "body, wrong",
    [
        ({"id": "r8", "model_version": "1", "outputs": [{"data": [0.1007]}]}, "the answer of another request"),
        ({"id": "r7", "model_version": "1", "outputs": [{"data": [0.1008]}]}, "a wrong value"),
        ({"id": "r7", "model_version": "2", "outputs": [{"data": [0.1007]}]}, "a wrong value"),
        ({"id": "r7", "model_version": "1", "outputs": [{"data": [0.1007]}]}, ""),
    ],
)
def test_the_detector_sees_an_answer_that_is_another_requests(body, wrong):
    assert REQUESTS.judge(7, 200, orjson.dumps(body))[1] == wrong
