"""`raymill doctor`: what is wrong with this machine, and the remedy."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from raymill.cluster.doctor import Severity, examine, mend
from raymill.jobs.cli.output import AsJson, emit, out, table
from raymill.runtime.home import current_home


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="End orphans of ours and remove stale files of ours.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with this machine; exit code 1 if something keeps raymill from running."""
    home = current_home()
    mended = mend(home) if fix else []
    findings = examine(home)
    broken = any(f.severity is Severity.ERROR for f in findings)

    def human() -> None:
        for done in mended:
            out.print(f"mended: {done}")
        if findings:
            rows = [[f.severity, f.what, f.where, f.remedy] for f in findings]
            table("doctor", ["severity", "what", "where", "remedy"], rows)
        if not broken:
            out.print("nothing keeps raymill from running here")

    emit({"healthy": not broken, "mended": mended, "findings": [asdict(f) for f in findings]}, as_json, human)
    if broken:
        raise typer.Exit(1)
