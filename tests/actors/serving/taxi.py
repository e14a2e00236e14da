"""What the tests of the served endpoint share: its model, its host's records, callers, and what was counted."""

import threading
import time

import httpx
import pyarrow as pa

from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.rollout import ColumnForm, ModelSpec, Role, Route
from raymill.cluster.environment import kernels_version
from raymill.runtime import Col, FeatureView, OnDemand, Source, col
from raymill.runtime.client import Client

AT = 1_367_000_000_000_000
TRIPS = Source(
    "trips",
    key=["trip"],
    time="start",
    schema={"trip": Col("int64"), "zone": Col("string"), "start": Col("timestamp"), "miles": Col("float64")},
)
VIEWS = [
    FeatureView("zone", TRIPS, entity="zone", features={"miles_1d": col("miles").mean("1d")}),
    OnDemand("trip", features={"miles": col("miles") * 1.0}),
]
PLAN = FeaturePlan.of_views(VIEWS, TRIPS, name="taxi")


def spec(digests, **weights):
    """`spec(digests, v1=1.0)`: the model with these versions and weights."""
    routes = [
        Route(version=int(v[1:]), digest=digests[int(v[1:]) - 1], role=Role.LIVE, weight=w) for v, w in weights.items()
    ]
    return ModelSpec(
        name="taxi",
        label="long",
        inputs=PLAN.names,
        routes=tuple(routes),
        plan=PLAN.to_json(),
        columns={c: ColumnForm(f.dtype, f.nullable) for c, f in TRIPS.schema.items()},
        required=PLAN.request_columns,
        key=("trip",),
    )


def trips(first, count):
    return pa.table(
        {
            "trip": pa.array(range(first, first + count)),
            "zone": ["a"] * count,
            "miles": [1.5] * count,
            "at": pa.array([AT + i for i in range(count)], pa.timestamp("us", "UTC")),
        }
    )


def compiled(home):
    """The environment of a replica that finds its kernels where `raymill up` has them."""
    return {"NUMBA_CACHE_DIR": str(home.kernels / kernels_version())}


class Load:
    """Clients that predict without pause until told to stop; every error and every answer is kept."""

    def __init__(self, url, clients=3, rows=16, pause_s=0.0):
        self.answers, self.errors, self.retried = {}, [], 0
        self._stop, self._rows, self._pause_s = threading.Event(), rows, pause_s
        self._threads = [threading.Thread(target=self._run, args=(url, n)) for n in range(clients)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, url, number):
        with Client(url) as client:
            sent = 0
            while not self._stop.wait(self._pause_s):
                try:
                    answer = client.predict("taxi", trips(1_000_000 * (number + 1) + sent, self._rows))
                    self.answers |= {r["id"]: (r["version"], r["p"]) for r in answer.to_pylist()}
                except Exception as err:  # noqa: BLE001 - the test counts them
                    self.errors.append(err)
                sent += self._rows
            self.retried += client.retried

    def wait_for(self, more):
        until = len(self.answers) + more
        end = time.monotonic() + 60
        while len(self.answers) < until and time.monotonic() < end:
            time.sleep(0.02)


def counted(endpoint, metric, label=""):
    """A counter of Serve, all its labels (or those lines that have this one) together, as Prometheus reads it."""
    lines = httpx.get(endpoint.metrics_url).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"ray_{metric}{{") and label in line)


def wait_until(so, seconds=90):
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end
        time.sleep(0.1)
