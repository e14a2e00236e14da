"""`raymill down`: end what `up` started, and nothing else."""

from __future__ import annotations

import time

from raymill.cluster import lifecycle
from raymill.jobs.cli.output import AsJson, emit, err, out
from raymill.runtime.home import current_home


def down(as_json: AsJson = False) -> None:
    """End what `up` started for this home, its remains included; nothing, if nothing runs."""
    home, began = current_home(), time.monotonic()
    with err.status("down") as status:
        ended = lifecycle.down(home, say=lambda step: status.update(step))
    document = {"home": str(home.root), "ended": ended, "seconds": round(time.monotonic() - began, 1)}

    def human() -> None:
        out.print(f"down: {ended} processes ended in {document['seconds']} s" if ended else "down: nothing was running")

    emit(document, as_json, human)
