"""The front that other hosts reach: what HAProxy is told, pure.

Serve's own HAProxy offers no TLS and stays on loopback. Another one, of the same build, stands before it, ends TLS and
says of every request, in a header that the caller can neither set nor take away, that it comes from another host.

Invariant: a request that came through here carries `x-forwarded-for` with the caller's address, and only that one.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

GRPC_SERVICE = "/inference.GRPCInferenceService/"
"""The one service that other hosts may call; Serve's own are for this host."""
CERTIFICATE, PRIVATE_KEY = "tls.crt", "tls.key"
"""Names of the links to the two files, in the front's folder: HAProxy finds the key by the certificate's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """Where the front listens, and what is behind it."""

    host: str
    """Address to listen at."""
    https: int
    """Port of HTTP over TLS."""
    grpcs: int
    """Port of gRPC over TLS."""
    serve: int
    """Serve's HTTP port on loopback."""
    grpc: int
    """Serve's gRPC port on loopback."""
    folder: Path
    """Holds the links to certificate and key."""


def haproxy_text(front: Front) -> str:
    """HAProxy's configuration."""
    host = f"[{front.host}]" if is_ipv6(front.host) else front.host
    return f"""global
    maxconn 4096
    nbthread 1
    hard-stop-after 15s
    ssl-load-extra-del-ext
    ssl-default-bind-options ssl-min-ver TLSv1.2 no-tls-tickets
    log stdout format raw daemon notice
defaults
    mode http
    log global
    option dontlog-normal
    option http-no-delay
    timeout connect 5s
    timeout client 60s
    timeout http-request 20s
    timeout http-keep-alive 60s
    timeout server 3600s
    http-reuse always
frontend https
    bind {host}:{front.https} ssl crt {front.folder / CERTIFICATE} alpn h2,http/1.1
{_marks()}
    http-request return status 404 content-type text/plain string "not found" \
if {{ path_beg /-/ }} !{{ path /-/healthz }}
    default_backend serve
backend serve
    server serve 127.0.0.1:{front.serve}
frontend grpcs
    bind {host}:{front.grpcs} ssl crt {front.folder / CERTIFICATE} alpn h2
    timeout client 3600s
{_marks()}
    http-request return status 200 hdr grpc-status 12 \
hdr grpc-message "no such service" if !{{ path_beg {GRPC_SERVICE} }}
    default_backend grpc
backend grpc
    server grpc 127.0.0.1:{front.grpc} proto h2
"""


def _marks() -> str:
    """Headers by which a request is known as another host's; `connection` could name them to be taken away."""
    return """    http-request del-header connection
    http-request del-header upgrade
    http-request del-header forwarded
    http-request set-header x-forwarded-for %[src]
    http-request set-header x-forwarded-proto https"""


def is_ipv6(host: str) -> bool:
    """Whether it is an IPv6 address."""
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def is_everywhere(host: str) -> bool:
    """Whether it stands for all addresses of the machine."""
    return host in ("0.0.0.0", "::")
