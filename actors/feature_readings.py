"""What may be read of features: the catalogue, users, statistics, freshness, and the checks of what was served.

Each reading takes the query of a URL (or what a verb makes of its options) and gives JSON values.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from raymill.actors.lakes import Lakes
from raymill.actors.wire import parse_at
from raymill.runtime.errors import RequestError, UnknownModel
from raymill.runtime.feature_registry import JUDGED, Catalogue

Query = Mapping[str, str]


class FeatureReadings:
    """Read-only views; `records` is the records actor or what stands for it."""

    def __init__(self, records: Any, lakes: Lakes) -> None:
        self._records = records
        self._lakes = lakes

    def find(self, what: str) -> Callable[[Query], Any] | None:
        """The reading of that name, if there is one."""
        return {
            "features": self.features,
            "feature-lineage": self.lineage,
            "freshness": self.freshness,
            "consistency": self.consistency,
        }.get(what)

    def features(self, query: Query) -> Any:
        """Features that `?text=`, `tag`, `owner` and `column` fit; of `?name=` every version, with its statistics.

        Raises:
            UnknownFeature: there is no feature of that name.
        """
        catalogue = Catalogue.of(self._records)
        if "name" in query:
            found = catalogue.find(query["name"])
            return [{**v.to_json(), "statistics": catalogue.statistics(v.name, v.version)} for v in found]
        text, tag, owner, column = (query.get(k, "") for k in ("text", "tag", "owner", "column"))
        return [v.to_json() for v in catalogue.search(text, tag=tag, owner=owner, column=column)]

    def lineage(self, query: Query) -> Any:
        """What stands on `?column=`, or what the versions of `?model=` (of `&version=`) stand on.

        Raises:
            RequestError: neither is named, or the version is no number.
        """
        catalogue = Catalogue.of(self._records)
        if "column" in query:
            return catalogue.downstream(query["column"])
        if "model" in query:
            version = query.get("version")
            if version is not None and not version.isdigit():
                raise RequestError(f"{version!r} is no version: versions are 1, 2, 3 …")
            return catalogue.upstream(query["model"], None if version is None else int(version))
        raise RequestError("name what is asked for: ?column=source.column, or ?model=name")

    def freshness(self, query: Query) -> Any:
        """How fresh the rows behind the features of `?model=` (absent: each) are at `&at=`, or when it was last asked.

        Raises:
            UnknownModel: no training set of it was ever made.
        """
        return [{"model": m, **self._freshness(m, query.get("at"))} for m in self.trained(query.get("model"))]

    def consistency(self, query: Query) -> Any:
        """The checks so far, oldest first; those of `?model=`, if one is named."""
        return [e["data"] for e in self._records.events(JUDGED, pipeline=query.get("model"))]

    def trained(self, model: str | None) -> list[str]:
        """Models that a training set was made for; the one named, if it is one of them.

        Raises:
            UnknownModel: it is none of them.
        """
        known = sorted({e["pipeline"] for e in self._records.events("training_set.made")})
        if model is None:
            return known
        if model not in known:
            raise UnknownModel(f"no training set of {model!r} was ever made; there are {known}")
        return [model]

    def _freshness(self, model: str, at: str | None) -> dict[str, Any]:
        from raymill.actors.feature_plan import FeaturePlan  # its kernels are loaded by who asks for this alone
        from raymill.actors.freshness import freshness, last_asked

        made = self._records.events("training_set.made", pipeline=model)
        plan = FeaturePlan.from_json(json.dumps(made[-1]["data"]["plan"]))
        lake, now = self._lakes.of(model), time.time_ns() // 1000
        moment = last_asked(lake, model) if at is None else parse_at(None if at == "now" else at, now)
        return freshness(lake, self._lakes.places(model).online, plan, now if moment is None else moment)
