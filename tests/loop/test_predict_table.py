"""`raymill predict --table` as a submitted job whose driver is killed: the same again goes on where it was."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from raymill.cluster import session
from raymill.runtime.home import Home
from tests.loop.conftest import RAYMILL, Host

FILES, ROWS = 120, 20
MOMENT = "2020-03-24T12:00:00Z"


def write_rows(folder: Path) -> None:
    """Orders without a moment of their own; the last row of each file has the id of the first row of the first one."""
    folder.mkdir()
    for i in range(FILES):
        numbers = [i * ROWS + j for j in range(ROWS)]
        columns = {
            "id": [f"o{n}" for n in numbers[:-1]] + ["o0"],
            "order": [f"o{n}" for n in numbers],
            "placed_at": [MOMENT] * ROWS,
            "shop": [f"shop{n % 8}" for n in numbers],
            "price": [n / 1000 for n in numbers],
            "weight": [1 - n / 900 for n in numbers],
            "noise": [0.1] * ROWS,
        }
        table = pa.table(columns)
        stamps = table["placed_at"].cast(pa.timestamp("us", "UTC"))
        pq.write_table(table.set_column(2, "placed_at", stamps), folder / f"{i:03d}.parquet")


def submit(host: Host, folder: Path, *words: str) -> subprocess.Popen[str]:
    dashboard = session.load(Home(host.home)).dashboard_url
    command = [RAYMILL.with_name("ray"), "job", "submit", "--address", dashboard, "--working-dir", folder]
    command += ["--", "raymill", "predict", *words]
    env = {**host.env, "RAY_AUTH_MODE": "token"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_driver(job: subprocess.Popen[str], out: Path, pieces: int) -> None:
    """Kill the process that runs the job as soon as so many pieces are done."""
    while len(list((out / "_pieces").glob("*.json"))) < pieces:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.005)
    drivers = [
        p.pid
        for p in psutil.process_iter(["cmdline"])
        if str(out) in (words := p.info["cmdline"] or []) and any(w.endswith("/raymill") for w in words)
    ]
    assert len(drivers) == 1, drivers
    os.kill(drivers[0], signal.SIGKILL)


def test_a_submitted_job_whose_driver_is_killed_goes_on_and_loses_and_doubles_nothing(
    host: Host, served: dict, tmp_path: Path
):
    (tmp_path / "job").mkdir()
    write_rows(tmp_path / "job" / "rows")
    out = tmp_path / "out"
    words = (served["pipeline"], "--table", "rows", "--at", MOMENT, "--out", str(out), "--json")
    first = submit(host, tmp_path / "job", *words)
    kill_driver(first, out, pieces=3)
    said = first.communicate(timeout=120)[0]
    assert first.returncode != 0 and not (out / "_manifest.json").exists(), said
    before = {p.name: p.stat().st_mtime_ns for p in (out / "_pieces").glob("*.json")}
    assert 3 <= len(before) < FILES
    again = submit(host, tmp_path / "job", *words)
    said = again.communicate(timeout=180)[0]
    assert again.returncode == 0 and f'"duplicates": {FILES}' in said, said
    assert {name: (out / "_pieces" / name).stat().st_mtime_ns for name in before} == before  # none was answered again
    answers = pads.dataset(out, format="parquet").to_table().to_pylist()
    assert [a["id"] for a in answers] == [f"o{n}" for n in range(FILES * ROWS) if n % ROWS != ROWS - 1]
    sample = pq.read_table(tmp_path / "job" / "rows" / "007.parquet").slice(0, ROWS - 1).to_pylist()
    rows = json.dumps([row | {"placed_at": MOMENT} for row in sample])
    theirs = host.document("predict", served["pipeline"], rows, "--at", MOMENT)
    mine = {a["id"]: a for a in answers}
    assert [mine[t["id"]]["version"] for t in theirs] == [t["version"] for t in theirs]
    assert [mine[t["id"]]["p"] for t in theirs] == pytest.approx([t["p"] for t in theirs], abs=1e-6)
