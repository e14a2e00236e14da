"""Traces of requests to predict, by OpenTelemetry: both lanes and gRPC, where Serve's tracing is on; else nothing.

    predict taxi                    a request, from its bytes read to its reply handed over
    ├── decode                      bytes → rows
    ├── queue                       in line before the model
    ├── batch taxi                  everything that was computed together, linked to the other requests in it
    │   └── features, model, log    its stages
    └── encode                      answer → bytes

A caller's `traceparent` (W3C) is continued, its decision to sample too; without one Serve's ratio decides. Requests
that are not sampled, and batches with none in them, take the ordinary way.

Invariant: a request's span ends when its reply is handed over, or `ABANDONED_S` after its caller has gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from raymill.actors.answering import Call, Write
from raymill.actors.asgi import Reply
from raymill.actors.models import Answer, LoadedModel, Log, Question
from raymill.runtime.errors import RaymillError

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
ABANDONED_S = 60.0
"""After which a request that has no reply is taken for one whose caller has gone."""
_NS = 1_000_000_000
_W3C = TraceContextTextMapPropagator()
Done = Callable[[Reply], None]


@dataclass(eq=False, slots=True)
class _Trace:
    """A sampled request under way."""

    span: Span
    since_ns: int
    question: Question | None = None
    waits_since_ns: int = 0

    @property
    def context(self) -> Context:
        return set_span_in_context(self.span)


class Traces:
    """Of one replica; `follow` is used on its event loop, `ask` wherever a batch is computed."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._open: dict[_Trace, None] = {}
        """In the order in which they came."""
        self._waiting: dict[int, _Trace] = {}
        """By the question's identity."""

    def follow(self, call: Call, done: Done) -> tuple[Call, Done]:
        """The call and where its reply goes, followed if the request is sampled."""
        now = time.time_ns()
        self._sweep(now)
        span = self._tracer.start_span(
            f"predict {call.model}",
            context=_parent(getattr(call, "headers", {})),
            kind=SpanKind.SERVER,
            attributes={"raymill.model": call.model},
            start_time=now,
        )
        if not span.is_recording():
            return call, done
        found = _Trace(span, now)
        self._open[found] = None
        return _Followed(call, found, self), partial(self._answered, found, done)

    def ask(self, model: LoadedModel, batch: list[Question], log: Log) -> list[Answer | RaymillError]:
        """As `LoadedModel.ask`; the stages are noted if a request of the batch is followed."""
        traces = [t for q in batch if (t := self._waiting.pop(id(q), None)) is not None]
        if not traces:
            return model.ask(batch, log)
        begun = time.time_ns()
        for one in traces:
            self.note("queue", one.context, one.waits_since_ns, begun)
        first, *others = traces
        whole = self._tracer.start_span(
            f"batch {model.spec.name}",
            context=first.context,
            links=[Link(t.span.get_span_context()) for t in others],
            attributes={"raymill.requests": len(batch), "raymill.rows": sum(map(len, batch))},
            start_time=begun,
        )
        for one in others:
            one.span.add_link(whole.get_span_context())
        stage = partial(_Stage, self, set_span_in_context(whole))
        timed: Any = {"attempts": stage(model.attempts, "compute", "model")}
        if model.reader is not None:
            timed["reader"] = stage(model.reader, "vectors", "features")
        timed_log: Any = stage(log, "record", "log")
        try:
            answers = replace(model, **timed).ask(batch, timed_log)
        finally:
            whole.end()
        by_question = dict(zip(map(id, batch), answers, strict=True))
        for one in traces:
            answer = by_question.get(id(one.question))
            if isinstance(answer, Answer):
                one.span.set_attribute("raymill.versions", sorted(set(answer.versions.tolist())))
        return answers

    def note(self, name: str, context: Context, begun_ns: int, ended_ns: int | None = None) -> None:
        """A span that is over."""
        self._tracer.start_span(name, context=context, start_time=begun_ns).end(ended_ns)

    def waits(self, found: _Trace, question: Question) -> None:
        """A followed request's question stands in line from now on."""
        found.question, found.waits_since_ns = question, time.time_ns()
        found.span.set_attribute("raymill.rows", len(question))
        self._waiting[id(question)] = found

    def _answered(self, found: _Trace, done: Done, reply: Reply) -> None:
        done(reply)
        found.span.set_attribute("http.response.status_code", reply.status)
        if reply.status >= 500:
            found.span.set_status(StatusCode.ERROR)
        self._close(found)

    def _close(self, found: _Trace) -> None:
        self._open.pop(found, None)
        if found.question is not None:
            self._waiting.pop(id(found.question), None)
        found.span.end()

    def _sweep(self, now_ns: int) -> None:
        while self._open and (oldest := next(iter(self._open))).since_ns < now_ns - ABANDONED_S * _NS:
            oldest.span.set_attribute("raymill.abandoned", True)
            self._close(oldest)


@dataclass(frozen=True, slots=True)
class _Followed:
    """A call whose stages are noted."""

    call: Call
    found: _Trace
    traces: Traces

    @property
    def model(self) -> str:
        return self.call.model

    @property
    def timeout_s(self) -> float | None:
        return self.call.timeout_s

    def read(self, model: LoadedModel, now_us: int) -> tuple[Question, Write]:
        begun = time.time_ns()
        try:
            question, write = self.call.read(model, now_us)
        finally:
            self.traces.note("decode", self.found.context, begun)
        self.traces.waits(self.found, question)
        return question, partial(self._write, write)

    def _write(self, write: Write, answer: Answer) -> Reply:
        begun = time.time_ns()
        try:
            return write(answer)
        finally:
            self.traces.note("encode", self.found.context, begun)


class _Stage:
    """Something with one method that is noted."""

    def __init__(self, traces: Traces, context: Context, inner: Any, method: str, name: str) -> None:
        def noted(*arguments: Any) -> Any:
            begun = time.time_ns()
            try:
                return getattr(inner, method)(*arguments)
            finally:
                traces.note(name, context, begun)

        self._inner = inner
        setattr(self, method, noted)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _parent(headers: Mapping[str, str]) -> Context | None:
    """The span that Serve has opened for this request, else the caller's."""
    if trace.get_current_span().is_recording():
        return None
    if TRACEPARENT not in headers:
        return Context()
    return _W3C.extract({k: headers[k] for k in (TRACEPARENT, TRACESTATE) if k in headers}, Context())
