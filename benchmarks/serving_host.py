"""A Ray cluster with registry and Serve for benchmarks, as `raymill up` sets Serve up; one process.

Run with a home folder, the dashboard's port and model files, which become the versions 1, 2, … of the model `bench`;
prints one JSON line when it is up. Each line of its standard input is a call of the actor `records`, `[method,
arguments, named arguments]` in JSON, answered by a line; it ends when that closes.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import ray
from ray import serve

from raymill.runtime.records import NAME, RecordsActor
from raymill.runtime.spawn import find, spawn


def main(home: str, dashboard_port: int, models: list[Path]) -> None:
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=True,
        dashboard_port=dashboard_port,
        object_store_memory=200 << 20,
        log_to_driver=False,
    )
    spawn(RecordsActor, home, name=NAME)
    records = find(NAME)
    versions = [
        ray.get(records.register.remote("bench", "model", path.read_bytes(), None, path.name, {}, 0.5))
        for path in models
    ]
    print(json.dumps({"digests": [v.digest for v in versions]}), flush=True)
    for line in sys.stdin:
        method, arguments, named = json.loads(line)
        answer = ray.get(getattr(records, method).remote(*arguments, **named))
        print(json.dumps([asdict(v) for v in answer] if isinstance(answer, list) else asdict(answer)), flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [Path(a) for a in sys.argv[3:]])
