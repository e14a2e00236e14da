"""The endpoint as other hosts reach it: the session's own TLS front before a replica, without Ray; keys on the way."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import grpc
import httpx
import pytest
import uvicorn

from raymill.actors import grpc_service
from raymill.actors import open_inference_pb2 as pb
from raymill.actors.fast_server import NoAccounts
from raymill.actors.fastlane import FastLane
from raymill.actors.rollout import to_user_config
from raymill.actors.selftest import spec, stand_ins
from raymill.actors.serving import ServingReplica
from raymill.cluster import certificate, doctor, processes, start
from raymill.cluster.ports import picker
from raymill.cluster.processes import SESSION_MARK, describe
from raymill.cluster.providers import namespace
from raymill.cluster.session import Session
from raymill.cluster.spec import ListenSpec, load_config
from raymill.runtime.api_keys import ApiKey, KeyPolicy, Right, digest_of, new_key
from raymill.runtime.client import Client
from raymill.runtime.errors import Forbidden, RequestError, Unauthenticated
from raymill.runtime.home import Home
from raymill.runtime.records import RecordsActor

PREDICT, MANAGE = new_key(), new_key()
ROW = {"id": "a", "amount": 2.5, "at": "2020-01-01T00:00:00Z"}
PATIENCE_S = 20.0


class Replica(threading.Thread):
    """A replica on ports of its own, on every address as Serve has it; its keys are in a record."""

    def __init__(self, home):
        super().__init__(daemon=True)
        self.records = RecordsActor(home)
        self.records.start()
        for key, right in ((PREDICT, Right.PREDICT), (MANAGE, Right.MANAGE)):
            self.records.create_key(ApiKey(digest=digest_of(key), tenant="acme", rights=(right,), created_s=1.0))
        self.home, self.up, self.loop = home, threading.Event(), asyncio.new_event_loop()

    def program(self, digest):
        return digest.encode()

    def keys_changed_since(self, stamp):
        return self.records.keys_changed_since(stamp)

    def run(self):
        self.loop.run_until_complete(self._serve())

    async def _serve(self):
        found = ServingReplica(self.home, **{**stand_ins(), "records": self}, keys=KeyPolicy.BEYOND)
        found.fast._accounts_of = lambda app: NoAccounts()
        found.start()
        await found.reconfigure(to_user_config([spec()]))
        app = found.__serve_build_asgi_app__()
        config = uvicorn.Config(
            app,
            host="0.0.0.0",
            port=0,
            http=partial(FastLane, found.fast),
            lifespan="off",
            log_config=None,
            access_log=False,
        )
        self.server = uvicorn.Server(config)
        self.server.install_signal_handlers = lambda: None
        serving = asyncio.create_task(self.server.serve())
        grpc_service.answer_with(found)
        calls = grpc.aio.server()
        grpc_service.add_to_server(None, calls)
        self.grpc = calls.add_insecure_port("127.0.0.1:0")
        await calls.start()
        while not self.server.started:
            await asyncio.sleep(0.01)
        self.http = self.server.servers[0].sockets[0].getsockname()[1]
        self.fast = found.fast
        self.up.set()
        await serving
        await calls.stop(0)
        found.stop()


def make_pair(folder, *addresses):
    names = ",".join(f"IP:{a}" for a in addresses)
    fresh = {"certificate": folder / "cert.new", "key": folder / "key.new"}
    command = certificate.TRIAL.format(names=names, **fresh)
    subprocess.run(command.split(), check=True, capture_output=True)
    os.replace(fresh["key"], folder / "key.pem")
    os.replace(fresh["certificate"], folder / "cert.pem")


def until(holds, patience_s=PATIENCE_S):
    end = time.monotonic() + patience_s
    while not (found := holds()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    folder = tmp_path_factory.mktemp("front")
    home = Home(folder / "home")
    network = namespace.network_of(home.root)
    replica = Replica(home.root)
    replica.start()
    assert replica.up.wait(PATIENCE_S)
    make_pair(folder, "127.0.0.1", network.head)
    # Stands for Ray's GCS: the front is to end with it.
    gcs = subprocess.Popen(["sleep", "600"], env={**os.environ, SESSION_MARK: str(home.root)})
    pick = picker()
    ports = SimpleNamespace(https=pick(1), grpcs=pick(1), serve=replica.http, grpc=replica.grpc)
    home.cluster.mkdir(parents=True)
    session = Session(
        root=str(home.root),
        state="running",
        managed=True,
        has_autoscaler=True,
        address="",
        dashboard_url="",
        serve_url=f"http://127.0.0.1:{replica.http}",
        token_path="",
        started_s=0.0,
        scratch=str(folder),
        ports=ports,
        keys=KeyPolicy.BEYOND,
        public_host="127.0.0.1",
        pids=(processes.Process(gcs.pid, describe(gcs.pid).started, "gcs/gcs_server"),),
    )
    listen = ListenSpec(
        host="0.0.0.0", certificate=str(folder / "cert.pem"), private_key=str(folder / "key.pem"), https=ports.https
    )
    config = load_config().model_copy(update={"listen": listen})
    (home.cluster / "config.json").write_text(config.model_dump_json())
    start.front(session, config)
    yield SimpleNamespace(
        session=session, config=config, replica=replica, gcs=gcs, folder=folder, network=network, ca=folder / "cert.pem"
    )
    gcs.kill()
    gcs.wait()
    processes.end(processes.marked(SESSION_MARK, str(home.root)))
    replica.server.should_exit = True
    replica.join(PATIENCE_S)
    replica.records.stop()


def client(front, key=None):
    return Client(front.session.public_url, key=key, ca=str(front.ca), deadline_s=5)


def ours(front):
    return [p for p in processes.marked(SESSION_MARK, str(front.session.home.root)) if p.pid != front.gcs.pid]


def test_another_host_needs_a_key_and_this_one_does_not(front):
    with client(front, PREDICT) as caller:
        assert caller.predict("selftest", [ROW]).to_pylist()[0]["p"] == pytest.approx(0.125)
        with pytest.raises(Forbidden, match="has not the right `manage`"):
            caller.models()
    with client(front) as caller, pytest.raises(Unauthenticated, match="asks for an API key"):
        caller.predict("selftest", [ROW])
    with client(front, "rm_wrong") as caller, pytest.raises(Unauthenticated, match="unknown, revoked or expired"):
        caller.predict("selftest", [ROW])
    with client(front, MANAGE) as caller, pytest.raises(Forbidden, match="`predict`"):
        caller.predict("selftest", [ROW])
    with Client(front.session.serve_url) as caller:
        assert caller.predict("selftest", [ROW]).num_rows == 1
    assert front.replica.fast.requests >= 2  # a refused one too, if its body came with its head
    assert httpx.get(f"{front.session.serve_url}/raymill/replica").status_code == 200


FORGED = [
    {"x-forwarded-for": "127.0.0.1"},
    {"x-forwarded-for": "127.0.0.1", "connection": "x-forwarded-for"},
    {"connection": "close, x-forwarded-for"},
    {"forwarded": "for=127.0.0.1", "connection": "keep-alive, forwarded, x-forwarded-for"},
    {"X_Forwarded_For": "127.0.0.1"},
    {"upgrade": "h2c", "connection": "upgrade, http2-settings", "http2-settings": "AAMAAABkAARAAAAAAAIAAAAA"},
    {"transfer-encoding": "chunked"},
]


@pytest.mark.parametrize("headers", FORGED)
def test_no_header_makes_a_request_from_elsewhere_one_from_here(front, headers):
    trust = httpx.create_ssl_context(verify=str(front.ca))
    with httpx.Client(verify=trust, base_url=front.session.public_url) as http:
        body = {"rows": [ROW]}
        chunks = {"content": iter([json.dumps(body).encode()])} if "transfer-encoding" in headers else {"json": body}
        assert http.post("/predict/selftest", headers=headers, **chunks).status_code == 401
        assert http.get("/raymill/replica", headers=headers).status_code == 401
        assert http.get("/v2", headers=headers).status_code == 401


def test_of_what_needs_no_key_only_liveness_is_open(front):
    trust = httpx.create_ssl_context(verify=str(front.ca))
    with httpx.Client(verify=trust, base_url=front.session.public_url) as http:
        assert http.get("/healthz").status_code == http.get("/v2/health/live").status_code == 200
        assert http.get("/v2/health/ready").status_code == http.get("/").status_code == 401
        assert http.get("/-/routes").status_code == 404
    with pytest.raises(httpx.TransportError):
        httpx.get(front.session.public_url.replace("https", "http"))


def test_who_does_not_trust_the_certificate_is_told_at_once(front):
    with Client(front.session.public_url, key=PREDICT) as caller, pytest.raises(RequestError, match="RAYMILL_CA_FILE"):
        caller.predict("selftest", [ROW])


def test_grpc_goes_by_tls_and_needs_the_same_keys(front):
    trust = grpc.ssl_channel_credentials(front.ca.read_bytes())
    with grpc.secure_channel(front.session.public_grpc, trust) as channel:

        def code(method, *metadata):
            call = channel.unary_unary(method)
            try:
                call(pb.ServerReadyRequest().SerializeToString(), metadata=metadata, timeout=10)
            except grpc.RpcError as err:
                return err.code().name
            return "OK"

        ours = f"/{grpc_service.SERVICE}/"
        assert code(f"{ours}ServerLive") == "OK"
        assert code(f"{ours}ServerReady") == "UNAUTHENTICATED"
        assert code(f"{ours}ServerReady", ("x-forwarded-for", "127.0.0.1")) == "UNAUTHENTICATED"
        assert code(f"{ours}ServerReady", ("authorization", f"Bearer {PREDICT}")) == "OK"
        assert code("/ray.serve.RayServeAPIService/ListApplications") == "UNIMPLEMENTED"


def test_a_revoked_key_is_worth_nothing_a_moment_later(front):
    key = new_key()
    front.replica.records.create_key(
        ApiKey(digest=digest_of(key), tenant="acme", rights=(Right.PREDICT,), created_s=1.0)
    )
    with client(front, key) as caller:
        assert until(lambda: answered(caller))
        front.replica.records.revoke_key(digest_of(key), "test")
        assert until(lambda: not answered(caller), 5)


def answered(caller):
    try:
        return caller.predict("selftest", [ROW]).num_rows == 1
    except Unauthenticated:
        return False


@contextmanager
def second_host(network):
    """A network namespace on a bridge; gives the words that run a command in it."""
    namespace.open_bridge(network)
    try:
        namespace.open_node(network.node(0))
        yield ["ip", "netns", "exec", network.node(0).namespace]
    finally:
        namespace.close(network)


ELSEWHERE = """
import json, sys, httpx
from raymill.runtime.client import Client
base, ca, key, port, host, row = sys.argv[1:]
trust = httpx.create_ssl_context(verify=ca)
def status(url, **more):
    try:
        return httpx.post(url, json={"rows": [json.loads(row)]}, verify=trust, **more).status_code
    except httpx.TransportError as err:
        return type(err).__name__
bearer = {"authorization": f"Bearer {key}"}
print(json.dumps({
    "without": status(f"{base}/predict/selftest"),
    "with": status(f"{base}/predict/selftest", headers=bearer),
    "client": Client(base, key=key, ca=ca).predict("selftest", [json.loads(row)]).num_rows,
    "replica": status(f"http://{host}:{port}/predict/selftest", headers=bearer),
    "replica management": status(f"http://{host}:{port}/raymill/flush", headers=bearer),
}))
"""


@pytest.mark.root
@pytest.mark.skipif(namespace.can_isolate() != "", reason=f"a second host needs root: {namespace.can_isolate()}")
def test_a_host_beyond_a_real_network_is_let_in_with_a_key_by_tls_alone(front):
    with second_host(front.network) as inside:
        base = f"https://{front.network.head}:{front.session.ports.https}"
        words = [base, str(front.ca), PREDICT, str(front.replica.http), front.network.head, json.dumps(ROW)]
        done = subprocess.run(
            [*inside, sys.executable, "-c", ELSEWHERE, *words], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found == {"without": 401, "with": 200, "client": 1, "replica": 403, "replica management": 403}


def test_a_renewed_certificate_is_taken_up_and_a_damaged_one_is_not(front):
    with client(front, PREDICT) as caller:
        assert caller.predict("selftest", [ROW]).num_rows == 1
    (front.folder / "cert.pem").write_text("no certificate")
    time.sleep(2.5)  # longer than the keeper's look
    assert httpx.get(f"{front.session.public_url}/healthz", verify=False).status_code == 200
    make_pair(front.folder, "127.0.0.1", front.network.head)

    def trusted():
        try:
            with client(front, PREDICT) as caller:
                return caller.predict("selftest", [ROW]).num_rows == 1
        except RequestError:
            return False

    assert until(trusted)


def test_the_front_is_one_comes_back_and_ends_with_the_head(front):
    before = {p.pid for p in ours(front)}
    start.front(front.session, front.config)
    assert {p.pid for p in ours(front)} == before
    keeper = next(p for p in ours(front) if start.FRONT_KEEPER in p.command)
    assert [f.severity for f in doctor.check_front(front.session)] == ["note"]
    os.kill(keeper.pid, 9)
    assert until(lambda: not ours(front)), "HAProxy outlives its keeper"
    assert "does not run" in next(doctor.check_front(front.session)).what
    start.front(front.session, front.config)
    with client(front, PREDICT) as caller:
        assert caller.predict("selftest", [ROW]).num_rows == 1
    for process in ours(front):
        if "haproxy" in process.command.split()[0]:
            os.kill(process.pid, 9)

    def again():
        try:
            return httpx.get(f"{front.session.public_url}/healthz", verify=False).status_code == 200
        except httpx.TransportError:
            return False

    assert until(again)
    front.gcs.kill()
    front.gcs.wait()
    assert until(lambda: not ours(front)), "the front outlives the head"
