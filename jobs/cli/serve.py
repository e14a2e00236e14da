"""`raymill serve FILE|module:function`: a model on an endpoint, without a pipeline; on a bare machine, too."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from raymill.jobs.cli.again import serve_again
from raymill.jobs.cli.output import AsJson, emit, err, out
from raymill.jobs.cli.records import join, open_records, running_session
from raymill.runtime.api_keys import KEY_VARIABLE, KeyPolicy
from raymill.runtime.errors import Conflict

if TYPE_CHECKING:
    from raymill.cluster.session import Session
    from raymill.jobs.model_target import Target
    from raymill.runtime.messages import ModelVersion

_FEW = 8
"""Inputs up to which the printed request names them."""


def serve(
    target: Annotated[str, typer.Argument(help="A model file, or code as module:function, module:Net.")],
    name: Annotated[str | None, typer.Option(help="Name to serve it by; absent: the file's.")] = None,
    features: Annotated[str | None, typer.Option(help="Names of the inputs, a,b,c, or how many there are.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of module:Net, safetensors or a state_dict.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Give the net to torch.compile.")] = False,
    trust: Annotated[list[str] | None, typer.Option(help="A type in a skops file that you trust; repeatable.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the endpoint, where it is started; absent: 8000.")] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Live at once, where another version is live.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Come back at once; `raymill down` ends it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve a model: on the running cluster, else on one that is started for it and ends with Ctrl-C."""
    from raymill.jobs.model_target import Wish, read_target

    wish = Wish(name=name, features=features, weights=weights, compiled=compiled, trust=tuple(trust or ()))
    read = read_target(target, wish)
    found = running_session()
    if found and port is not None and not found.serve_url.endswith(f":{port}"):
        raise Conflict(f"the cluster that runs has its endpoint at {found.serve_url}: leave --port away")
    session = found or _start(port)
    try:
        serve_again(session)
        version = _put_up(read, session, promote)
        document = describe(read, version, session.serve_url, with_key=session.keys is KeyPolicy.ALL)
        emit(document, as_json, lambda: _print(document, ends_here=found is None and not detach))
        if found is None and not detach:
            out.file.flush()
            _wait()
    except BaseException:
        if found is None:
            _end(session)
        raise
    if found is None and not detach:
        _end(session)


def describe(target: Target, version: ModelVersion, url: str, *, with_key: bool = False) -> dict[str, Any]:
    """What a caller needs to know, and requests of the right width to paste.

    Where the endpoint asks everybody `with_key`, they take it from the environment: a key is printed by nobody but
    whoever makes it.
    """
    rows = {"rows": [dict.fromkeys(target.inputs, 0.0)]}
    tensor = {
        "name": "features",
        "datatype": "FP32",
        "shape": [1, len(target.inputs)],
        "data": [0.0] * len(target.inputs),
    }
    predict, infer = f"{url}/predict/{target.name}", f"{url}/v2/models/{target.name}/infer"
    return {
        "model": target.name,
        "version": version.version,
        "stage": str(version.stage),
        "kind": target.kind,
        "inputs": list(target.inputs),
        "url": url,
        "key": f"export {KEY_VARIABLE}=$(raymill keys create me)" if with_key else None,
        "curl": {
            "by name": _curl(predict, rows, with_key=with_key),
            "vectors": _curl(infer, {"inputs": [tensor]}, with_key=with_key),
        },
    }


def _curl(url: str, body: dict[str, Any], *, with_key: bool) -> str:
    text = json.dumps(body, ensure_ascii=False).replace("'", "\\u0027")
    key = f' -H "authorization: Bearer ${KEY_VARIABLE}"' if with_key else ""
    return f"curl -s {url}{key} -H 'content-type: application/json' -d '{text}'"


def _start(port: int | None) -> Session:
    from raymill.cluster import lifecycle
    from raymill.cluster.ports import choose
    from raymill.cluster.spec import PortSpec, load_config
    from raymill.runtime.home import current_home

    config = load_config(None)
    if port is not None:  # who names a port may have other sessions: everything else is picked free
        picked = choose("auto")
        known = {known: getattr(picked, known) for known in PortSpec.model_fields}
        config = config.model_copy(update={"ports": PortSpec(**{**known, "serve": port})})
    return lifecycle.up(current_home(), config, say=lambda step: err.print(step, style="dim"))


def _end(session: Session) -> None:
    import ray

    from raymill.cluster import lifecycle

    ray.shutdown()
    err.print("stopping what was started", style="dim")
    lifecycle.down(session.home)


def _put_up(target: Target, session: Session, promote: bool) -> ModelVersion:
    join(session)
    from raymill.actors.endpoint import Placement
    from raymill.jobs.pool import scheduler_of
    from raymill.jobs.reach import endpoint_of
    from raymill.jobs.serving_alone import put_up
    from raymill.runtime.spawn import on_head

    err.print(f"loading {target.name}, {len(target.data):,} bytes of {target.kind}", style="dim")
    with open_records() as (_, records):
        endpoint = endpoint_of(session)
        try:
            scheduler = scheduler_of(session)
            return put_up(target, records, endpoint, scheduler, Placement(**on_head()), promote=promote)
        finally:
            endpoint.close()


def _wait() -> None:
    """Until Ctrl-C, or SIGTERM."""
    stop = threading.Event()
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    while not stop.wait(0.2):  # not for ever: a handler runs between two waits
        pass
    for number, handler in before.items():
        signal.signal(number, handler)


def _print(document: dict[str, Any], *, ends_here: bool) -> None:
    name, version = document["model"], document["version"]
    out.print(Text.assemble((name, "bold green"), f" version {version} ({document['kind']}) is {document['stage']}"))
    out.print(f"  {len(document['inputs'])} inputs at {document['url']}; ask it:", soft_wrap=True)
    if document["key"]:
        out.print(f"  {document['key']}", soft_wrap=True)
    for form, request in document["curl"].items():
        if form == "vectors" or len(document["inputs"]) <= _FEW:
            out.print(f"  {request}", soft_wrap=True)
    if document["stage"] == "canary":
        out.print(f"  it answers a part of the requests: `raymill promote {name} {version}` makes it live")
    out.print("  Ctrl-C ends it" if ends_here else "  `raymill down` ends it")
