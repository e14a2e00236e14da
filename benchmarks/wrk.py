"""Load by wrk: prepared requests again and again, as a closed loop of clients or at a rate of its own.

The rate is that of many clients who each think for a random time between an answer and the next request: with far more
clients than answers under way, arrivals are as of a crowd that does not know of one another (Poisson), and a server
that stalls is asked on meanwhile. It is not exactly what was asked for; what it was is among the figures.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import Figures, NotInstalled

JSON = {"Content-Type": "application/json"}
CROWD = 400
"""Clients who make up a rate."""
LINES = ".lines"
"""How the name of a file ends of which each line is a body; any of them is sent."""
_UNIT_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


@dataclass(frozen=True)
class Post:
    """What is sent."""

    url: str
    body: Path
    headers: Mapping[str, str] = field(default_factory=lambda: dict(JSON))


def closed(post: Post, *, clients: int, seconds: float) -> Figures:
    """So many clients with one request each under way; requests a second, p50 and p99 in ms. All must be answered."""
    return _wrk(post, [], clients, seconds)


def at_rate(post: Post, *, rate: float, seconds: float) -> Figures:
    """So many requests a second, whatever the answers do; the figures of `closed`."""
    think_ms = CROWD / rate * 1e3
    tried = _wrk(post, _thinking(think_ms), CROWD, 1)
    took_ms = CROWD / tried["rps"] * 1e3 - think_ms  # what of a client's round is not thought
    return _wrk(post, _thinking(max(think_ms - took_ms, 1.0)), CROWD, seconds)


def _thinking(mean_ms: float) -> list[str]:
    lines = [f"local mean = {mean_ms:.3f}", "math.randomseed(7)"]
    return [*lines, "function delay() return math.floor(-mean * math.log(1 - math.random()) + 0.5) end"]


def _wrk(post: Post, script: list[str], clients: int, seconds: float) -> Figures:
    if shutil.which("wrk") is None:
        raise NotInstalled("wrk is not installed: run `make bench-peers`")
    lines = [f'wrk.headers["{k}"] = "{v}"' for k, v in post.headers.items()]
    lines += ['wrk.method = "POST"', *(_any_line if post.body.suffix == LINES else _whole)(post.body)]
    file = post.body.with_suffix(".lua")
    file.write_text("\n".join(lines + script))
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds:.0f}s", "--timeout", "10s", "--latency", "-s", str(file)]
    said = subprocess.run([*command, post.url], capture_output=True, text=True, check=True).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    if "Non-2xx" in said or "Socket errors" in said or rate is None:
        raise RuntimeError(f"{post.url} did not answer every request of {clients} clients:\n{said}")
    quantiles = re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s|m)", said)
    return {"rps": float(rate[1]), **{f"p{q}_ms": float(v) * _UNIT_S[unit] * 1e3 for q, v, unit in quantiles}}


def _whole(body: Path) -> list[str]:
    return [f'local f = io.open("{body}", "rb")', 'wrk.body = f:read("*a")', "f:close()"]


def _any_line(body: Path) -> list[str]:
    return [
        "local requests = {}",
        "function init()",
        f'  for line in io.lines("{body}") do requests[#requests + 1] = wrk.format(nil, nil, nil, line) end',
        "end",
        "function request() return requests[math.random(#requests)] end",
    ]
