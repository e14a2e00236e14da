"""Callers in line whose bodies have a known form, brought together: one question for all of them, a row each.

Invariant: each of them gets what it would have got alone. What its form can not read goes the ordinary way, and a row
that fails is that caller's error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from raymill.actors import lane
from raymill.actors.answering import HttpCall, failure
from raymill.actors.asgi import Reply
from raymill.actors.known_bodies import BodyForm, question_of
from raymill.actors.lane import Ticket
from raymill.actors.models import Answer, Question

Done = Callable[[Reply], None]
Read = Callable[[HttpCall, Done], tuple[Question, lane.Done]]
"""A call by the ordinary way: what is asked, and where the answer goes; it may raise."""


class KnownTicket(Ticket):
    """A call in line that is not read yet, for its body has a known form."""

    __slots__ = ("call", "form", "reply")

    def __init__(self, call: HttpCall, form: BodyForm, reply: Done, since_s: float) -> None:
        self.question, self.rows, self.left = None, 1, False  # as `Ticket`'s own, but for `done`, which would hold it
        self.since_s, self.expires_s = since_s, math.inf
        self.call, self.form, self.reply = call, form, reply

    def done(self, answer: Answer | Exception) -> None:
        """Tell the caller of an error; its answer comes by its group."""
        assert isinstance(answer, Exception)
        self.reply(failure(answer, self.call.model))


def gather(batch: Iterable[Ticket], read: Read) -> list[Ticket]:
    """The batch, tickets of one known form as one, in the order of the first of each."""
    groups: dict[int, list[KnownTicket]] = {}
    found: list[Ticket | list[KnownTicket]] = []
    for ticket in batch:
        if not isinstance(ticket, KnownTicket):
            found.append(ticket)
        elif (group := groups.get(id(ticket.form))) is not None:
            group.append(ticket)
        else:
            groups[id(ticket.form)] = group = [ticket]
            found.append(group)
    return [t for one in found for t in (_as_one(one, read) if isinstance(one, list) else [one])]


def _as_one(group: list[KnownTicket], read: Read) -> list[Ticket]:
    form = group[0].form
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


def _ordinary(ticket: KnownTicket, read: Read) -> Ticket | None:
    """The same caller, its body read; None: it has its answer."""
    try:
        question, answered = read(ticket.call, lambda reply: None if ticket.left else ticket.reply(reply))
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
