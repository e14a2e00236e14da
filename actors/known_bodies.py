"""Bodies of infer requests that differ from one known before in their numbers alone: read, and answered, many at once.

Callers of one kind send the same JSON again and again around other numbers. Such a form is learned from a body that the
ordinary way has read; a body of a known form is cut in the middle, its numbers go through one kernel with those of the
other callers, and its answer is put together from pieces that the ordinary way wrote.

Invariant: question and answer are those of the ordinary way, byte by byte; whatever is not certain goes that way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import orjson

from raymill.actors import oip
from raymill.actors.models import Answer, Question
from raymill.actors.number_text import read_rows
from raymill.actors.oip import Infer
from raymill.actors.rollout import ModelSpec
from raymill.runtime.errors import RaymillError
from raymill.runtime.ids import new_ids

F32 = npt.NDArray[np.float32]

MOST_FORMS = 8
"""Forms of one model that are known at once; the one known longest goes first."""
_TRIED_AT_ONCE, _TRIED_EACH = 16, 256
"""So many bodies of no known form are looked at, then each so many-th: a caller may put a name into each of them."""
_LONGEST = 64 << 10
"""Bytes of a body that is looked at."""
_NUMBERS = re.compile(rb"\[(\s*-?[0-9][-+0-9.eE,\s]*)\]")
_NAME = "0" * 26
_VALUE = 0.12345000356435776  # a float32, so that it is written as it stands here
_VERSION = 987654321


@dataclass(frozen=True, slots=True)
class BodyForm:
    """What stands around the numbers of one row."""

    spec: ModelSpec
    before: bytes
    after: bytes
    request_id: str | None
    _pieces: dict[int, tuple[bytes, bytes, bytes]] = field(default_factory=dict)
    """Version → the answer up to the prediction's id, up to the values, and its end."""

    def holds(self, body: bytes) -> bool:
        """Whether the body begins and ends so; its middle may yet be anything."""
        return (
            body.startswith(self.before)
            and body.endswith(self.after)
            and len(body) >= len(self.before) + len(self.after)
        )

    def read(self, bodies: Sequence[bytes]) -> tuple[F32, npt.NDArray[np.bool_]]:
        """Numbers [bodies, n], and [bodies] whether each was read: what was not is to go the ordinary way."""
        ends = np.fromiter(map(len, bodies), np.int64, len(bodies)).cumsum()
        starts = np.zeros(len(bodies), np.int64)
        starts[1:] = ends[:-1]
        x = np.empty((len(bodies), len(self.spec.inputs)), np.float32)
        certain = np.empty(len(bodies), np.bool_)
        text = np.frombuffer(bodies[0] if len(bodies) == 1 else b"".join(bodies), np.uint8)
        read_rows(text, starts + len(self.before), ends - len(self.after), x, certain)
        return x, certain

    def write(self, answer: Answer) -> list[bytes]:
        """The body of the answer for each row, which is a caller's."""
        text = orjson.dumps(answer.p.astype(np.float64).tolist())
        values = text[1:-1].split(b",") if answer.p.ndim == 1 else text[2:-2].split(b"],[")
        versions = answer.versions.tolist()
        written = []
        for name, value, version in zip(answer.ids, values, versions, strict=True):
            pieces = self._pieces.get(version)
            if pieces is None:
                pieces = self._pieces[version] = self._pieces_of(version, answer.p.shape[1:])
            written.append(b"%b%b%b%b%b" % (pieces[0], name.encode(), pieces[1], value, pieces[2]))
        return written

    def _pieces_of(self, version: int, form: tuple[int, ...]) -> tuple[bytes, bytes, bytes]:
        infer = Infer(np.empty((1, 0), np.float32), [_NAME], _NAME, self.request_id, binary=False)
        p = np.full((1, *form), _VALUE, np.float32)
        whole, _ = oip.write_infer(self.spec, infer, version, p)
        begin, _, rest = whole.rpartition(b'{"prediction_id":"%b"}' % _NAME.encode())
        between, _, end = rest.rpartition(orjson.dumps([_VALUE] * p.size))
        return begin + b'{"prediction_id":"', b'"}' + between + b"[", b"]" + end


class KnownBodies:
    """The forms of one model."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._forms: list[BodyForm] = []
        self._unknown = 0

    def fits(self, spec: ModelSpec) -> bool:
        """Whether the model is still what the forms were learned for."""
        return (spec.name, spec.label, spec.inputs) == (self.spec.name, self.spec.label, self.spec.inputs)

    def find(self, body: bytes) -> BodyForm | None:
        """The form that the body may have."""
        for form in self._forms:
            if form.holds(body):
                return form
        return None

    def learn(self, body: bytes) -> None:
        """Learn the form of a body that the ordinary way has read, if it has one that can be known again."""
        self._unknown += 1
        if len(body) > _LONGEST or (self._unknown > _TRIED_AT_ONCE and self._unknown % _TRIED_EACH):
            return
        form = next(_forms_of(body, self.spec), None)
        if form is not None and all((form.before, form.after) != (f.before, f.after) for f in self._forms):
            self._forms = [*self._forms, form][-MOST_FORMS:]


def _forms_of(body: bytes, spec: ModelSpec) -> Iterator[BodyForm]:
    """Lists of numbers in the body that are, and alone are, the tensor's one row."""
    width = len(spec.inputs)
    for found in _NUMBERS.finditer(body):
        if found[1].count(b",") != width - 1:
            continue
        before, after = body[: found.start(1)], body[found.end(1) :]
        read = partial(_read_other, before, after, spec)
        infers = [read(other) for other in (np.arange(1, width + 1), -np.arange(width, 2 * width))]
        first = infers[0]
        if first is None or None in infers or first.binary:
            continue
        yield BodyForm(spec, before, after, first.request_id)


def _read_other(before: bytes, after: bytes, spec: ModelSpec, numbers: npt.NDArray[np.int64]) -> Infer | None:
    """The request with other numbers, if it is of one row, which holds just these."""
    try:
        infer = oip.read_infer(before + ",".join(map(str, numbers.tolist())).encode() + after, None, spec)
    except RaymillError:
        return None
    return infer if np.array_equal(infer.x, numbers.astype(np.float32)[np.newaxis]) else None


def question_of(x: F32, now_us: int) -> Question:
    """The rows of several callers, one each."""
    rows = len(x)
    return Question(
        ids=new_ids(rows),
        at=np.full(rows, now_us, dtype=np.int64),
        keys=[None] * rows,
        texts=[None] * rows,
        x=x,
        apart=True,
    )
