"""The lane before one model: callers wait in line, one thread at a time computes whatever waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor

from raymill.actors.batching import WaitingLine
from raymill.actors.models import Answer, Question
from raymill.runtime.errors import RaymillError

Ask = Callable[[list[Question]], "list[Answer | RaymillError]"]


class _Waiting:
    """A question, and where its answer goes."""

    __slots__ = ("future", "question")

    def __init__(self, question: Question, future: asyncio.Future[Answer]) -> None:
        self.question, self.future = question, future

    def __len__(self) -> int:
        return len(self.question)


class Lane:
    """Used from one event loop; `ask` runs in `executor`, never twice at once."""

    def __init__(self, ask: Ask, executor: Executor, *, max_batch_rows: int, max_rows: int) -> None:
        self._ask = ask
        self._executor = executor
        self.line: WaitingLine[_Waiting] = WaitingLine(max_batch_rows=max_batch_rows, max_rows=max_rows)
        self._pump: asyncio.Task[None] | None = None

    async def answer(self, question: Question) -> Answer:
        """Wait in line for the answer.

        Raises:
            Overloaded: the line is full.
            RaymillError: what the model says of these rows.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(question, loop.create_future())
        self.line.offer(waiting)
        if self._pump is None:
            self._pump = loop.create_task(self._run())
        return await waiting.future

    async def _run(self) -> None:
        try:
            while self.line:
                # A caller who has left is not computed for.
                batch = [w for w in self.line.take() if not w.future.done()]
                if batch:
                    await self._answer(batch)
        finally:
            self._pump = None

    async def _answer(self, batch: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._executor, self._ask, [w.question for w in batch])
        except Exception as err:  # noqa: BLE001 - edge of the lane: it is every caller's answer, and the lane goes on
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(err)
            return
        for waiting, answer in zip(batch, answers, strict=True):
            if waiting.future.done():
                continue
            if isinstance(answer, Answer):
                waiting.future.set_result(answer)
            else:
                waiting.future.set_exception(answer)
