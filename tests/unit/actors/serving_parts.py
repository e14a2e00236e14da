"""Stand-ins for what a replica reaches outside itself: programs by digest, features, a sink; no Ray, no torch."""

import httpx
import numpy as np
import pyarrow as pa

from raymill.actors.rollout import ColumnForm, ModelSpec, Role, Route, to_user_config
from raymill.actors.serving import ServingReplica
from raymill.runtime.errors import UnknownEntity

COLUMNS = {
    "trip": ColumnForm("int64", False),
    "zone": ColumnForm("string", False),
    "start": ColumnForm("timestamp", False),
    "miles": ColumnForm("float64", True),
    "night": ColumnForm("bool", True),
}


def model(*routes, name="taxi", plan="plan", **changes):
    """A served model of two features; routes are (version, role, weight)."""
    fields = {
        "label": "long",
        "inputs": ("miles", "minute"),
        "routes": tuple(Route(version=v, digest=f"d{v}", role=Role(r), weight=w) for v, r, w in routes),
        "plan": plan,
        "columns": COLUMNS,
        "required": ("zone", "miles"),
        "key": ("trip",),
    }
    return ModelSpec(name=name, **(fields | changes))


class Records:
    """Digest `d3` is the program of version 3; those in `broken` do not load."""

    def __init__(self, *broken):
        self.broken = set(broken)

    def program(self, digest):
        return b"broken" if int(digest[1:]) in self.broken else digest.encode()


def load(data):
    """A program that answers version / 10 + input / 1000, so that a swapped row or version shows."""
    if data == b"broken":
        raise ValueError("damaged")
    version = int(data[1:])
    return lambda x: (version / 10 + np.nan_to_num(x[:, 0]) / 1000).astype(np.float32)


class Reader:
    """`miles` of the row and the minute of the moment; zone `nowhere` is unknown."""

    def __init__(self):
        self.batches = []

    def vectors(self, rows, at):
        self.batches.append(rows.num_rows)
        if "nowhere" in rows.column("zone").to_pylist():
            raise UnknownEntity("zone 'nowhere' was never seen")
        miles = rows.column("miles").cast(pa.float32()).to_numpy(zero_copy_only=False)
        return np.column_stack([miles, (at // 60_000_000 % 60).astype(np.float32)])


class ListSink:
    """Keeps what is shipped; `fails` ships raise first."""

    def __init__(self, fails=0):
        self.segments, self.fails = {}, fails

    def ship(self, segment, rows):
        if self.fails:
            self.fails -= 1
            raise OSError("the sink is away")
        self.segments[segment] = rows

    def rows(self):
        return [r for t in self.segments.values() for r in t.to_pylist()]


async def replica(home, *specs, records=None, sink=None, reader=None):
    """A started replica with these models."""
    found = ServingReplica(
        home,
        records=records or Records(),
        sink=sink or ListSink(),
        open_reader=lambda s: None if s.plan is None else reader or Reader(),
        load=load,
    )
    found.start()
    await found.reconfigure(to_user_config(specs))
    return found


def http(found):
    """A client of the replica's ASGI application, in this process."""
    app = found.__serve_build_asgi_app__()
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://replica")
