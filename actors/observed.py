"""What was predicted and what came of it: the drift monitor's window, as compact numpy arrays by period.

Invariants: what a query gives depends only on the set of rows that was added, not on their order or on how often
they came: predictions are told apart by id (the first by wall time stands), labels by row key (of its versions the
newest that is known stands). A label counts from the moment at which it became known, never before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raymill.actors.evaluate import moments
from raymill.runtime.spec import Source

COLUMNS = ("id", "model", "version", "role", "at", "key", "x", "p", "wall_s")
"""Columns of a prediction that are read."""

NEVER = np.iinfo(np.int64).max
"""Moment of a label that never becomes known."""

_UNASKED = "shadow"
"""Role of a prediction that answered nobody."""

_LABEL = np.dtype([("key", np.uint64), ("known_at", np.int64), ("y", np.float32)])


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Predictions, each once, ordered by id: arrays of one length."""

    id: NDArray[np.uint64]
    """Hash of the prediction's id."""
    key: NDArray[np.uint64]
    """Hash of the row key; 0: it has none."""
    at: NDArray[np.int64]
    """Event time, µs UTC."""
    version: NDArray[np.int32]
    """Version that answered."""
    wall_s: NDArray[np.float64]
    """Wall time of the answer."""
    p: NDArray[np.float32]
    """The answer; NaN: none."""
    x: NDArray[np.float32]
    """[rows, features] what was looked up."""
    y: NDArray[np.float32]
    """Label, 0 or 1; NaN: not known at the moment asked for."""

    def __len__(self) -> int:
        return len(self.id)

    def where(self, mask: NDArray[np.bool_] | NDArray[np.int64]) -> Rows:
        """The rows of a mask, or at these positions."""
        return Rows(*(getattr(self, name)[mask] for name in self.__slots__))

    @property
    def labelled(self) -> Rows:
        """Those whose label is known."""
        return self.where(np.isfinite(self.y))


class Observed:
    """Predictions and labels of the last `periods` periods; not safe for several threads."""

    def __init__(self, features: int, period_us: int, *, sample: float = 1.0, periods: int = 12) -> None:
        self._features = features
        self._period_us = period_us
        self._sample = sample
        self._periods = periods
        self._predictions: dict[int, list[Rows]] = {}
        self._labels: NDArray[np.void] = np.empty(0, _LABEL)
        self._new_labels: list[NDArray[np.void]] = []
        self.strange = 0
        """Predictions left out because their vector has another number of features."""

    def add_predictions(self, predictions: pa.Table) -> int:
        """Take in predictions; returns how many were kept (sampled, asked for, of the right width)."""
        fits = pc.equal(pc.list_value_length(predictions.column("x")), self._features)
        self.strange += predictions.num_rows - (pc.sum(fits).as_py() or 0)
        asked = pc.not_equal(predictions.column("role"), _UNASKED)
        predictions = predictions.filter(pc.and_(fits, asked))
        rows = self._compact(predictions)
        if self._sample < 1:
            rows = rows.where((rows.id >> np.uint64(11)) * 2.0**-53 < self._sample)
        period = rows.at // self._period_us
        for number in np.unique(period).tolist():
            self._predictions.setdefault(number, []).append(rows.where(period == number))
        self._forget()
        return len(rows)

    def add_labels(self, keys: Iterable[str], y: NDArray[np.float64], known_at: NDArray[np.int64]) -> int:
        """Take in labels by key text, NaN where a version takes one back; returns how many there are in them."""
        labels = np.empty(len(y), _LABEL)
        labels["key"], labels["known_at"], labels["y"] = _hashes(keys), known_at, y
        self._new_labels.append(labels[known_at != NEVER])
        return int((np.isfinite(y) & (known_at != NEVER)).sum())

    def rows(self, start_at: int, end_at: int, known_until: int) -> Rows:
        """Predictions with `start_at` ≤ at < `end_at`, with the labels that were known at `known_until`."""
        first, last = start_at // self._period_us, (end_at - 1) // self._period_us
        parts = [r for n, found in self._predictions.items() if first <= n <= last for r in found]
        rows = _joined(parts) if parts else self._none()
        rows = rows.where((rows.at >= start_at) & (rows.at < end_at))
        order = np.lexsort((rows.version, rows.wall_s, rows.id))
        rows = rows.where(order)
        rows = rows.where(np.diff(rows.id, prepend=np.uint64(0)) != 0)
        rows.y[:] = self._known(rows.key, known_until)
        return rows

    @property
    def oldest_at(self) -> int | None:
        """Event time of the oldest prediction in the window; None: it is empty."""
        return min((int(r.at.min()) for found in self._predictions.values() for r in found if len(r)), default=None)

    def _known(self, keys: NDArray[np.uint64], known_until: int) -> NDArray[np.float32]:
        if self._new_labels:
            labels = np.concatenate([self._labels, *self._new_labels])
            labels = labels[np.lexsort((labels["y"], labels["known_at"], labels["key"]))]
            again = (labels["key"][1:] == labels["key"][:-1]) & (labels["known_at"][1:] == labels["known_at"][:-1])
            self._labels, self._new_labels = labels[np.r_[True, ~again][: len(labels)]], []
        labels, y = self._labels, np.full(len(keys), np.nan, np.float32)
        place = np.searchsorted(labels["key"], keys, side="right") - 1
        row = np.flatnonzero(place >= 0)
        while len(row):  # from the last version back to one that is known; hardly ever twice
            there = labels[place[row]]
            mine = there["key"] == keys[row]
            known = there["known_at"] <= known_until
            y[row[mine & known]] = there["y"][mine & known]
            row = row[mine & ~known]
            place[row] -= 1
            row = row[place[row] >= 0]
        return y

    def _compact(self, predictions: pa.Table) -> Rows:
        x = pc.list_flatten(predictions.column("x")).cast(pa.float32())
        keys = predictions.column("key").to_pylist()
        p = predictions.column("p").cast(pa.float32())
        return Rows(
            id=np.maximum(_hashes(predictions.column("id").to_pylist()), np.uint64(1)),
            key=np.where([k is None for k in keys], np.uint64(0), _hashes(k or "" for k in keys)),
            at=moments(predictions.column("at"), null=0),
            version=predictions.column("version").cast(pa.int32()).to_numpy(),
            wall_s=predictions.column("wall_s").cast(pa.float64()).to_numpy(),
            p=pc.fill_null(p, float("nan")).to_numpy(),
            x=pc.fill_null(x, float("nan")).to_numpy().reshape(predictions.num_rows, self._features),
            y=np.full(predictions.num_rows, np.nan, np.float32),
        )

    def _none(self) -> Rows:
        return Rows(
            id=np.empty(0, np.uint64),
            key=np.empty(0, np.uint64),
            at=np.empty(0, np.int64),
            version=np.empty(0, np.int32),
            wall_s=np.empty(0, np.float64),
            p=np.empty(0, np.float32),
            x=np.empty((0, self._features), np.float32),
            y=np.empty(0, np.float32),
        )

    def _forget(self) -> None:
        oldest = max(self._predictions, default=0) - self._periods
        for number in [n for n in self._predictions if n <= oldest]:
            del self._predictions[number]


def key_texts(rows: pa.Table, source: Source) -> list[str]:
    """Key of each row as it stands in the prediction log: a JSON list of the key's values, timestamps in µs."""
    columns = []
    for name in source.key:
        column = rows.column(name)
        is_moment = pa.types.is_timestamp(column.type)
        columns.append((moments(column, null=0).tolist()) if is_moment else column.to_pylist())
    return [orjson.dumps(row).decode() for row in zip(*columns, strict=True)]


def _joined(parts: list[Rows]) -> Rows:
    return Rows(*(np.concatenate([getattr(p, name) for p in parts]) for name in Rows.__slots__))


def _hashes(texts: Iterable[str]) -> NDArray[np.uint64]:
    # A salt of its own: versions are chosen by a hash of the id too, and a sample must not prefer one of them.
    digests = b"".join(hashlib.blake2b(t.encode(), digest_size=8, person=b"drift").digest() for t in texts)
    return np.frombuffer(digests, np.uint64)
