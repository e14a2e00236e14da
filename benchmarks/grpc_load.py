"""Load for gRPC endpoints: h2load sends one prepared message again and again, as a closed loop of clients."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

import grpc
import numpy as np

from benchmarks.harness import Figures, NotInstalled

METHOD = "/inference.GRPCInferenceService/ModelInfer"


def write_message(path: Path, message: bytes) -> None:
    """A message as it goes over the wire: not compressed, its length, itself."""
    path.write_bytes(b"\x00" + len(message).to_bytes(4, "big") + message)


def wait_for(address: str, message: bytes, *, seconds: float = 60) -> None:
    """Until a real client's call is answered; its last error else."""
    end = time.monotonic() + seconds
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(METHOD)
        while True:
            try:
                call(message, timeout=10, wait_for_ready=True)
            except grpc.RpcError:  # a proxy is there before the replicas that it knows of
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
            else:
                return


def h2load(address: str, body: Path, *, clients: int, seconds: float) -> Figures:
    """Requests a second, p50 and p99 in ms, of so many connections with one call under way each."""
    with tempfile.NamedTemporaryFile(prefix="h2load-") as log:
        command = ["h2load", "-t1", f"-c{clients}", "-m1", f"-D{seconds:.0f}", "--warm-up-time=1"]
        command += ["-d", str(body), "-H", "content-type: application/grpc", "-H", "te: trailers"]
        command += [f"--log-file={log.name}", f"http://{address}{METHOD}"]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except FileNotFoundError as err:
            raise NotInstalled("h2load is not installed: run `make bench-peers`") from err
        lines = np.loadtxt(log.name, dtype=np.int64, ndmin=2)
    if not len(lines) or (lines[:, 1] != 200).any():
        raise RuntimeError(f"{address} did not answer every call of {clients} clients")
    p50, p99 = np.percentile(lines[:, 2], [50, 99]) / 1e3
    return {"rps": len(lines) / seconds, "p50_ms": float(p50), "p99_ms": float(p99)}
