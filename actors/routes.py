"""The paths of the endpoint on the ASGI lane: what is asked of which part of a replica.

To predict is the one thing that the fast lane and gRPC do as well, with the same answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any

from raymill.actors import answering, asgi, feature_answers, oip, openapi, wire
from raymill.actors.answering import version_of
from raymill.actors.asgi import Reply, Request
from raymill.actors.model_set import ModelSet
from raymill.actors.models import LoadedModel
from raymill.actors.predictions import PredictionLog
from raymill.actors.readings import Readings
from raymill.actors.version_health import Report
from raymill.runtime.errors import NoSuchPath, WrongMethod

Predict = Callable[[Request, str, bool, str | None], Awaitable[Reply]]
"""Request, model, whether it is a tensor, version in the path → answer."""

PATHS = [
    "GET /docs",
    "GET /openapi.json",
    "POST /predict/{model}",
    "GET /v2",
    "GET /v2/health/live",
    "GET /v2/health/ready",
    "GET /v2/models/{model}[/versions/{version}]",
    "GET /v2/models/{model}[/versions/{version}]/ready",
    "POST /v2/models/{model}[/versions/{version}]/infer",
    "GET /raymill/models",
    "GET /raymill/drift",
    "GET /raymill/cost",
    "GET /raymill/status",
    "GET /raymill/lineage/{prediction}",
    "GET /raymill/features[?name=|text=&tag=&owner=&column=]",
    "GET /raymill/feature-lineage?column=|model=[&version=]",
    "GET /raymill/freshness[?model=&at=]",
    "GET /raymill/consistency[?model=]",
    "GET /raymill/replica",
    "GET /raymill/replicas",
    "POST /raymill/features/{model}[?ages=1]",
    "POST /raymill/flush",
    "GET /healthz",
]


class Routes:
    """Finds who answers a request."""

    def __init__(
        self,
        models: ModelSet,
        readings: Readings,
        log: PredictionLog,
        *,
        predict: Predict,
        reports: Callable[[], list[Report]],
        state: Callable[[], dict[str, Any]],
        thread: Executor,
    ) -> None:
        """`reports` tells of every replica, `state` of this one; `thread` is where models and their features run."""
        self._models, self._readings, self._log = models, readings, log
        self._predict, self._reports, self._state, self._thread = predict, reports, state, thread

    async def reply(self, request: Request) -> Reply:
        """The answer to a request.

        Raises:
            RaymillError: what its caller is to be told instead.
        """
        match request.parts:
            case ("predict", name):
                return await self._call(request, name, infer=False)
            case ("v2", *rest):
                return await self._oip(request, tuple(rest))
            case ("raymill", *rest):
                return await self._manage(request, tuple(rest))
            case ("openapi.json",) if _only(request, "GET"):
                return asgi.json_reply(openapi.document(m.spec for m in self._models.models.values()))
            case ("docs",) if _only(request, "GET"):
                return Reply(200, openapi.page(), openapi.PAGE_TYPE, openapi.PAGE_HEADERS)
            case ("healthz",):
                return asgi.json_reply({"status": "ok"})
            case ("",):
                return asgi.json_reply({"name": "raymill", "version": oip.VERSION, "paths": PATHS})
        raise NoSuchPath(f"there is nothing at {'/' + '/'.join(request.parts)!r}")

    async def _oip(self, request: Request, parts: tuple[str, ...]) -> Reply:
        match parts:
            case () if _only(request, "GET"):
                return asgi.json_reply(oip.server_metadata())
            case ("health", "live") if _only(request, "GET"):
                return asgi.json_reply({"live": True})
            case ("health", "ready") if _only(request, "GET"):
                return asgi.json_reply({"ready": self._models.is_ready}, 200 if self._models.is_ready else 400)
            case ("models", name):
                return self._metadata(request, name, None)
            case ("models", name, "ready"):
                return self._ready(request, name, None)
            case ("models", name, "infer"):
                return await self._call(request, name, infer=True)
            case ("models", name, "versions", version):
                return self._metadata(request, name, version)
            case ("models", name, "versions", version, "ready"):
                return self._ready(request, name, version)
            case ("models", name, "versions", version, "infer"):
                return await self._call(request, name, infer=True, version=version)
        raise NoSuchPath(f"there is nothing at {'/v2/' + '/'.join(parts)!r}")

    def _metadata(self, request: Request, name: str, version: str | None) -> Reply:
        _only(request, "GET")
        model = self._models.with_version(name, version)
        document = oip.model_metadata(model.spec, sorted(model.programs))
        if failed := self._models.failures.get(name, {}):
            document["failed"] = {str(v): why for v, why in failed.items()}
        return asgi.json_reply(document)

    def _ready(self, request: Request, name: str, version: str | None) -> Reply:
        _only(request, "GET")
        ready = self._models.named(name).is_ready(version_of(version))
        return asgi.json_reply({"name": name, "ready": ready}, 200 if ready else 400)

    async def _manage(self, request: Request, parts: tuple[str, ...]) -> Reply:
        loop = asyncio.get_running_loop()
        match parts:
            case ("replica",):
                return asgi.json_reply(self._state())
            case ("replicas",) if _only(request, "GET"):
                found = await loop.run_in_executor(None, self._reports)
                return asgi.json_reply({"replicas": [r.to_json() for r in found]})
            case ("flush",) if _only(request, "POST"):
                taken = await loop.run_in_executor(None, self._log.flush)
                return asgi.json_reply({**self._state(), "flushed": taken})
            case ("features", name) if _only(request, "POST"):
                return await self._features(request, self._models.named(name))
            case ("lineage", prediction) if _only(request, "GET"):
                await loop.run_in_executor(None, self._log.flush)  # it may have been answered a moment ago
                return asgi.json_reply(await loop.run_in_executor(None, self._readings.lineage, prediction))
            case (what,) if (reading := self._readings.find(what)) is not None and _only(request, "GET"):
                return asgi.json_reply(await loop.run_in_executor(None, reading, request.query))
        raise NoSuchPath(f"there is nothing at {'/raymill/' + '/'.join(parts)!r}")

    async def _features(self, request: Request, model: LoadedModel) -> Reply:
        """Feature vectors of rows, as an Arrow stream."""
        ages = feature_answers.wants_ages(request.query)
        rows = answering.rows_of(request.body, request.headers, model.spec, time.time_ns() // 1000)
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, feature_answers.features_of, model, rows, ages)
        return Reply(200, wire.write_stream(found), content_type=wire.ARROW_STREAM)

    async def _call(self, request: Request, name: str, *, infer: bool, version: str | None = None) -> Reply:
        _only(request, "POST")
        return await self._predict(request, name, infer, version)


def _only(request: Request, method: str) -> bool:
    if request.method != method:
        wrong = WrongMethod(f"{'/' + '/'.join(request.parts)!r} takes {method}, not {request.method}")
        wrong.allow = method
        raise wrong
    return True
