"""The lane before one model: callers wait in line, whatever waits is computed together, one batch at a time.

A batch that is expected to be short is computed on the event loop, where a hop to a thread and back would cost more
than the model does; a longer one in the executor, so that the loop goes on reading.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from raymill.actors.admission import Admission
from raymill.actors.batching import Pace, WaitingLine
from raymill.actors.load_meter import LoadMeter
from raymill.actors.models import Answer, Question
from raymill.runtime.errors import Expired, Overloaded, RaymillError, Unavailable

TOGETHER = 32
"""So many callers are a batch, though the loop may have more to read: meanwhile those before them go on."""

Ask = Callable[[list[Question]], "list[Answer | RaymillError]"]
Done = Callable[["Answer | Exception"], None]
"""Called once, on the event loop, with what the caller gets; never for one who has left."""


class Ticket:
    """A question in line, and where its answer goes."""

    __slots__ = ("done", "expires_s", "left", "question", "rows", "since_s")

    def __init__(
        self, question: Question | None, done: Done, since_s: float = 0.0, expires_s: float = math.inf
    ) -> None:
        """`question` is None for one row that is read when its batch is made up (`Lane`'s `gather`)."""
        self.question, self.done = question, done
        self.rows = 1 if question is None else len(question)
        self.since_s = since_s
        """Monotonic time at which it came."""
        self.expires_s = expires_s
        """Monotonic time after which it is answered without being computed."""
        self.left = False
        """Set by a caller who has gone away: what still waits is not computed."""

    def __len__(self) -> int:
        return self.rows


class Lane:
    """Used from one event loop; `ask` never runs twice at once."""

    def __init__(
        self,
        ask: Ask,
        executor: Executor,
        *,
        max_batch_rows: int,
        max_rows: int,
        meter: LoadMeter | None = None,
        is_here: Callable[[], bool] = lambda: True,
        bring_back: Callable[[], None] = lambda: None,
        gather: Callable[[list[Ticket]], list[Ticket]] = lambda batch: batch,
    ) -> None:
        """While the model is not in memory (`is_here`) callers wait, and it is brought back in another thread.

        `gather` brings tickets of a batch together: each that it gives has a question.
        """
        self._ask = ask
        self._executor = executor
        self._is_here, self._bring_back, self._gather = is_here, bring_back, gather
        self._meter = meter or LoadMeter()
        self.line: WaitingLine[Ticket] = WaitingLine(max_batch_rows=max_batch_rows, max_rows=max_rows)
        self.pace = Pace()
        self.admission = Admission()
        self._busy = False
        self._soon = False
        """Whether the next batch begins in this turn of the loop or the next one."""
        self._turned_s = -math.inf
        """When the last batch had been answered."""
        self._here_since_s = -math.inf
        """When the model was brought back last."""

    @property
    def target_s(self) -> float:
        """Latency that callers are promised; a batch may take half of it, since they wait for the one before, too."""
        return self.admission.target_s

    @target_s.setter
    def target_s(self, seconds: float) -> None:
        self.admission.target_s = seconds

    def admit(self, rows: int = 1) -> None:
        """Before a request of so many rows is read, or stands in line.

        Raises:
            Overloaded: it could not be answered in time.
        """
        is_late = self.line.rows + rows > self.admission.most_rows and self.line
        if is_late and self.admission.refuses(time.monotonic(), rows):
            raise self._too_late()

    def submit(self, question: Question, done: Done, timeout_s: float | None = None) -> Ticket:
        """Stand in line; `done` is called with the answer, not before this returns.

        What waits longer than `timeout_s` is answered with `Expired`.

        Raises:
            Overloaded: the line is full, or the request could not be answered in time.
        """
        self.admit(len(question))
        now = time.monotonic()  # the loop's own clock stands still while it reads one round of requests
        return self.stand(Ticket(question, done, now, math.inf if timeout_s is None else now + timeout_s))

    def stand(self, ticket: Ticket) -> Ticket:
        """Put a ticket in line, which was admitted.

        Raises:
            Overloaded: the line is full.
        """
        self.line.offer(ticket)
        if not self._busy:
            self._busy = self._soon = True
            # Not at once: whatever the loop reads in this round joins the batch.
            asyncio.get_running_loop().call_soon(self._begin)
        elif self._soon and len(self.line) >= TOGETHER:
            self._next()
        return ticket

    @property
    def is_busy(self) -> bool:
        """Whether a batch is under way or waits."""
        return self._busy

    def _begin(self) -> None:
        if self._soon:  # else enough callers came to begin before
            self._next()

    def _next(self) -> None:
        self._soon = False
        if not self._is_here():
            self._fetch()
            return
        now = time.monotonic()
        batch = self._gather([t for t in self._take() if not t.left and not self._expired(t, now)])
        if not batch:
            self._go_on()
            return
        rows = sum(map(len, batch))
        self._meter.waited(now - batch[0].since_s, rows)
        questions = [t.question for t in batch if t.question is not None]
        if self.pace.is_short(rows):
            self._deliver(batch, self._timed(questions, rows))
            self._go_on()
            return
        loop = asyncio.get_running_loop()
        try:
            running = loop.run_in_executor(self._executor, self._timed, questions, rows)
        except RuntimeError:  # the executor is shut down
            self._deliver(batch, [Unavailable("the replica stops")] * len(batch))
            self._go_on()
            return
        running.add_done_callback(lambda done: self._came_back(batch, done))

    def _fetch(self) -> None:
        """Have the model brought back beside the traffic of others; whoever waits goes on waiting."""
        coming = asyncio.get_running_loop().run_in_executor(None, self._bring_back)
        coming.add_done_callback(self._fetched)

    def _fetched(self, coming: asyncio.Future[None]) -> None:
        err = Unavailable("the replica stops") if coming.cancelled() else coming.exception()
        if err is None:
            self._here_since_s = time.monotonic()
            self._next()
        else:
            waiting = self.line.take()
            self._deliver(waiting, [err if isinstance(err, Exception) else Unavailable(str(err))] * len(waiting))
            self._go_on()

    def _take(self) -> list[Ticket]:
        return self.line.take(self.pace.rows_within(self.target_s / 2) if self.target_s < math.inf else math.inf)

    def _expired(self, ticket: Ticket, now: float) -> bool:
        if now > ticket.expires_s:
            ticket.done(Expired("the request waited longer than its timeout before the model came free"))
        elif now - ticket.since_s > self.admission.patience_s:
            ticket.done(self._too_late())
        else:
            return False
        return True

    def _too_late(self) -> Overloaded:
        err = Overloaded("more requests wait than can be answered within the latency wanted (`Serve.p99`)")
        err.retry_after_s = self.admission.retry_after_s
        return err

    def _came_back(self, batch: list[Ticket], running: asyncio.Future[Sequence[Answer | Exception]]) -> None:
        try:
            answers = running.result()
        except asyncio.CancelledError:
            answers = [Unavailable("the replica stops")] * len(batch)
        self._deliver(batch, answers)
        self._go_on()

    def _timed(self, questions: list[Question], rows: int) -> Sequence[Answer | Exception]:
        begun = time.thread_time()  # waiting for a core would be the same in a thread
        try:
            answers: Sequence[Answer | Exception] = self._ask(questions)
        except Exception as err:  # noqa: BLE001 - edge of the lane: it is every caller's answer, and the lane goes on
            answers = [err] * len(questions)
        seconds = time.thread_time() - begun
        self.pace.note(rows, seconds)
        self._meter.took(seconds)
        return answers

    def _deliver(self, batch: list[Ticket], answers: Sequence[Answer | Exception]) -> None:
        for ticket, answer in zip(batch, answers, strict=True):
            if not ticket.left:
                ticket.done(answer)
        now, since_s = time.monotonic(), batch[0].since_s
        if since_s > self._here_since_s:  # else it was the model that callers waited for
            self.admission.turned(now, sum(map(len, batch)), now - max(since_s, self._turned_s), now - since_s)
        self._turned_s = now

    def _go_on(self) -> None:
        self._soon = bool(self.line)
        if self._soon:
            asyncio.get_running_loop().call_soon(self._begin)
        else:
            self._busy = False
