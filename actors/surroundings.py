"""What a replica reaches outside itself: exported programs, online features, the monitor; imported when first used."""

from __future__ import annotations

import sys
from typing import Any

import pyarrow as pa

from raymill.actors import model_files
from raymill.actors.model_files import Data
from raymill.actors.models import FeatureReader, Program
from raymill.actors.named_inputs import NamedInputs
from raymill.actors.rollout import ModelSpec
from raymill.runtime.errors import Unavailable
from raymill.runtime.home import Home
from raymill.runtime.spawn import ask, find
from raymill.runtime.stores import places_of

_OBSERVE_TIMEOUT_S = 30.0


def load_program(program: Data) -> Program:
    """The program of a model file of any kind."""
    return model_files.load(program).run


def open_features(home: Home, spec: ModelSpec) -> FeatureReader | None:
    """Reader of the model's online features; without a plan, of inputs that rows carry; None: it takes vectors only."""
    if spec.plan is None:
        return NamedInputs() if spec.required else None
    from raymill.actors.feature_plan import FeaturePlan
    from raymill.actors.online import OnlineReader

    return OnlineReader(places_of(home, spec.stores).online, FeaturePlan.from_json(spec.plan))


def traces_of_serve() -> Any:
    """`Traces` as Serve has set them up in this process; None: it has not."""
    serve = sys.modules.get("ray.serve._private.tracing_utils")
    if serve is None or not serve.is_tracing_enabled():
        return None
    from opentelemetry import trace

    from raymill.actors.traces import Traces

    return Traces(trace.get_tracer("raymill"))


def own_address() -> str:
    """This node's address in the cluster."""
    import ray

    return str(ray.util.get_node_ip_address())


def gauges_of_serve() -> Any:
    """Makes a gauge that carries Serve's labels of this replica; None: it is none of Serve's."""
    serve = sys.modules.get("ray.serve.context")
    if serve is None or serve._get_internal_replica_context() is None:
        return None
    from ray.serve.metrics import Gauge

    return lambda name, description, labels: Gauge(name, description, labels)


def observe(model: str, segment: str, rows: pa.Table) -> bool:
    """Show a segment to the model's monitor; False: it has none (a model served alone, a pipeline set up anew)."""
    try:
        monitor = find(f"drift/{model}")
    except Unavailable:
        return False
    ask(monitor.observe.remote(segment, rows), timeout_s=_OBSERVE_TIMEOUT_S)
    return True
