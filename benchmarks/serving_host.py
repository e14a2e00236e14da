"""A Ray cluster with registry and Serve for benchmarks, as `raymill up` sets Serve up; one process.

Run with a home folder, the dashboard's port and model files, which become the versions 1, 2, … of the model `bench`;
prints one JSON line when it is up. Each line of its standard input is a call of the actor `records`, `[method,
arguments, named arguments]` in JSON, answered by a line; it ends when that closes.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import serve

from raymill.runtime.records import NAME, RecordsActor
from raymill.runtime.spawn import find, spawn


def started(home: str, dashboard_port: int) -> Any:
    """A cluster's actor `records`; the cluster is of this process."""
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=True,
        dashboard_port=dashboard_port,
        object_store_memory=200 << 20,
        log_to_driver=False,
    )
    spawn(RecordsActor, home, name=NAME)
    return find(NAME)


def answer_calls(records: Any) -> None:
    """Answer the calls on standard input until it closes; then end Serve and the cluster."""
    for line in sys.stdin:
        method, arguments, named = json.loads(line)
        answer = ray.get(getattr(records, method).remote(*arguments, **named))
        print(json.dumps([asdict(v) for v in answer] if isinstance(answer, list) else asdict(answer)), flush=True)
    serve.shutdown()
    ray.shutdown()


def main(home: str, dashboard_port: int, models: list[Path]) -> None:
    records = started(home, dashboard_port)
    versions = [
        ray.get(records.register.remote("bench", "model", path.read_bytes(), None, path.name, {}, 0.5))
        for path in models
    ]
    print(json.dumps({"digests": [v.digest for v in versions]}), flush=True)
    answer_calls(records)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [Path(a) for a in sys.argv[3:]])
