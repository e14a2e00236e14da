"""What a session hands to Ray: its environment and the autoscaler's file, as values (pure).

The only place that names RAY_* variables.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from raymill.cluster.ports import BLOCK, Ports
from raymill.cluster.processes import SESSION_MARK
from raymill.cluster.spec import HEAD_TYPE, ClusterConfig
from raymill.runtime.api_keys import KeyPolicy
from raymill.runtime.errors import SpecError
from raymill.runtime.home import HOME_VARIABLE, SOCKETS_VARIABLE, Home

CLUSTER_NAME = "raymill"
HEAD_INSTANCE = "head"
"""Instance id of the head."""
INSTANCE_LABEL = "raymill.io/instance"
TYPE_LABEL = "raymill.io/node-type"
MARKET_LABEL = "raymill.io/market"

DRAIN_S = 2
"""How long Serve keeps a leaving replica or proxy for the requests it has; its own default is 30."""

PROXY_BUFFER_BYTES = 20 * 1024
"""The proxy's buffer: a request that fits it whole is sent to another replica when its own is killed.

HAProxy copies the whole buffer for each request, however small that is: it is as small as the body below allows."""
RETRIED_BODY_BYTES = 16 * 1024
"""Body of a request that fits: 4 KiB are left for its headers and the proxy's own use."""

PROXY_BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
"""What Serve starts as HAProxy: our launcher (`serve_proxy`)."""

GRPC_SERVICER_FUNCTION = "raymill.actors.grpc_service.add_to_server"
"""Serve calls it with each gRPC server it starts, and opens no port for gRPC if it is told of none at its own start."""

WAITING_ROOM = "raymill.actors.waiting_room:middlewares"
"""What the fallback proxy, and each replica, asks for what to put before its HTTP server; a replica gets nothing."""

HELD_S = 60
"""How long a request may wait for its answer, held while the first replica starts: it then gets a 408."""

_FOREIGN = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_NODE_TYPE_NAME",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
)
"""Variables of another cluster or of an enclosing job, which must not reach ours."""


_COLLECTORS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_EXPORTER = "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"


def client_environment(home: Home, ports: Ports, address: str, token: Path, bin_dir: Path, path: str) -> dict[str, str]:
    """Variables for a process that attaches to the session: where it is, and how to be let in."""
    return {
        HOME_VARIABLE: str(home.root),
        "RAY_ADDRESS": address,
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports.dashboard}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": path if path.split(os.pathsep)[0] == str(bin_dir) else f"{bin_dir}{os.pathsep}{path}",
        "NUMBA_CACHE_DIR": str(home.kernels / kernels_version()),
        "TORCH_EXTENSIONS_DIR": str(home.kernels / "torch_extensions"),
        **serve_environment(ports),
    }


def kernels_version(package: Path = Path(__file__).parents[1] / "actors") -> str:
    """Digest of the sources that have numba kernels: what was compiled of other sources is not looked at.

    Numba asks only whether the file of a kernel has changed, not those of the kernels that it has taken in.
    """
    sources = [text for path in sorted(package.glob("*.py")) if b"njit" in (text := path.read_bytes())]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def cluster_environment(
    base: Mapping[str, str],
    client: Mapping[str, str],
    home: Home,
    scratch: Path,
    ports: Ports,
    interface: str = "",
    keys: KeyPolicy = KeyPolicy.OFF,
) -> dict[str, str]:
    """Variables of the head and, by inheritance, of every process of the session.

    Args:
        base: the caller's own environment.
        client: what `client_environment` said.
        home: the session's home; its root is the mark of its processes.
        scratch: short-named folder for sockets, Ray's session and HAProxy.
        ports: the session's ports.
        interface: network interface that reaches all nodes, where they do not share one.
        keys: who needs a key, for those who come while no replica runs.
    """
    return {
        **{k: v for k, v in base.items() if k not in _FOREIGN},
        **{k: v for k, v in client.items() if k not in _FOREIGN},
        SESSION_MARK: str(home.root),
        "RAYMILL_KEYS": keys.value,
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_INSTANCE,
        "RAY_NODE_TYPE_NAME": HEAD_TYPE,
        "RAY_worker_niceness": "0",  # Ray's 15 starves workers wherever anything else runs
        "RAY_health_check_period_ms": "1000",  # a killed raylet is noticed in about 4 s, not 16
        "RAY_health_check_failure_threshold": "4",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(ports.autoscaler_metrics),
        "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
        **haproxy_files(scratch),
        **tracing(base),
        **(
            {name: interface for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")}
            if interface
            else {}
        ),
        **({} if Path("/dev/nvidiactl").exists() else {"DS_ACCELERATOR": "cpu"}),
    }


def serve_environment(ports: Ports) -> dict[str, str]:
    """Serve's variables: controller, proxy, replicas and whoever deploys read them."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # it parses one log line a request, in Python
        "RAY_SERVE_HAPROXY_LOG_TARGET": "127.0.0.1:514 sample 1:1000",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",  # a killed replica costs no request
        # Serve hides a replica from the proxy while its user_config changes: so long, and the proxy does not see it.
        "RAY_SERVE_HAPROXY_BROADCAST_COALESCE_S": "0.5",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "3",  # three misses count: a dead HAProxy is replaced in 9 s, not 30
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(PROXY_BUFFER_BYTES),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(HELD_S + 15),  # a proxy that was replaced goes on with who is held
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.haproxy_stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.haproxy_metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback_http),  # 8500 would be shared by two sessions
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.fallback_grpc),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": WAITING_ROOM,
        "RAYMILL_GRPC_PORT": str(ports.grpc),
        "RAYMILL_HELD_S": str(HELD_S),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.replica_http),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.replica_http + BLOCK),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(ports.replica_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(ports.replica_grpc + BLOCK),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
    }


def tracing(base: Mapping[str, str]) -> dict[str, str]:
    """Serve's variables for traces, where OpenTelemetry's own say where spans go; what the caller has set stays.

    Raises:
        SpecError: what sends spans is not installed: replicas would not start.
    """
    named = [name for name in _COLLECTORS if base.get(name)]
    if not named or base.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return {}
    if base.get(_EXPORTER):
        return {_EXPORTER: base[_EXPORTER]}
    try:
        version("opentelemetry-exporter-otlp-proto-http")
    except PackageNotFoundError as err:
        raise SpecError(
            f"{named[0]} names a collector of traces, and {err.name} is not installed: `pip install raymill[traces]`, "
            "or set OTEL_SDK_DISABLED=true"
        ) from err
    return {_EXPORTER: "raymill.actors.trace_export:otlp"}


def haproxy_files(scratch: Path) -> dict[str, str]:
    """Where HAProxy keeps its files: under our own folder, so that an orphan is known by its config path.

    Serve adds the node id (56 characters), and a Unix socket's path ends at 107: hence the short names.
    """
    folder = scratch / "ha"
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        SOCKETS_VARIABLE: str(folder / "s"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
    }


def serve_options(ports: Ports) -> dict[str, Any]:
    """The part of Serve's REST config that says where it listens; every PUT of the session repeats it."""
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": ports.serve, "request_timeout_s": HELD_S},
        "grpc_options": {"port": ports.grpc, "grpc_servicer_functions": [GRPC_SERVICER_FUNCTION]},
    }


def autoscaling_document(config: ClusterConfig, home: Home, address: str, scratch: Path) -> dict[str, Any]:
    """The file behind `ray start --autoscaling-config`; it carries the empty keys that `ray up` would have filled."""
    types: dict[str, Any] = {
        HEAD_TYPE: {
            "resources": {"CPU": config.head.cpus, "GPU": config.head.gpus, **config.head.resources},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 0,
        }
    }
    for name, kind in config.node_types.items():
        types[name] = {
            "resources": {**kind.resources, "memory": kind.memory_mb * 2**20},
            "labels": {MARKET_LABEL: kind.market, TYPE_LABEL: name, **kind.labels},
            "node_config": {"object_store_memory": kind.object_store_mb * 2**20, "market": kind.market},
            "min_workers": kind.min_workers,
            "max_workers": kind.max_workers,
        }
    return {
        "cluster_name": CLUSTER_NAME,
        "max_workers": config.provider.max_workers,
        "idle_timeout_minutes": config.provider.idle_timeout_s / 60,
        "upscaling_speed": 100.0,
        "provider": {
            "type": "external",
            "module": "raymill.cluster.providers.local.LocalProvider",
            "disable_node_updaters": True,
            "home": str(home.root),
            "address": address,
            "scratch": str(scratch),
            "isolate": config.provider.isolate,
            "launch_timeout_s": config.provider.launch_timeout_s,
        },
        "head_node_type": HEAD_TYPE,
        "available_node_types": types,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "no_restart": False,
    }
