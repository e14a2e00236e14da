"""The point-in-time join against pandas, polars, DuckDB and Feast, from stored parts to a matrix for the trainer.

The work: 1 M labels × 10 M events of 100,000 entities over 90 days, 10 columns of doubles, in the order of time; each
label gets its entity's newest values (`vs_*`; `unsorted_vs_*`: the events shuffled), or mean and count over 6 h and 7 d
of what was known then (`windows_vs_*`). Feast: 100 k × 1 M, without windows, which it has not.

Beside that: the same with strings for entities (`by_name_first_s`: before their codes lie beside the parts); over one
and two actors of Ray, one thread each (`scaling_2_vs_1`, `windows_scaling_2_vs_1`); newest values and windows of a
table of five times the memory it is given (`larger_than_memory`: what the process grew by, mapped files included).

Stored forms: ours, a Delta table written by appends to the lake, whatever reading it takes included, to a float32
matrix copied into shared memory, as Ray's object store would hold it; the peers' own best, said in
`peers/<name>/point_in_time.py`, to whatever frame or table they give back, which spares them the copy. Every side is a
process of its own, warm. In the warm-up all results are compared with ours as float32: `*_differences`.

`--quick`: a fifth of the rows, one repetition, no Feast.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import (
    PEERS,
    Figures,
    NotInstalled,
    Outcome,
    Side,
    alternate,
    compare,
    main,
    peer_environment,
    peer_python,
    progress,
)
from raymill.actors.lake import Lake

LABELS, EVENTS, ENTITIES = 1_000_000, 10_000_000, 100_000
COLUMNS = [f"x{i}" for i in range(10)]
SPAN_US = 90 * 86_400_000_000
BAR = {"vs_pandas": 2, "vs_polars": 5, "vs_duckdb": 7, "vs_feast": 50, "table_to_grown": 5} | {
    f"windows_vs_{peer}": 3 for peer in ("pandas", "polars", "duckdb")
}
_UTC = pa.timestamp("us", "UTC")


class Process:
    """A side: a process that answers one line a task."""

    def __init__(self, command: list[str], environment: dict[str, str] | None) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def ask(self, **told: Any) -> Figures:
        """Figures of one task."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()} at {told['task']!r}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def sides(script: str, peers: list[str]) -> Iterator[dict[str, Process]]:
    """Ours, and the peers that are installed."""
    with ExitStack() as stack:
        found = {"ours": Process([sys.executable, "-m", f"benchmarks.ours.{script}"], None)}
        for peer in peers:
            try:
                command = [str(peer_python(peer)), str(PEERS / peer / f"{script}.py")]
            except NotInstalled as err:
                progress(str(err))
                continue
            found[peer] = Process(command, peer_environment())
        for process in found.values():
            stack.callback(process.close)
        yield found


def stored(folder: Path, labels: int, events: int, entities: int) -> dict[str, str]:
    """Parquet files of the work: `events`, in the order of time, `shuffled`, and `labels`."""
    dice = np.random.default_rng(0)
    at = np.sort(dice.integers(0, SPAN_US, events))
    known = at + dice.exponential(600e6, events).astype(np.int64)
    columns = {
        "id": pa.array(np.arange(events)),
        "at": pa.array(at).cast(_UTC),
        "known": pa.array(known).cast(_UTC),
        "entity": pa.array(dice.integers(0, entities, events)),
        **{c: pa.array(dice.normal(size=events)) for c in COLUMNS},
    }
    table = pa.table(columns)
    asked = pa.table(
        {
            "row": pa.array(np.arange(labels)),
            "at": pa.array(np.sort(dice.integers(SPAN_US // 10, SPAN_US, labels))).cast(_UTC),
            "entity": pa.array(dice.integers(0, entities, labels)),
        }
    )
    names = pa.array([f"entity-{i}" for i in range(entities)])
    made = {"events": table, "labels": asked, "shuffled": table.take(pa.array(dice.permutation(events)))}
    lake = Lake(folder / "lake")
    for name, rows in made.items():
        pq.write_table(rows, folder / f"{name}.parquet", row_group_size=1 << 20)
        for i, first in enumerate(range(0, len(rows), 1 << 20)):
            lake.append(name, rows.slice(first, 1 << 20), batch_id=str(i))
    named = table.append_column("name", names.take(table.column("entity").combine_chunks()))
    for first in range(0, events, 1 << 20):
        lake.append("named", named.slice(first, 1 << 20), batch_id=str(first))
    asked = asked.append_column("name", names.take(asked.column("entity").combine_chunks()))
    pq.write_table(asked, folder / "named_labels.parquet")
    made["named_labels"] = asked
    return {"lake": str(folder / "lake")} | {name: str(folder / f"{name}.parquet") for name in made}


def body(quick: bool) -> Outcome:
    """Measure."""
    scale, repetitions = (5, 1) if quick else (1, 3)
    outcome = Outcome({}, repetitions=repetitions, notes={"labels": LABELS // scale, "events": EVENTS // scale})
    with tempfile.TemporaryDirectory(prefix="raymill-bench-") as temporary:
        folder = Path(temporary)
        (folder / "small").mkdir()
        files = stored(folder, LABELS // scale, EVENTS // scale, ENTITIES // scale)
        with sides("point_in_time", ["pandas", "polars", "duckdb"]) as processes:
            for told, prefix in (
                (_told("latest", files), ""),
                (_told("windows", files), "windows_"),
                (_told("latest", files) | _shuffled(files), "unsorted_"),
            ):
                _measure(outcome, processes, told, prefix, folder, repetitions)
            _by_name(outcome, processes["ours"], files, folder, repetitions)
        _scaling(outcome, files, folder, repetitions)
        outcome.ours["larger_than_memory"] = _larger_than_memory(files)
        outcome.ratios["table_to_grown"] = outcome.ours["larger_than_memory"]["table_to_grown"]
        if not quick:
            small = stored(folder / "small", 100_000, 1_000_000, 10_000)
            with sides("point_in_time", ["feast"]) as processes:
                if "feast" in processes:
                    _measure(outcome, processes, _told("latest", small), "", folder, repetitions)
    outcome.notes["bars"] = BAR
    return outcome


def _told(task: str, files: dict[str, str]) -> dict[str, Any]:
    told = {"task": task, "columns": COLUMNS, "sorted": True, "lake": files["lake"], "table": "events"}
    return told | {"events": files["events"], "labels": files["labels"]}


def _shuffled(files: dict[str, str]) -> dict[str, Any]:
    return {"table": "shuffled", "events": files["shuffled"], "sorted": False}


def _by_name(outcome: Outcome, ours: Process, files: dict[str, str], folder: Path, repetitions: int) -> None:
    """Ours with strings for entities: the first time, which keeps their codes beside the parts, and later."""
    told = _told("by_name", files) | {"table": "named", "labels": files["named_labels"]}
    outcome.ours["by_name_first_s"] = ours.ask(**told)["seconds"]
    outcome.ours["by_name_s"] = alternate({"by name": lambda: ours.ask(**told)}, repetitions).figures("by name")[
        "seconds"
    ]
    ours.ask(**told, save=str(folder / "named.npy"))
    ours.ask(**_told("latest", files), save=str(folder / "numbered.npy"))
    found = [np.load(folder / f"{name}.npy") for name in ("named", "numbered")]
    outcome.ours["by_name_differences"] = _differences(*found)


def _scaling(outcome: Outcome, files: dict[str, str], folder: Path, repetitions: int) -> None:
    """Over one actor and over two, whose answer is that of one process."""
    with sides("point_in_time", []) as processes:
        ours = processes["ours"]
        ours.ask(task="start_shards", gangs=[1, 2], lake=files["lake"])
        for windows, prefix in ((False, ""), (True, "windows_")):
            told = _told("sharded", files) | {"windows": windows}
            alone = str(folder / "alone.npy")
            ours.ask(**_told("windows" if windows else "latest", files), save=alone)
            for n in (1, 2):
                ours.ask(**told, shards=n, save=str(folder / f"{n}.npy"))
                same = _differences(np.load(alone), np.load(folder / f"{n}.npy"))
                outcome.ours[f"{prefix}shards_{n}_differences"] = same
            work = {f"{prefix}{n}": partial(ours.ask, **told, shards=n) for n in (1, 2)}
            measured = alternate(work, repetitions)
            for n in (1, 2):
                outcome.ours[f"{prefix}shards_{n}_s"] = measured.figures(f"{prefix}{n}")["seconds"]
            ratios = measured.ratios("seconds", f"{prefix}2", f"{prefix}1", smaller_is_better=True)
            compare(outcome, f"{prefix}scaling_2_vs_1", ratios)


def _larger_than_memory(files: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.ours.larger_than_memory", files["lake"], files["labels"]]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    progress(f"larger than memory: {found}")
    return found


def _measure(
    outcome: Outcome,
    processes: dict[str, Process],
    told: dict[str, Any],
    prefix: str,
    folder: Path,
    repetitions: int,
) -> None:
    for name, process in processes.items():  # warm-up, and what the answers are compared by
        process.ask(**told, save=str(folder / f"{name}.npy"))
    ours = np.load(folder / "ours.npy")
    work: dict[str, Side] = {name: lambda p=p: p.ask(**told) for name, p in processes.items()}  # type: ignore[misc]
    measured = alternate(work, repetitions)
    size = "" if "feast" not in processes else "small_"
    for name in processes:
        into = outcome.ours if name == "ours" else outcome.peers.setdefault(name, {})
        figures = measured.figures(name)
        into |= {
            f"{size}{prefix or 'latest_'}s": figures["seconds"],
            f"{size}{prefix or 'latest_'}cpu_s": figures["cpu_s"],
        }
        if name != "ours":
            into[f"{prefix or 'latest_'}differences"] = _differences(ours, np.load(folder / f"{name}.npy"))
            ratios = measured.ratios("seconds", "ours", name, smaller_is_better=True)
            compare(outcome, f"{prefix}vs_{name}", ratios)


def _differences(ours: Any, theirs: Any) -> int:
    return int(((ours != theirs) & ~(np.isnan(ours) & np.isnan(theirs))).sum())


if __name__ == "__main__":
    main("point_in_time", body)
