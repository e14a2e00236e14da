"""`raymill up`: start a cluster on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from raymill.cluster import lifecycle
from raymill.cluster.spec import load_config
from raymill.jobs.cli.again import serve_again
from raymill.jobs.cli.output import AsJson, emit, err, out
from raymill.runtime.errors import SpecError
from raymill.runtime.home import current_home


def up(
    config: Annotated[Path | None, typer.Option("--config", help="A cluster.toml; the demo's if absent.")] = None,
    ports: Annotated[str, typer.Option("--ports", help="`config`: those of the file; `auto`: picked free.")] = "config",
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="Start Serve's controller and proxy too.")] = True,
    host: Annotated[
        str, typer.Option(help="Open the endpoint to other hosts, by TLS, here; 0.0.0.0: everywhere.")
    ] = "",
    certificate: Annotated[str, typer.Option(help="PEM file of the certificate with its chain.")] = "",
    private_key: Annotated[str, typer.Option(help="PEM file of its key, mode 0600.")] = "",
    require_key: Annotated[bool, typer.Option("--require-key", help="Callers on this host need a key too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a cluster on this machine; one that runs already is left as it is."""
    if ports not in ("config", "auto"):
        raise SpecError(f"--ports is {ports!r}: say `config` or `auto`")
    home, began = current_home(), time.monotonic()
    certificate, private_key = (name and str(Path(name).absolute()) for name in (certificate, private_key))
    given = {"host": host, "certificate": certificate, "private_key": private_key, "require_key": require_key}
    wanted = load_config(config)
    listen = wanted.listen.model_copy(update={name: value for name, value in given.items() if value})
    with err.status("up") as status:
        found = lifecycle.up(
            home,
            wanted.model_copy(update={"listen": listen}),
            ports="auto" if ports == "auto" else "config",
            serve=serve,
            say=lambda step: status.update(step),
        )
    again = serve_again(found) if serve else []
    document = {**found.document(), "served_again": again, "seconds": round(time.monotonic() - began, 1)}

    def human() -> None:
        out.print(Text.assemble(("up", "bold green"), f" after {document['seconds']} s; state in {home.root}"))
        out.print(f"  Ray        {found.address}")
        out.print(f"  dashboard  {found.dashboard_url}   (token: {found.token_path})")
        needed = "every caller needs an API key" if found.keys == "all" else "no key needed on this host"
        out.print(f"  endpoint   {found.serve_url}   ({needed})")
        if found.public_url:
            out.print(f"  elsewhere  {found.public_url}, gRPC {found.public_grpc}   (TLS, API key)")
        if again:
            out.print(f"  serving    {', '.join(again)}   (as before the crash)")
        out.print("  stop it with `raymill down`")

    emit(document, as_json, human)
