"""The lane before one model: callers wait in line, whatever waits is computed together, one batch at a time.

A batch that is expected to be short is computed on the event loop, where a hop to a thread and back would cost more
than the model does; a longer one in two stages with a thread each, so that the loop goes on reading: features of
callers are looked up as they come, while the model computes; when it comes free it takes all that are ready.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from raymill.actors.admission import Admission
from raymill.actors.batching import Pace, WaitingLine
from raymill.actors.load_meter import LoadMeter
from raymill.actors.models import Answer, Question
from raymill.runtime.errors import Expired, Overloaded, RaymillError, Unavailable

TOGETHER = 64
"""So many callers are a batch, though the loop may have more to read: meanwhile those before them go on."""

Prepare = Callable[[list[Question]], Any]
"""The first stage: looks features up. What it gives goes to the second as it is; it may raise."""
Ask = Callable[[list[Any]], "list[Answer | RaymillError]"]
"""The second stage: what the first made of one batch or several, to an answer for each question, in order."""
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


class _Ready:
    """A batch whose features are looked up."""

    __slots__ = ("batch", "prepared", "seconds")

    def __init__(self, batch: list[Ticket], prepared: Any, seconds: float) -> None:
        self.batch, self.prepared, self.seconds = batch, prepared, seconds


class Lane:
    """Used from one event loop; neither stage ever runs twice at once, nor beside a batch on the loop."""

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
        prepare: Prepare = lambda questions: questions,
        preparing: Executor | None = None,
        loading: Executor | None = None,
    ) -> None:
        """While the model is not in memory (`is_here`) callers wait, and it is brought back on a thread of `loading`.

        `gather` brings tickets of a batch together: each that it gives has a question. `prepare` is the first stage,
        on the thread of `preparing`; `ask` the second, on that of `executor`.
        """
        self._ask, self._prepare = ask, prepare
        self._executor, self._preparing, self._loading = executor, preparing, loading
        self._is_here, self._bring_back, self._gather = is_here, bring_back, gather
        self._meter = meter or LoadMeter()
        self.line: WaitingLine[Ticket] = WaitingLine(max_batch_rows=max_batch_rows, max_rows=max_rows)
        self.pace = Pace()
        self.admission = Admission()
        self._busy = False
        self._ready: list[_Ready] = []
        """Batches before the second stage."""
        self._runs = False
        """Whether the second stage is under way."""
        self._is_held = False
        """Whether the first stage waits for the second."""
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
        return self._busy or self._runs

    def _begin(self) -> None:
        if self._soon:  # else enough callers came to begin before
            self._next()

    def _next(self) -> None:
        self._soon = False
        if not self._is_here():
            self._fetch()
            return
        now = time.monotonic()
        batch = self._gather([t for t in self.line.take(self._most_rows) if not t.left and not self._expired(t, now)])
        if not batch:
            self._go_on()
            return
        rows = sum(map(len, batch))
        self._meter.waited(now - batch[0].since_s, rows)
        questions = [t.question for t in batch if t.question is not None]
        if self._runs or not self.pace.is_short(rows):
            self._to_first_stage(batch, questions)
        else:
            self._deliver(batch, self._whole(questions, rows))
            self._go_on()

    def _to_first_stage(self, batch: list[Ticket], questions: list[Question]) -> None:
        if self._preparing is None or all(q.columns is None for q in questions):
            self._to_second_stage(_Ready(batch, *self._prepared(questions)))
            return
        try:
            running = asyncio.get_running_loop().run_in_executor(self._preparing, self._prepared, questions)
        except RuntimeError:  # the executor is shut down
            self._deliver(batch, [_stops()] * len(batch))
            self._go_on()
            return
        running.add_done_callback(lambda done: self._looked_up(batch, done))

    def _looked_up(self, batch: list[Ticket], running: asyncio.Future[tuple[Any, float]]) -> None:
        if running.cancelled():
            self._deliver(batch, [_stops()] * len(batch))
            self._go_on()
        else:
            self._to_second_stage(_Ready(batch, *running.result()))

    def _to_second_stage(self, ready: _Ready) -> None:
        self._ready.append(ready)
        if not self._runs:
            self._run()
        # Without features to look up nothing is won by taking callers out of the line before the model is free.
        looks_up = any(t.question is not None and t.question.columns is not None for t in ready.batch)
        self._is_held = self._runs and not (looks_up and self._room)
        if not self._is_held:
            self._go_on()

    @property
    def _room(self) -> bool:
        return sum(len(t) for r in self._ready for t in r.batch) < min(self._most_rows, self.line.max_batch_rows)

    def _run(self) -> None:
        """The second stage, of all that is ready for it."""
        taken, self._ready = self._ready, []
        batch = [t for ready in taken for t in ready.batch]
        self._runs = True
        try:
            running = asyncio.get_running_loop().run_in_executor(self._executor, self._computed, taken, len(batch))
        except RuntimeError:  # the executor is shut down
            self._runs = False
            self._deliver(batch, [_stops()] * len(batch))
            return
        running.add_done_callback(lambda done: self._came_back(batch, done))

    def _fetch(self) -> None:
        """Have the model brought back beside the traffic of others; whoever waits goes on waiting."""
        coming = asyncio.get_running_loop().run_in_executor(self._loading, self._bring_back)
        coming.add_done_callback(self._fetched)

    def _fetched(self, coming: asyncio.Future[None]) -> None:
        err = _stops() if coming.cancelled() else coming.exception()
        if err is None:
            self._here_since_s = time.monotonic()
            self._next()
        else:
            waiting = self.line.take()
            self._deliver(waiting, [err if isinstance(err, Exception) else Unavailable(str(err))] * len(waiting))
            self._go_on()

    @property
    def _most_rows(self) -> float:
        """Rows of a batch that callers can wait for."""
        return self.pace.rows_within(self.target_s / 2) if self.target_s < math.inf else math.inf

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
        self._runs = False
        self._deliver(batch, [_stops()] * len(batch) if running.cancelled() else running.result())
        if self._ready:
            self._run()
        if self._is_held:
            self._is_held = False
            self._go_on()

    def _prepared(self, questions: list[Question]) -> tuple[Any, float]:
        """What the first stage gives, or the error that it raises, and the CPU time it took."""
        begun = time.thread_time()
        try:
            return self._prepare(questions), time.thread_time() - begun
        except Exception as err:  # noqa: BLE001 - edge of the lane, as in `_computed`
            return err, time.thread_time() - begun

    def _computed(self, taken: list[_Ready], callers: int) -> Sequence[Answer | Exception]:
        """Answers to all callers of these batches."""
        fine = [r for r in taken if not isinstance(r.prepared, Exception)]
        clock = _Stopwatch()
        try:
            found = iter(self._ask([r.prepared for r in fine]) if fine else [])
            answers = [r.prepared if isinstance(r.prepared, Exception) else next(found) for r in taken for _ in r.batch]
        except Exception as err:  # noqa: BLE001 - edge of the lane: it is every caller's answer, and the lane goes on
            answers = [err] * callers
        self._note(sum(len(t) for r in taken for t in r.batch), clock, sum(r.seconds for r in taken))
        return answers

    def _whole(self, questions: list[Question], rows: int) -> Sequence[Answer | Exception]:
        """Both stages at once."""
        clock = _Stopwatch()
        try:
            answers: Sequence[Answer | Exception] = self._ask([self._prepare(questions)])
        except Exception as err:  # noqa: BLE001 - edge of the lane, as in `_computed`
            answers = [err] * len(questions)
        self._note(rows, clock)
        return answers

    def _note(self, rows: int, clock: _Stopwatch, before_s: float = 0.0) -> None:
        seconds = self.pace.note(rows, clock.cpu_s + before_s, clock.wall_s + before_s)
        self._meter.took(seconds)

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


class _Stopwatch:
    """Time since it was made: of this thread on a core, and of the wall."""

    __slots__ = ("_cpu_s", "_wall_s")

    def __init__(self) -> None:
        self._cpu_s, self._wall_s = time.thread_time(), time.perf_counter()

    @property
    def cpu_s(self) -> float:
        return time.thread_time() - self._cpu_s

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._wall_s


def _stops() -> Unavailable:
    return Unavailable("the replica stops")
