"""A Ray cluster with dashboard, token and Serve's proxy in a process of its own, for `test_serving.py`.

Run with a home folder; prints one JSON line when it is up, ends when its standard input closes.
"""

import io
import json
import sys

import ray
import torch
from ray import serve

from raymill.runtime.records import NAME, RecordsActor
from raymill.runtime.spawn import find, spawn


class Constant(torch.nn.Module):
    """Answers with a number that tells versions apart, plus a little of the input."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value + 0.001 * torch.tanh(torch.nan_to_num(x).sum(dim=1))


def exported(value: float, inputs: int) -> bytes:
    example = torch.zeros(4, inputs)
    program = torch.export.export(Constant(value), (example,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    out = io.BytesIO()
    torch.export.save(program, out)
    return out.getvalue()


def main(home: str, dashboard_port: int) -> None:
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
    digests = []
    for number, program in enumerate([exported(0.1, 2), exported(0.2, 2), b"no program"], start=1):
        version = ray.get(records.register.remote("taxi", "model", program, None, f"t{number}", {}, 0.5))
        digests.append(version.digest)
    print(json.dumps({"digests": digests, "metrics_port": ray.nodes()[0]["MetricsExportPort"]}), flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
