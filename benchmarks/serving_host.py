"""A Ray cluster with registry and Serve for `benchmarks.serving`, as `raymill up` sets Serve up; one process.

Run with a home folder, the dashboard's port and a model file; prints one JSON line when it is up, ends with its stdin.
"""

import json
import sys
from pathlib import Path

import ray
from ray import serve

from raymill.runtime.records import NAME, RecordsActor
from raymill.runtime.spawn import find, spawn


def main(home: str, dashboard_port: int, model: Path) -> None:
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=True,
        dashboard_port=dashboard_port,
        object_store_memory=200 << 20,
        log_to_driver=False,
    )
    spawn(RecordsActor, home, name=NAME)
    register = find(NAME).register
    version = ray.get(register.remote("bench", "model", model.read_bytes(), None, "bench", {}, 0.5))
    print(json.dumps({"digest": version.digest}), flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
