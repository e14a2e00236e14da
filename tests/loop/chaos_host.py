"""A `raymill run` in a process and a home of its own, that a test may kill, and what must hold once it has ended."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from raymill.actors.lake import Lake
from raymill.cluster import lifecycle, ports, processes, session
from raymill.cluster.spec import DEFAULT_CONFIG
from raymill.jobs.run import newest
from raymill.runtime.home import Home
from raymill.runtime.records import RecordsActor

ROOT = Path(__file__).parents[2]
PIPELINE = "tests/loop/pipelines/drifting.py"
BIN = Path(sys.executable).parent
PER_DAY = 1000
MARK = "CHAOS_PLAIN_CLUSTER"
"""Variable that every process of a plain cluster carries."""
SEEDED_BAD = 2
"""Bad rows that the pipeline mixes in on 20 February."""


@dataclass
class Host:
    """One home with a HOME of its own, a pipeline that is cut short, and ports of its own."""

    top: Path
    until: str
    epochs: int = 6
    shift: str = "none"
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    plain: dict[str, int] = field(default_factory=dict)

    @property
    def home(self) -> Home:
        return Home((self.top / ".raymill").resolve())  # where a plain cluster's state goes by itself

    @property
    def pipeline(self) -> str:
        return f"returns-{self.shift}"

    @property
    def environment(self) -> dict[str, str]:
        """As a fresh shell of another user: nothing of Ray or of an enclosing session is in it."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RAYMILL_"))}
        wanted = {"HOME": str(self.top), "UNTIL": self.until, "EPOCHS": str(self.epochs), "SHIFT": self.shift}
        return {**clean, **wanted, "RAYMILL_HOME": str(self.home.root), "PATH": f"{BIN}:{os.environ['PATH']}"}

    @property
    def log(self) -> str:
        """What all runs said so far."""
        return (self.top / "run.log").read_text()

    def raymill(self, *words: str, timeout_s: float = 240) -> str:
        """A verb, to its end; what it printed."""
        done = subprocess.run(
            [BIN / "raymill", *words], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"raymill {' '.join(words)}: {done.stderr[-3000:]}"
        return done.stdout

    def start(self) -> subprocess.Popen[bytes]:
        """`raymill run`, in the background: on the cluster that is up, else on one on the same ports each time."""
        command = [BIN / "raymill", "run", PIPELINE]
        known, config = session.load(self.home), self.top / "cluster.toml"
        if not (known and known.is_alive):
            if not config.exists():
                config.write_text(_on_own_ports(DEFAULT_CONFIG.read_text()))
            command += ["--cluster", config]
        with (self.top / "run.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=log, stderr=log)
        self.running.append(process)
        return process

    def submit(self) -> subprocess.Popen[bytes]:
        """`ray job submit --working-dir . -- raymill run …` to the cluster that is up; ends when the job does."""
        known = session.load(self.home)
        dashboard = known.dashboard_url if known else f"http://127.0.0.1:{self.plain['dashboard']}"
        cut = {k: self.environment[k] for k in ("UNTIL", "EPOCHS", "SHIFT")}
        command = [BIN / "ray", "job", "submit", "--address", dashboard, "--working-dir", "."]
        command += ["--runtime-env-json", json.dumps({"env_vars": cut}), "--", "raymill", "run", PIPELINE]
        with (self.top / "run.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**self.environment, "RAY_AUTH_MODE": "token"}, stdout=log, stderr=log
            )
        self.running.append(process)
        return process

    @contextmanager
    def plain_cluster(self) -> Iterator[None]:
        """`ray start --head` with a token, Serve on a port of its owner's choice; nothing of raymill's in it."""
        pick = ports.picker()
        self.plain = {name: pick(1) for name in ("gcs", "dashboard", "serve", "agent", "client")}
        environment = {**self.environment, MARK: str(self.top), "RAY_AUTH_MODE": "token"}
        environment.pop("RAYMILL_HOME")
        scratch = Path("/tmp") / f"raymill-plain-{os.getpid()}"
        token = self.top / ".ray" / "auth_token"
        token.parent.mkdir()
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        command = [BIN / "ray", "start", "--head", f"--port={self.plain['gcs']}", "--num-cpus=4"]
        command += [f"--dashboard-port={self.plain['dashboard']}", f"--temp-dir={scratch}", "--disable-usage-stats"]
        command += [f"--dashboard-agent-listen-port={self.plain['agent']}", "--object-store-memory=300000000"]
        command += [f"--ray-client-server-port={self.plain['client']}", "--min-worker-port=0", "--max-worker-port=0"]
        serve = [BIN / "serve", "start", "--http-port", str(self.plain["serve"])]
        try:
            subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
            address = {"RAY_ADDRESS": f"127.0.0.1:{self.plain['gcs']}"}
            subprocess.run(serve, env={**environment, **address}, check=True, capture_output=True, timeout=120)
            yield
        finally:
            processes.end(processes.marked(MARK, str(self.top)))
            shutil.rmtree(scratch, ignore_errors=True)

    def finish(self, process: subprocess.Popen[bytes], timeout_s: float = 300) -> dict[str, Any]:
        """Wait for a run's end; its summary."""
        assert process.wait(timeout_s) == 0, self.log[-4000:]
        return self.summary()

    def summary(self) -> dict[str, Any]:
        progress = newest(self.home, self.pipeline)
        assert progress is not None and progress.finished, self.log[-4000:]
        found: dict[str, Any] = json.loads((self.home.runs / progress.run / "summary.json").read_text())
        return found

    def progress(self) -> Any:
        """The newest run's progress; None before there is one."""
        return newest(self.home, self.pipeline)

    def days_done(self, start: str = "2020-02-15") -> int:
        """Replayed days that are saved."""
        progress = self.progress()
        if progress is None or progress.next_day is None:
            return 0
        begin = time.strptime(start, "%Y-%m-%d")
        return (progress.next_day // 86_400_000_000) - int(time.mktime((*begin[:6], 0, 0, 0)) - time.timezone) // 86_400

    def until_true(self, seen: Callable[[], Any], what: str, limit_s: float = 240) -> None:
        """Wait, as long as the run lives."""
        end = time.monotonic() + limit_s
        while not seen():
            assert time.monotonic() < end, f"not seen in {limit_s} s: {what}; {self.log[-2000:]}"
            assert all(p.poll() in (None, -signal.SIGKILL) for p in self.running), f"{what}: {self.log[-4000:]}"
            time.sleep(0.02)

    def kill_everything(self, process: subprocess.Popen[bytes]) -> int:
        """SIGKILL to the driver and to all of its cluster but HAProxy or its launcher. The number of processes."""
        process.kill()
        killed = 0
        while members := [p for p in self.members() if "/haproxy" not in p.command]:
            for member in members:
                with suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGKILL)
                    killed += 1
            time.sleep(0.05)
        process.wait()
        return killed

    def members(self) -> list[processes.Process]:
        """The running processes of the home's cluster."""
        return processes.marked(processes.SESSION_MARK, str(self.home.root))

    def close(self) -> None:
        """Leave nothing running."""
        for process in self.running:
            process.kill()
            process.wait()
        lifecycle.down(self.home)
        shutil.rmtree(session.scratch_path(self.home), ignore_errors=True)


def assert_whole(host: Host, summary: dict[str, Any], days: int) -> None:
    """What an undisturbed run of so many days comes to, to the row, whatever was killed meanwhile."""
    rows = 45_000 + days * PER_DAY
    requests, cost = summary["requests"], summary["cost"]
    assert (requests["failed"], requests["rows"]) == (0, days * PER_DAY)
    assert summary["rows"]["ingested"] == rows
    assert (summary["rows"]["quarantined"], summary["rows"]["seeded_bad"]) == ({}, SEEDED_BAD if days > 5 else 0)
    assert abs(sum(cost["parts"].values()) - cost["bill_usd"]) < 0.005
    assert [v["stage"] for v in summary["versions"]].count("live") == 1

    lake = Lake(host.home.lake)
    predicted = lake.read("predictions", columns=["id"])["id"]
    assert len(predicted) == days * PER_DAY and pc.count_distinct(predicted).as_py() == len(predicted)
    assert set(pc.unique(pc.utf8_slice_codeunits(predicted, 0, 26)).to_pylist()) == {summary["run"]}
    (source,) = set(lake.tables()) - {"predictions", "quarantine"}
    orders = lake.read(source, columns=["order"])["order"]
    assert len(orders) == rows and pc.count_distinct(orders).as_py() == rows
    assert lake.count("quarantine") == (SEEDED_BAD if days > 5 else 0)
    assert list(host.home.spool.rglob("*.frames")) == []
    _assert_record(host, summary)


def _assert_record(host: Host, summary: dict[str, Any]) -> None:
    records = RecordsActor(host.home.root)
    records.start()
    try:
        assert records.verify().broken_seq is None
        versions = records.versions(host.pipeline)
        assert len({(v.training_id, v.kind) for v in versions}) == len(versions)
        finished = [e["subject"] for e in records.events("training.finished")]
        assert len(set(finished)) == len(finished)
        epochs = Counter(e["subject"] for e in records.events("training.epoch"))
        assert set(epochs.values()) == {host.epochs}
        leases = {k: {e["subject"] for e in records.events(f"lease.{k}")} for k in ("granted", "released")}
        held = leases["granted"] - leases["released"]
        owners = {e["data"].get("purpose") for e in records.events("lease.granted") if e["subject"] in held}
        assert owners <= {"serving"}, f"leases that nobody gave back: {held}"
    finally:
        records.stop()


def _on_own_ports(text: str) -> str:
    pick = ports.picker()
    for name in ("gcs", "dashboard", "serve", "grpc"):
        text = re.sub(rf"^{name} = \d+", f"{name} = {pick(1)}", text, flags=re.MULTILINE)
    return text
