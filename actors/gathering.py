"""Callers in line whose bodies are read when their batch is made up, those of all of them together.

Vectors in a known form become one question, a row each; rows whose features are looked up stay a question each.

Invariant: each caller gets what it would have got alone. What can not be read together goes the ordinary way, and a
row that fails is that caller's error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from raymill.actors import lane
from raymill.actors.answering import HttpCall, failure, finish, question_of_rows, write_rows
from raymill.actors.asgi import Reply
from raymill.actors.known_bodies import BodyForm, question_of
from raymill.actors.lane import Ticket
from raymill.actors.models import Answer, Question
from raymill.actors.rollout import ModelSpec
from raymill.actors.row_bodies import read_together

Done = Callable[[Reply], None]
Read = Callable[[HttpCall, Done], tuple[Question, lane.Done]]
"""A call by the ordinary way: what is asked, and where the answer goes; it may raise."""


class UnreadTicket(Ticket):
    """A call of one row in line that is not read yet."""

    __slots__ = ("alike", "call", "reply")

    def __init__(self, call: HttpCall, alike: Any, reply: Done, since_s: float) -> None:
        """Those of which `alike` is the same object are read together."""
        self.question, self.rows, self.left = None, 1, False  # as `Ticket`'s own, but for `done`, which would hold it
        self.since_s, self.expires_s = since_s, math.inf
        self.call, self.alike, self.reply = call, alike, reply

    def done(self, answer: Answer | Exception) -> None:
        """Tell the caller of an error; its answer comes by another ticket."""
        assert isinstance(answer, Exception)
        self.reply(failure(answer, self.call.model))


class KnownTicket(UnreadTicket):
    """One whose body has a known form."""

    __slots__ = ()
    alike: BodyForm


class RowTicket(UnreadTicket):
    """One whose body is a row in JSON, for a model."""

    __slots__ = ()
    alike: ModelSpec


def gather(batch: Iterable[Ticket], read: Read) -> list[Ticket]:
    """The batch, tickets that are read together one after the other, in the order of the first of each."""
    groups: dict[int, list[Any]] = {}
    found: list[Ticket | list[Any]] = []
    for ticket in batch:
        if not isinstance(ticket, UnreadTicket):
            found.append(ticket)
        elif (group := groups.get(id(ticket.alike))) is not None:
            group.append(ticket)
        else:
            groups[id(ticket.alike)] = group = [ticket]
            found.append(group)
    return [t for one in found for t in (_read_group(one, read) if isinstance(one, list) else [one])]


def _read_group(group: list[Any], read: Read) -> list[Ticket]:
    return _as_one(group, read) if isinstance(group[0], KnownTicket) else _each(group, read)


def _each(group: list[RowTicket], read: Read) -> list[Ticket]:
    """Rows of one model."""
    spec = group[0].alike
    rows = read_together([t.call.body for t in group], spec, time.time_ns() // 1000)
    found = []
    for ticket, row in zip(group, rows, strict=True):
        if row is None:
            one = _ordinary(ticket, read)
        else:
            answered = partial(finish, partial(write_rows, spec), _unless_left(ticket))
            one = Ticket(question_of_rows(row), answered, ticket.since_s)
        if one is not None:
            found.append(one)
    return found


def _unless_left(ticket: UnreadTicket) -> Done:
    return lambda reply: None if ticket.left else ticket.reply(reply)


def _as_one(group: list[KnownTicket], read: Read) -> list[Ticket]:
    form = group[0].alike
    x, certain = form.read([t.call.body for t in group])
    others: list[Ticket] = []
    if not certain.all():
        odd = [t for t, fine in zip(group, certain, strict=True) if not fine]
        others = [found for ticket in odd if (found := _ordinary(ticket, read)) is not None]
        group, x = [t for t, fine in zip(group, certain, strict=True) if fine], x[certain]
        if not group:
            return others
    question = question_of(x, time.time_ns() // 1000)
    return [Ticket(question, partial(_spread, form, group), group[0].since_s), *others]


def _ordinary(ticket: UnreadTicket, read: Read) -> Ticket | None:
    """The same caller, its body read; None: it has its answer."""
    try:
        question, answered = read(ticket.call, _unless_left(ticket))
    except Exception as err:  # noqa: BLE001 - edge of the application
        ticket.done(err)
        return None
    return Ticket(question, answered, ticket.since_s)


def _spread(form: BodyForm, group: Sequence[KnownTicket], answer: Answer | Exception) -> None:
    """Give each caller what is its own."""
    if isinstance(answer, Answer):
        try:
            bodies = form.write(answer)
        except Exception as err:  # noqa: BLE001 - edge of the application, as where one answer is written
            answer = err
    if not isinstance(answer, Answer):
        for ticket in group:
            if not ticket.left:
                ticket.done(answer)
        return
    for row, ticket in enumerate(group):
        if ticket.left:
            continue
        if row in answer.errors:
            ticket.done(answer.errors[row])
        else:
            ticket.reply(Reply(200, bodies[row]))
