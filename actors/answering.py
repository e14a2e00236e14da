"""The requests that predict over HTTP, from body to question and from answer to body; pure, the same for every lane.

Invariant: what is answered depends on the call alone, never on the lane it came by.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from raymill.actors import asgi, oip, wire
from raymill.actors.asgi import Reply
from raymill.actors.models import Answer, LoadedModel, Question
from raymill.actors.oip import Infer
from raymill.actors.rollout import ModelSpec
from raymill.runtime.errors import RaymillError, RequestError, UnknownVersion

_log = logging.getLogger(__name__)

_SECONDS = re.compile(r"\d{1,6}(\.\d{1,6})?", re.ASCII)
Write = Callable[[Answer], Reply]
"""Writes what a caller gets."""


class Call(Protocol):
    """A request to predict, its bytes read."""

    @property
    def model(self) -> str:
        """Name of the model asked."""

    @property
    def timeout_s(self) -> float | None:
        """For how long an answer is of use; None: the caller goes away when it is not.

        Raises:
            RequestError: it is no number of seconds.
        """

    def read(self, model: LoadedModel, now_us: int) -> tuple[Question, Write]:
        """What is asked, and how to write the answer.

        Raises:
            RaymillError: this is no request for this model, or it names a version that can not be.
        """


@dataclass(slots=True)
class HttpCall:
    """A request to predict over HTTP; not frozen, since one is made for each request."""

    model: str
    """Name in the path."""
    infer: bool
    """Whether it came by `/v2/models/…/infer` (a tensor) and not by `/predict/…` (rows)."""
    version: str | None
    """Version in the path."""
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    bare: bool = False
    """Whether body and model alone say what is asked, in JSON: no header has a part in it."""

    @property
    def timeout_s(self) -> float | None:
        """Header `timeout`, as in `Call.timeout_s`."""
        text = self.headers.get("timeout")
        if text is None:
            return None
        if not _SECONDS.fullmatch(text):
            raise RequestError(f"header timeout is {text!r}: give seconds, e.g. 0.05")
        return float(text)

    def read(self, model: LoadedModel, now_us: int) -> tuple[Question, Write]:
        """As `Call.read`."""
        return _read_infer(self, model.spec, now_us) if self.infer else _read_rows(self, model.spec, now_us)


def failure(err: Exception, what: str) -> Reply:
    """What a caller is told of an error; one that is none of ours is logged with its trace."""
    if not isinstance(err, RaymillError):
        _log.error("request to %s failed", what, exc_info=err)
        err = RaymillError("the replica failed on this request: its log has the trace")
    return asgi.error_reply(err)


def finish(write: Write, done: Callable[[Reply], None], answer: Answer | Exception) -> None:
    """Give a caller its answer."""
    if isinstance(answer, Answer):
        try:
            reply = write(answer)
        except Exception as err:  # noqa: BLE001 - edge of the application
            reply = failure(err, "an answer")
    else:
        reply = failure(answer, "a batch")
    done(reply)


def rows_of(body: bytes, headers: Mapping[str, str], spec: ModelSpec, now_us: int) -> wire.Rows:
    """The rows of a body, JSON or an Arrow stream as its content type says."""
    if _is_arrow(headers):
        return wire.read_arrow(body, spec, now_us, headers.get("x-raymill-at"))
    return wire.read_json(body, spec, now_us)


def version_of(text: str | None) -> int | None:
    """The number of a version named in a path or header.

    Raises:
        UnknownVersion: it is no number of a version.
    """
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UnknownVersion(f"{text!r} names no version: versions are 1, 2, 3 …")
    return int(text)


def question_of(infer: Infer, pinned: int | None, now_us: int) -> Question:
    """The question of a request with ready features."""
    rows = len(infer.x)
    return Question(
        ids=infer.ids,
        at=np.array([now_us]) if rows == 1 else np.full(rows, now_us, dtype=np.int64),
        keys=[None] * rows,
        texts=[None] * rows,
        x=infer.x,
        pinned=pinned,
        together=True,
    )


def question_of_rows(rows: wire.Rows, pinned: int | None = None) -> Question:
    """The question of a request with rows, whose features are to be looked up."""
    return Question(
        ids=rows.ids, at=rows.at, keys=rows.keys, texts=list(rows.texts), columns=rows.columns, pinned=pinned
    )


def _is_arrow(headers: Mapping[str, str]) -> bool:
    return headers.get("content-type", "").startswith(wire.ARROW_STREAM)


def _read_rows(call: HttpCall, spec: ModelSpec, now_us: int) -> tuple[Question, Write]:
    rows = rows_of(call.body, call.headers, spec, now_us)
    question = question_of_rows(rows, version_of(call.headers.get("x-raymill-version")))
    accept = call.headers.get("accept", "")
    arrow = wire.ARROW_STREAM in accept or (_is_arrow(call.headers) and asgi.JSON not in accept)
    return question, partial(_write_arrow if arrow else write_rows, spec)


def _read_infer(call: HttpCall, spec: ModelSpec, now_us: int) -> tuple[Question, Write]:
    infer = oip.read_infer(call.body, call.headers.get("inference-header-content-length"), spec)
    pinned = version_of(call.version or call.headers.get("x-raymill-version"))
    question = question_of(infer, pinned, now_us)
    return question, partial(_write_infer, spec, infer)


def write_rows(spec: ModelSpec, answer: Answer) -> Reply:
    """The answer to rows, in JSON."""
    return Reply(200, wire.write_json(spec, answer.ids, answer.versions, answer.p))


def _write_arrow(spec: ModelSpec, answer: Answer) -> Reply:
    body = wire.write_arrow(spec, answer.ids, answer.versions, answer.p)
    return Reply(200, body, content_type=wire.ARROW_STREAM)


def _write_infer(spec: ModelSpec, infer: Infer, answer: Answer) -> Reply:
    body, json_length = oip.write_infer(spec, infer, int(answer.versions[0]), answer.p)
    if json_length is None:
        return Reply(200, body)
    length = {"inference-header-content-length": str(json_length)}
    return Reply(200, body, content_type="application/octet-stream", headers=length)
