"""Where a cluster's state lives: the folders under `RAYMILL_HOME`, and the one place that reads that variable.

Only processes on the head's host open what is here; ranks and replicas elsewhere get bytes by the object store.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

HOME_VARIABLE = "RAYMILL_HOME"
SOCKETS_VARIABLE = "RAYMILL_SOCKETS"
"""Names the folder of the Unix sockets by which the proxy reaches replicas of its own host."""


@dataclass(frozen=True, slots=True)
class Home:
    """The folders of one RAYMILL_HOME; nothing is created until somebody writes."""

    root: Path

    @property
    def lake(self) -> Path:
        """Delta tables: sources, predictions, quarantine."""
        return self.root / "lake"

    @property
    def online(self) -> Path:
        """The online feature store."""
        return self.root / "online"

    @property
    def models(self) -> Path:
        """Exported programs and checkpoints, named by content hash."""
        return self.root / "models"

    @property
    def record(self) -> Path:
        """SQLite database of ledger and registry."""
        return self.root / "record.db"

    @property
    def operator_key(self) -> Path:
        """The API key by which raymill itself calls an endpoint that asks everybody for one; mode 0600."""
        return self.root / "operator.key"

    @property
    def spool(self) -> Path:
        """Predictions that were answered and are not in the lake yet."""
        return self.root / "spool"

    @property
    def loads(self) -> Path:
        """Notes of programs that are being loaded on this host, or ended who did it; may be deleted."""
        return self.root / "loads"

    @property
    def locks(self) -> Path:
        """Files by which processes take turns; empty, and may be deleted while nothing runs."""
        return self.root / "locks"

    @property
    def runs(self) -> Path:
        """One folder a run: report.html, summary.json, spec.json, loop.json."""
        return self.root / "runs"

    @property
    def cluster(self) -> Path:
        """What `raymill up` started: state.json, node table, generated files, logs."""
        return self.root / "cluster"

    @property
    def served(self) -> Path:
        """What the endpoint serves, as Serve was told it last: for a start after a crash. `raymill down` removes it."""
        return self.cluster / "served.json"

    @property
    def parts(self) -> Path:
        """Copies of parts of a lake that lies in an object store (a cache: may be deleted)."""
        return self.root / "parts"

    @property
    def kernels(self) -> Path:
        """Compiled kernels (a cache: may be deleted)."""
        return self.root / "kernels"


def current_home(default: str | Path = ".raymill") -> Home:
    """The home that `raymill up` fixed for this cluster, else `default` (below the working directory, or absolute)."""
    return Home(Path(os.environ.get(HOME_VARIABLE) or default).expanduser().resolve())
