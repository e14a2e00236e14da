"""The serving replica: raw ASGI in one Ray Serve application, all models and versions inside.

A request's way: bytes → `wire`/`oip` (rows) → `lane` (waits) → `models` (features, program) → `predictions` (on
disk) → bytes. Decoding and encoding run on the event loop, the middle in one thread. `user_config` says which models
and versions there are; a change of it alone is applied beside the running traffic, in the same process.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn.config

from raymill.actors import (
    asgi,
    grpc_service,
    model_files,
    selftest,
    serve_accounts,
    surroundings,
)
from raymill.actors.answering import Call, HttpCall, failure, finish
from raymill.actors.asgi import Reply, Request
from raymill.actors.batching import Pace
from raymill.actors.door import Door
from raymill.actors.endpoint import DEPLOYMENT
from raymill.actors.fast_server import Fast
from raymill.actors.fastlane import FastLane
from raymill.actors.gathering import KnownTicket, RowTicket, gather
from raymill.actors.known_bodies import KnownBodies
from raymill.actors.lakes import Lakes
from raymill.actors.lane import Done, Lane, Ticket
from raymill.actors.load_meter import LoadMeter, as_stats
from raymill.actors.load_notes import LoadNotes
from raymill.actors.model_set import ModelSet
from raymill.actors.models import Answer, LoadedModel, Prepared, Question
from raymill.actors.predictions import PredictionLog, Sink
from raymill.actors.proxy_sockets import ProxySockets
from raymill.actors.proxy_streams import Streams
from raymill.actors.readings import Readings
from raymill.actors.replica_metrics import ReplicaMetrics
from raymill.actors.rollout import ModelSpec, from_user_config, generation
from raymill.actors.rollout_watch import Reporter
from raymill.actors.routes import Routes
from raymill.actors.row_bodies import is_one_row
from raymill.actors.shipper import Outside
from raymill.actors.version_health import Report
from raymill.runtime.api_keys import KeyPolicy
from raymill.runtime.errors import (
    RaymillError,
    Unavailable,
)
from raymill.runtime.home import Home
from raymill.runtime.ids import new_ids
from raymill.runtime.records import RemoteRecords
from raymill.runtime.stores import Stores

_log = logging.getLogger(__name__)

GC_THRESHOLD = 20_000
"""Objects between two looks for garbage: a batch makes hundreds, none of which are in circles."""
AGAIN_S = 660.0
"""After which a model is loaded again none of whose versions could be: longer than a deadly one is held back."""
SWITCH_S = 0.0005
"""For how long another thread (the log's shipping, a load) may hold Python while requests wait; its default is 5 ms."""


class ServingReplica:
    """One process of the endpoint; a plain class, wrapped for Serve by `build`."""

    def __init__(
        self,
        home: str | Path,
        *,
        records: Any = None,
        sink: Sink | None = None,
        open_reader: Any = None,
        load: Any = None,
        fast_lane: bool = True,
        keys: str = KeyPolicy.OFF,
        control: dict[str, Any] | None = None,
    ) -> None:
        """Serve gives `home`, `fast_lane`, `keys`, `control`; the others stand for actors where there is no Ray.

        `keys` is a `KeyPolicy`, `control` what `Endpoint.control` says.
        """
        self._home = Home(Path(home))
        self._records = records if records is not None else RemoteRecords()
        self.name = new_ids(1)[0]
        self._lakes = Lakes(self._home, lambda *what, **narrowed: self._records.events(*what, **narrowed))
        self._log = PredictionLog(self._home.spool, sink or Outside(self._home, self._stores), replica=self.name)
        self.models = ModelSet(
            fetch=self._records.program,
            load=load or surroundings.load_program,
            open_reader=open_reader or partial(surroundings.open_features, self._home),
            measure=len if load else model_files.footprint,
            guard=LoadNotes(self._home.loads, f"replica {self.name}").loading,
            is_busy=lambda name: name in self._lanes and self._lanes[name].is_busy,
        )
        self._reporter = Reporter(self._home, control, self.name, self._report)
        self._changing, self._changes = asyncio.Lock(), set[asyncio.Task[None]]()
        self._lanes: dict[str, Lane] = {}
        self._known: dict[str, KnownBodies] = {}
        self._load = LoadMeter()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._features = ThreadPoolExecutor(1, thread_name_prefix="features")
        # A thread that is new waits for the system's loader before it first calls Ray, holding Python: so none is
        # begun because the event loop's own are busy with a model whose libraries are being opened.
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="loading")
        self._routes = Routes(
            self.models,
            Readings(self._records, self._lakes),
            self._log,
            predict=self._call,
            reports=self._reporter.reports,
            state=self._state,
            thread=self._thread,
        )
        self._started = False
        self._metrics: ReplicaMetrics | None = None
        self.traces: Any = None
        """`Traces`, where Serve traces requests."""
        self.door = Door(KeyPolicy(keys), self._records)
        self.fast = Fast(self, serve_accounts.accounts_of, self.door.refusal)
        self.fast.reason = "" if fast_lane else "it was not asked for"
        self._streams_reason = ""
        """Why the proxy may send no streams."""
        self._sockets = ProxySockets(self.fast, os.environ)
        self._opens: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Learn what was answered lately; begin to ship the log."""
        if not self._started:
            self.door.start()
            self._log.start()
            self._started = True

    def stop(self) -> None:
        """Ship the log and end."""
        if self._started:
            self._started = False
            self._reporter.stop()
            self.door.stop()
            self._loading.shutdown(wait=False, cancel_futures=True)
            self._features.shutdown()
            self._thread.shutdown()
            self._log.stop()

    def check_health(self) -> None:
        """Called by Serve: raise to be replaced."""
        if not self._started:
            raise Unavailable("the replica is not started, or stops")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve where the number of replicas follows the load: what `autoscaling` decides by."""
        return as_stats(self._load.reading())

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Bring models and versions to `config`, beside the running traffic; what can not be loaded is told.

        Serve hides a replica from the proxy while this runs. So a change of a running replica goes on after it has
        returned: the replica's report says when it is done, and that is what a deploy waits for.

        Raises:
            SpecError: the value is not what `rollout.to_user_config` writes.
        """
        from_user_config(config)
        await asyncio.get_running_loop().run_in_executor(None, self._reporter.start)
        change = asyncio.get_running_loop().create_task(self._apply(config))
        if not self.models.generation or self._reporter.is_alone:
            await change
        else:
            self._follow(change)

    def _follow(self, change: asyncio.Task[None]) -> None:
        self._changes.add(change)
        change.add_done_callback(self._changed)

    def _changed(self, change: asyncio.Task[None]) -> None:
        self._changes.discard(change)
        if not change.cancelled() and (err := change.exception()) is not None:
            _log.error("a change of the models was not applied, and is not acknowledged", exc_info=err)

    async def _apply(self, config: Mapping[str, Any]) -> None:
        async with self._changing:
            before = self.models.models
            await asyncio.get_running_loop().run_in_executor(self._loading, self.models.apply, config)
            for name, model in self.models.models.items():
                lane = self._lane(name, model.spec)
                if name in before and before[name].programs != model.programs:
                    lane.pace = Pace()  # what was learned is of other programs
            self._reporter.now()
        if self.models.lacks:  # it may have been the memory of that moment
            asyncio.get_running_loop().call_later(AGAIN_S, self._again, config)

    def _again(self, config: Mapping[str, Any]) -> None:
        """Try once more what could not be loaded, where nothing else was told meanwhile."""
        if self._started and self.models.generation == generation(config):
            self._follow(asyncio.get_running_loop().create_task(self._apply(config)))

    async def handle_http(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """The ASGI application."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            try:
                reply = self.door.refusal_of(scope) or await self._routes.reply(await asgi.read(scope, receive))
            except RaymillError as err:
                reply = asgi.error_reply(err)
            except asgi.GoneAway:
                return
            except Exception as err:  # noqa: BLE001 - edge of the application
                reply = failure(err, str(scope.get("path")))
            await asgi.send_reply(send, reply)

    def __serve_build_asgi_app__(self) -> Any:
        async def app(scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
            await self.handle_http(scope, receive, send)

        return app  # uvicorn takes a bound method for an application of ASGI 2

    async def _lifespan(self, receive: asgi.Receive, send: asgi.Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await loop.run_in_executor(None, self.start)
                self.traces = surroundings.traces_of_serve()
                await self._open_fast_lane()
                grpc_service.answer_with(self)
                if not self.fast.reason:
                    self._opens = loop.create_task(self._open_sockets())
                if gauges := surroundings.gauges_of_serve():
                    self._metrics = ReplicaMetrics(self._load.reading, self.models.attempts.tallies, gauges)
                    self._metrics.start(loop)
                await send({"type": "lifespan.startup.complete"})
            else:
                if self._opens is not None:
                    self._opens.cancel()
                self._sockets.close()
                if self._metrics is not None:
                    self._metrics.stop()
                await loop.run_in_executor(None, self.stop)
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _open_sockets(self) -> None:
        try:
            await self._sockets.open(surroundings.own_address())
        except Exception as err:  # noqa: BLE001 - psutil, the file system: whatever breaks there, TCP goes on
            _log.warning("the proxy reaches this replica by TCP: %s: %s", type(err).__name__, err)

    async def _open_fast_lane(self) -> None:
        """Put the fast lane into the server that Serve is about to start, if it answers as this application does."""
        if not self.fast.reason:
            try:
                found = await selftest.differences(partial(ServingReplica, **selftest.stand_ins()))
            except Exception as err:  # noqa: BLE001 - whatever breaks in uvicorn's or Serve's insides
                found = selftest.Differences(f"{type(err).__name__}: {err}", "there is no fast lane")
            self.fast.reason = found.lane and f"its self-test failed: {found.lane}"
            self._streams_reason = found.streams and f"their self-test failed: {found.streams}"
        gc.collect()
        gc.freeze()  # what is here stays: no later collection goes through it, which would hold requests up
        gc.set_threshold(GC_THRESHOLD, 10, 100)
        sys.setswitchinterval(SWITCH_S)
        if self.fast.reason:
            _log.warning("the fast lane is shut, Serve's own answers: %s", self.fast.reason)
        else:
            if self._streams_reason:
                _log.warning("the proxy may send no streams: %s", self._streams_reason)
            else:
                self.fast.as_streams = partial(Streams, self.fast)
            uvicorn.config.HTTP_PROTOCOLS["auto"] = partial(FastLane, self.fast)  # type: ignore[assignment]

    def submit(self, call: Call, done: Callable[[Reply], None]) -> Ticket | None:
        """Have a call answered: `done` gets the reply on the event loop, perhaps before this returns.

        Both lanes, and gRPC, come through here. None: the reply was given already.
        """
        if self.traces is not None:
            call, done = self.traces.follow(call, done)
        try:
            model = self.models.named(call.model)
            lane = self._lanes.get(call.model) or self._lane(call.model, model.spec)
            lane.admit()  # before its body is read: whatever is spent on who is refused, others wait for
            if isinstance(call, HttpCall) and call.bare and model.ready:
                ticket = self._unread(call, done, model.spec)
                if ticket is not None:
                    return lane.stand(ticket)
            question, answered = self._read(call, done)
            return lane.submit(question, answered, call.timeout_s)
        except Exception as err:  # noqa: BLE001 - edge of the application
            done(failure(err, call.model))
            return None

    def _read(self, call: Call, done: Callable[[Reply], None]) -> tuple[Question, Done]:
        """What is asked, the ordinary way, and where the answer goes.

        Raises:
            RaymillError: as `Call.read`, or no such model or version is served.
        """
        model = self.models.named(call.model)
        question, write = call.read(model, time.time_ns() // 1000)
        model.check(question)
        return question, partial(finish, write, done)

    def _unread(self, call: HttpCall, done: Callable[[Reply], None], spec: ModelSpec) -> Ticket | None:
        """The ticket of a call that can be read with others; None: it is read at once."""
        if not call.infer:
            return RowTicket(call, spec, done, time.monotonic()) if is_one_row(call.body) else None
        known = self._known_bodies(spec)
        form = known.find(call.body)
        if form is not None:
            return KnownTicket(call, form, done, time.monotonic())
        known.learn(call.body)
        return None

    def _known_bodies(self, spec: ModelSpec) -> KnownBodies:
        known = self._known.get(spec.name)
        if known is None or not (known.spec is spec or known.fits(spec)):
            known = self._known[spec.name] = KnownBodies(spec)
        return known

    async def _call(self, request: Request, name: str, infer: bool, version: str | None) -> Reply:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        call = HttpCall(name, infer, version, request.headers, request.body)
        ticket = self.submit(call, lambda reply: None if future.done() else future.set_result(reply))
        try:
            return await future
        finally:
            if ticket is not None:
                ticket.left = True

    def _lane(self, name: str, spec: ModelSpec) -> Lane:
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = Lane(
                self._ask,
                self._thread,
                max_batch_rows=spec.max_batch_rows,
                max_rows=spec.max_queue_rows,
                meter=self._load,
                is_here=partial(self._is_here, name),
                bring_back=partial(self.models.bring_back, name),
                gather=partial(gather, read=self._read),
                prepare=partial(self._prepare, name),
                preparing=self._features,
                loading=self._loading,
            )
        lane.line.max_batch_rows, lane.line.max_rows = spec.max_batch_rows, spec.max_queue_rows
        lane.target_s = spec.p99_ms / 1000
        return lane

    def _is_here(self, name: str) -> bool:
        model = self.models.models.get(name)
        return model is None or not model.is_away

    def _prepare(self, name: str, batch: list[Question]) -> tuple[LoadedModel, list[Question], Prepared | None]:
        """The first stage of a batch: a model as it is now, and what it has looked up."""
        self.models.asked(name)
        if not self._is_here(name):  # it left between the lane's look and this one
            self.models.bring_back(name)
        model = self.models.named(name)
        return model, batch, model.prepare(batch) if self.traces is None else None

    def _ask(self, prepared: list[tuple[LoadedModel, list[Question], Prepared | None]]) -> list[Answer | RaymillError]:
        """The second stage; batches of one state of the model are one."""
        answers: list[Answer | RaymillError] = []
        for _, group in itertools.groupby(prepared, key=lambda one: id(one[0])):
            batches = list(group)
            model = batches[0][0]
            found = [p for _, _, p in batches if p is not None]
            if found:
                answers += model.score(found, self._log)
            else:
                answers += self.traces.ask(model, [q for _, batch, _ in batches for q in batch], self._log)
        return answers

    def _stores(self) -> dict[str, Stores]:
        """Where the predictions of the models go that are served here."""
        return {name: model.spec.stores for name, model in self.models.models.items()}

    def _report(self) -> Report:
        models = self.models
        return Report(
            replica=self._reporter.replica,
            generation=models.generation,
            failures=models.failures,
            roles={
                name: {r.version: str(r.role) for r in m.routes if r.role.answers and r.weight > 0}
                for name, m in models.models.items()
            },
            tallies=models.attempts.tallies(),
            benched=models.attempts.benched_by_model(),
        )

    def _state(self) -> dict[str, Any]:
        models = {
            name: {str(r.version): {"role": r.role, "weight": r.weight} for r in m.routes}
            for name, m in self.models.models.items()
        }
        return {
            "replica": self.name,
            "pid": os.getpid(),
            "generation": self.models.generation,
            "models": models,
            "failures": self.models.failures,
            "fast_lane": {"open": not self.fast.reason, "reason": self.fast.reason, "requests": self.fast.requests},
            "streams": {"open": self.fast.as_streams is not None, "reason": self._streams_reason},
            "log": {
                "waiting_rows": self._log.waiting_rows,
                "shipped_rows": self._log.shipped_rows,
                "last_error": self._log.last_error,
            },
        }


def build(args: dict[str, Any]) -> Any:
    """The Serve application, for its REST config: `import_path: raymill.actors.serving:build, args: {home: …}`."""
    from ray import serve

    return serve.deployment(serve.ingress()(ServingReplica), name=DEPLOYMENT).bind(
        args["home"],
        fast_lane=args.get("fast_lane", True),
        keys=args.get("keys", KeyPolicy.OFF),
        control=args.get("control"),
    )
