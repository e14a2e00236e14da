"""A Ray cluster with dashboard, token and Serve's proxy in a process of its own, for the tests beside it.

Run with a home folder; prints one JSON line when it is up. Each line of its standard input is a call of the actor
`records`, `[method, arguments, named arguments]` in JSON, answered by a line; it ends when that closes.
"""

import io
import json
import sys

import ray
import torch

from benchmarks.serving_host import answer_calls, started
from raymill.actors.envelope import Envelope, pack

CODE = """
import time
import numpy as np

SQUARE = np.ones((128, 128), np.float32)

def slow(x):
    "Ten milliseconds a row, on the core; others may go on meanwhile."
    end = time.thread_time() + 0.01 * len(x)
    while time.thread_time() < end:
        SQUARE @ SQUARE
    return np.nan_to_num(x[:, 0])

def ill(x):
    "Answers the trial rows only."
    if np.nan_to_num(x).max() > 100:
        raise RuntimeError("its memory is gone")
    return np.nan_to_num(x[:, 0])
"""


DEADLY = "import os\nos.abort()"
"""Ends the process that loads it, as a crash in native code does."""


class Constant(torch.nn.Module):
    """Answers with a number that tells versions apart, plus a little of the input."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value + 0.001 * torch.tanh(torch.nan_to_num(x).sum(dim=1))


class Failing(Constant):
    """As above for the trial rows; for others it raises (1), is not finite (2), or takes 0.1 s or more (3)."""

    def __init__(self, value: float, how: int) -> None:
        super().__init__(value)
        self.how = how
        self.table = torch.nn.Embedding(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        others = torch.nan_to_num(x).sum(dim=1) > 100
        p = super().forward(x)
        if self.how == 1:
            return p + 0 * self.table(others.long() * 9).sum(dim=1)
        if self.how == 2:
            return torch.where(others, torch.nan, p)
        square = torch.ones(1200, 1200) * torch.nan_to_num(x).mean()
        for _ in range(6):
            square = torch.tanh(square @ square)
        return p + 0 * square.mean()


def exported(module: torch.nn.Module, inputs: int) -> bytes:
    example = torch.zeros(4, inputs)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    out = io.BytesIO()
    torch.export.save(program, out)
    return out.getvalue()


def main(home: str, dashboard_port: int) -> None:
    records = started(home, dashboard_port)
    programs = {
        "taxi": [
            exported(Constant(0.1), 2),
            exported(Constant(0.2), 2),
            b"no program",
            pack(Envelope(form="code", target="code:ask", source=DEADLY)),
        ],
        "bus": [exported(Constant(0.1), 2), *(exported(Failing(how / 10, how % 4), 2) for how in (1, 2, 3, 5))],
        **{name: [pack(Envelope(form="code", target=f"code:{name}", source=CODE))] for name in ("slow", "ill")},
    }
    digests = {
        model: [
            ray.get(records.register.remote(model, "model", program, None, f"t{number}", {}, 0.5)).digest
            for number, program in enumerate(found, start=1)
        ]
        for model, found in programs.items()
    }
    print(json.dumps({"digests": digests, "metrics_port": ray.nodes()[0]["MetricsExportPort"]}), flush=True)
    answer_calls(records)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
