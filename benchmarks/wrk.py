"""Load by wrk: prepared requests again and again, as a closed loop of clients or at a rate of its own.

wrk has no rate of its own. Here each request takes the next moment of one Poisson process, as if a crowd came that does
not know of one another, and is sent by whichever of many connections is free; a server that stalls is asked on
meanwhile, until all of them wait. wrk's timers tick in milliseconds, so what is due within one is sent together.
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
"""Connections that make up a rate."""
LINES = ".lines"
"""How the name of a file ends of which each line is a body; any of them is sent."""
_ARRIVALS = """
local ffi = require("ffi")
ffi.cdef "typedef struct {{ long s; long ns; }} moment; int clock_gettime(int clock, moment *now);"
local now, due_ms = ffi.new("moment"), nil
math.randomseed(7)
function delay()
  ffi.C.clock_gettime(1, now)
  local now_ms = tonumber(now.s) * 1e3 + tonumber(now.ns) * 1e-6
  due_ms = (due_ms or now_ms) - {gap_ms:.6f} * math.log(1 - math.random())
  return math.max(0, math.floor(due_ms - now_ms + 0.5))
end
"""
"""How long a free connection waits, in ms: until the moment that is its own."""
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
    return _wrk(post, [_ARRIVALS.format(gap_ms=1e3 / rate)], CROWD, seconds)


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
