import re
from pathlib import Path

import pytest

from raymill.actors.endpoint import APART_S
from raymill.cluster.environment import (
    autoscaling_document,
    client_environment,
    cluster_environment,
    kernels_version,
    serve_environment,
    serve_options,
    tracing,
)
from raymill.cluster.ports import Ports
from raymill.cluster.session import scratch_path
from raymill.cluster.spec import load_config, parse_config
from raymill.runtime.errors import SpecError
from raymill.runtime.home import Home

PORTS = Ports(
    gcs=6379,
    dashboard=8265,
    serve=8000,
    grpc=9000,
    agent=1,
    client=2,
    haproxy_stats=3,
    haproxy_metrics=4,
    autoscaler_metrics=5,
    dashboard_metrics=6,
    replica_http=7,
    replica_grpc=8,
    fallback_http=9,
    fallback_grpc=10,
)


def test_the_demo_has_a_reserved_and_a_cheaper_spot_type():
    config = load_config()
    assert config.market("reserved") == "reserved" and config.market("spot") == "spot"
    assert config.price("spot") < config.price("reserved") and config.price("head") > 0
    assert config.spot_types == {"spot"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ports": {"gcs": 8000, "serve": 8000}}, "two ports are the same"),
        ({"ports": {"serve": 80}}, "ports.serve"),
        ({"node_types": {"head": {}}}, "node_types.head"),
        ({"provider": {"isolated": True}}, "provider.isolated"),
        ({"head": {"cpus": 0, "memory_mb": 2000, "object_store_mb": 200, "price_usd_per_h": 1}}, "head.cpus"),
    ],
)
def test_a_wrong_field_of_the_file_is_named(change, said):
    with pytest.raises(SpecError, match=said):
        parse_config({**load_config().model_dump(), **change}, "cluster.toml")


def test_a_missing_file_or_one_that_is_no_toml_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"none\.toml.*can not be read"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[head\n")
    with pytest.raises(SpecError, match=r"bad\.toml is no TOML"):
        load_config(tmp_path / "bad.toml")


def test_the_autoscalers_file_satisfies_rays_own_schema(tmp_path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    document = autoscaling_document(load_config(), Home(tmp_path), "127.0.0.1:6379", tmp_path)
    validate_config(prepare_config(document))
    assert document["available_node_types"]["spot"]["labels"]["raymill.io/market"] == "spot"


def test_a_job_of_another_cluster_leaks_nothing_into_ours(tmp_path):
    home = Home(tmp_path)
    client = client_environment(home, PORTS, "10.0.0.1:6379", tmp_path / "token", tmp_path / "bin", "/usr/bin")
    base = {"RAY_ADDRESS": "elsewhere:1", "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "old", "KEPT": "yes"}
    environment = cluster_environment(base, client, home, tmp_path, PORTS)
    assert environment["KEPT"] == "yes" and environment["RAY_AUTH_MODE"] == "token"
    assert "RAY_ADDRESS" not in environment and "RAY_AUTH_TOKEN" not in environment
    assert environment["PATH"] == f"{tmp_path / 'bin'}:/usr/bin"
    assert "RAYMILL_SESSION" not in client and environment["RAYMILL_SESSION"] == str(tmp_path)


def test_sockets_of_haproxy_stay_within_what_a_unix_socket_may_be_named(tmp_path):
    from raymill.cluster.environment import haproxy_files

    deep = Home(tmp_path / ("deep" * 20))
    for path in haproxy_files(scratch_path(deep)).values():
        folder, _, name = path.rpartition("/")
        assert len(f"{folder}/{'f' * 56}/{name}.1234567.tmp") <= 107 or not name.endswith(".sock")


def test_serve_listens_on_loopback_on_the_head_only():
    assert serve_options(PORTS) == {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": 8000, "request_timeout_s": 60},
        "grpc_options": {
            "port": 9000,
            "grpc_servicer_functions": ["raymill.actors.grpc_service.add_to_server"],
        },
    }


def test_every_port_that_serve_would_take_by_default_is_the_sessions_own():
    """Two sessions on one machine: a default left over and the requests of one go to the proxy of the other."""
    import ray

    source = (Path(ray.__file__).parent / "serve" / "_private" / "constants.py").read_text()
    names = set(re.findall(r'"(RAY_SERVE_\w+_PORT)"', source)) - {
        "RAY_SERVE_WORKER_PROXY_HTTP_PORT",  # proxies of other hosts: there are none (HeadOnly)
        "RAY_SERVE_WORKER_PROXY_GRPC_PORT",
    }
    assert len(names) >= 8 and names <= serve_environment(PORTS).keys()


def test_traces_are_on_where_a_collector_is_named_and_the_callers_own_exporter_stays():
    assert tracing({}) == {}
    named = tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"})
    assert named == {"RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "raymill.actors.trace_export:otlp"}
    own = {"OTEL_EXPORTER_OTLP_ENDPOINT": "x", "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "mine:export"}
    assert tracing({**named, "OTEL_EXPORTER_OTLP_ENDPOINT": "x", "OTEL_SDK_DISABLED": "true"}) == {}
    assert tracing(own) == {"RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "mine:export"}


def test_kernels_are_compiled_anew_when_any_source_with_kernels_changes(tmp_path):
    (tmp_path / "a.py").write_text("from numba import njit")
    (tmp_path / "b.py").write_text("from numba import njit  # called by a")
    before = kernels_version(tmp_path)
    (tmp_path / "c.py").write_text("no kernels")
    assert kernels_version(tmp_path) == before
    (tmp_path / "b.py").write_text("from numba import njit  # changed")
    assert kernels_version(tmp_path) != before
    assert kernels_version() != kernels_version(tmp_path)


def test_changes_of_what_is_served_keep_apart_until_the_proxy_has_followed():
    """0.5 s for which Serve waits after it has started HAProxy anew, and as long again for all else of it."""
    waits_s = float(serve_environment(PORTS)["RAY_SERVE_HAPROXY_BROADCAST_COALESCE_S"])
    assert waits_s + 1.0 <= APART_S
