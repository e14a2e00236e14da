"""Who is let in: verdicts on keys of every kind, the same down both lanes and over gRPC, and changes as they come."""

import asyncio
import time
from functools import partial

import grpc
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from raymill.actors import door as door_module
from raymill.actors import grpc_service, selftest
from raymill.actors.access import KeySet, right_for
from raymill.actors.door import Door
from raymill.actors.fast_server import Fast
from raymill.actors.fastlane import FastLane
from raymill.actors.rollout import to_user_config
from raymill.actors.selftest import converse, masked, post
from raymill.actors.serving import ServingReplica
from raymill.runtime.api_keys import ApiKey, KeyPolicy, Right, digest_of, new_key
from raymill.runtime.errors import Unavailable

NOW = 1_000.0
KEYS = {name: new_key() for name in ("both", "predict", "manage", "expired", "revoked", "tomorrow")}


def stored(name, **fields):
    rights = {"predict": (Right.PREDICT,), "manage": (Right.MANAGE,)}.get(name, tuple(Right))
    return ApiKey(digest=digest_of(KEYS[name]), tenant="acme", rights=rights, created_s=1.0, **fields)


STORED = [
    stored("both"),
    stored("predict"),
    stored("manage"),
    stored("expired", expires_s=NOW),
    stored("revoked", revoked_s=2.0),
    stored("tomorrow", expires_s=NOW + 1),
]
WHOLE = [*STORED[:4], stored("revoked"), STORED[5]]


class Book:
    """Gives the keys that it was given; `away`: nobody answers."""

    def __init__(self, *keys):
        self.stamp, self.keys, self.away = 1, list(keys), False

    def keys_changed_since(self, stamp):
        if self.away:
            raise Unavailable("the records do not answer")
        return None if stamp == self.stamp else (self.stamp, [k for k in self.keys if k.revoked_s is None])

    def change(self, *keys):
        self.keys, self.stamp = list(keys), self.stamp + 1


def opened(policy=KeyPolicy.ALL, book=None, now=NOW):
    found = Door(policy, book or Book(*STORED), clock=lambda: now)
    found.look()
    return found


def status(reply):
    return 200 if reply is None else reply.status


@pytest.mark.parametrize(
    ("name", "predict", "manage"),
    [
        ("both", 200, 200),
        ("predict", 200, 403),
        ("manage", 403, 200),
        ("tomorrow", 200, 200),
        ("expired", 401, 401),
        ("revoked", 401, 401),
    ],
)
def test_a_key_opens_what_its_rights_say_while_it_holds(name, predict, manage):
    door = opened()
    for spelling in ("Bearer", "bearer", "BEARER"):
        headers = {"authorization": f"{spelling} {KEYS[name]}"}
        for _ in range(2):  # the second time it is known
            found = [status(door.refusal(headers, right, True)) for right in Right]
            assert found == [predict, manage]


EDITS = st.tuples(st.integers(0, 45), st.characters(codec="latin-1"), st.sampled_from(["replace", "insert", "cut"]))


@given(edits=st.lists(EDITS, min_size=1, max_size=3), name=st.sampled_from(sorted(KEYS)))
def test_what_is_nearly_a_key_is_none(edits, name):
    text = KEYS[name]
    for at, letter, how in edits:
        text = text[:at] + ("" if how == "cut" else letter) + text[at + (how != "insert") :]
    assert (KeySet(WHOLE).bearer(f"Bearer {text}") is not None) == (text.strip(" ") in KEYS.values())


@given(st.one_of(st.none(), st.text(st.characters(codec="latin-1"), max_size=600)))
def test_no_header_is_too_odd_to_be_refused(text):
    headers = {} if text is None else {"authorization": text}
    refusal = opened().refusal(headers, Right.PREDICT, True)
    assert refusal.status == 401 and refusal.headers["www-authenticate"].startswith('Bearer realm="raymill"')
    assert ("invalid_token" in refusal.headers["www-authenticate"]) == (text is not None)


def test_many_spellings_of_a_key_take_no_memory():
    keys = KeySet(STORED)
    for spaces in range(400):
        assert keys.bearer("Bearer " + " " * spaces + KEYS["both"]) is not None
        assert keys.bearer("Bearer " + " " * spaces + "rm_wrong") is None
    assert len(keys._known) < 30


@pytest.mark.parametrize("policy", KeyPolicy)
def test_who_needs_a_key_is_said_by_where_the_request_comes_from(policy):
    door = opened(policy, Book(*STORED) if policy is not KeyPolicy.OFF else Book())
    key = {"authorization": f"Bearer {KEYS['both']}"}
    here = status(door.refusal({}, Right.PREDICT, True))
    assert here == (401 if policy is KeyPolicy.ALL else 200)
    for mark in ("x-forwarded-for", "forwarded"):
        away = {mark: "127.0.0.1"}  # whatever it says
        assert status(door.refusal(away, Right.PREDICT, True)) == (403 if policy is KeyPolicy.OFF else 401)
        with_key = status(door.refusal({**away, **key}, Right.MANAGE, True))
        assert with_key == (403 if policy is KeyPolicy.OFF else 200)
        assert status(door.refusal(away, None, True)) == 200
    assert status(door.refusal(key, Right.PREDICT, False)) == 403  # past the proxy, by the replica's own port


def test_the_right_that_a_path_needs():
    assert right_for(("raymill", "flush")) is Right.MANAGE and right_for(("raymill",)) is Right.MANAGE
    assert right_for(("healthz",)) is None and right_for(("v2", "health", "live")) is None
    assert {right_for(p) for p in [("",), ("v2", "health", "ready"), ("predict", "m"), ("x",)]} == {Right.PREDICT}


def test_keys_come_and_go_and_what_is_known_outlasts_the_records():
    book, now = Book(stored("both")), [NOW]
    door = Door(KeyPolicy.ALL, book, clock=lambda: now[0])
    door.look()

    def ask(name):
        return status(door.refusal({"authorization": f"Bearer {KEYS[name]}"}, Right.PREDICT, True))

    assert (ask("both"), ask("predict")) == (200, 401)
    book.change(stored("both"), stored("predict"))
    door.look()
    assert (ask("both"), ask("predict")) == (200, 200)
    book.change(stored("both", revoked_s=3.0), stored("predict"))
    door.look()
    assert (ask("both"), ask("predict")) == (401, 200)
    book.away = True
    with pytest.raises(Unavailable):
        door.look()
    assert ask("predict") == 200


def test_a_key_expires_also_while_the_records_are_away():
    book, now = Book(*STORED), [NOW]
    door = Door(KeyPolicy.ALL, book, clock=lambda: now[0])
    door.look()
    headers = {"authorization": f"Bearer {KEYS['tomorrow']}"}
    assert door.refusal(headers, Right.PREDICT, True) is None
    book.away, now[0] = True, NOW + 1
    assert status(door.refusal(headers, Right.PREDICT, True)) == 401


def test_a_door_goes_on_asking_while_it_is_open(monkeypatch):
    monkeypatch.setattr(door_module, "LOOK_S", 0.01)
    book = Book()
    door = Door(KeyPolicy.ALL, book, clock=lambda: NOW)
    door.start()
    book.away = True
    time.sleep(0.05)
    book.away = False
    book.change(stored("both"))
    headers, end = {"authorization": f"Bearer {KEYS['both']}"}, time.monotonic() + 10
    while door.refusal(headers, Right.PREDICT, True) is not None and time.monotonic() < end:
        time.sleep(0.01)
    assert door.refusal(headers, Right.PREDICT, True) is None
    door.stop()


def test_a_replica_that_can_not_learn_the_keys_does_not_start():
    book = Book()
    book.away = True
    with pytest.raises(Unavailable):
        Door(KeyPolicy.BEYOND, book).start()
    Door(KeyPolicy.OFF, book).start()


class Records(Book):
    """Keys and programs."""

    def program(self, digest):
        return digest.encode()


async def keyed(home, policy):
    found = ServingReplica(
        home, **{**selftest.stand_ins(), "records": Records(*[k for k in STORED if k.expires_s is None])}, keys=policy
    )
    found.start()
    await found.reconfigure(to_user_config([selftest.spec()]))
    return found


HEADS = st.lists(
    st.one_of(
        st.sampled_from(sorted(KEYS)).map(lambda name: f"Authorization: Bearer {KEYS[name]}"),
        st.sampled_from(["X-Forwarded-For: 10.0.0.1", "Forwarded: for=10.0.0.1", "Authorization: Basic eDp5"]),
        st.text("rm_abc", max_size=9).map(lambda text: f"Authorization: Bearer {text}"),
    ),
    max_size=3,
)


@pytest.fixture(scope="module")
def lanes(tmp_path_factory):
    """Sends bytes down both lanes of a replica of each policy; the two replies, and how many the fast lane took."""
    loop = asyncio.new_event_loop()
    home = tmp_path_factory.mktemp("keyed")
    replicas = {p: loop.run_until_complete(keyed(home / p, p)) for p in KeyPolicy}
    apps = {p: selftest.as_serve_does(r.__serve_build_asgi_app__()) for p, r in replicas.items()}
    fasts = {p: Fast(r, refusal=r.door.refusal) for p, r in replicas.items()}

    def send(policy, data):
        fast, app = fasts[policy], apps[policy]
        before = fast.requests
        quick = loop.run_until_complete(converse(partial(FastLane, fast), app, data))
        plain = loop.run_until_complete(converse(HttpToolsProtocol, app, data))
        return masked(quick), masked(plain), fast.requests - before

    yield send
    for found in replicas.values():
        found.stop()
    loop.close()


@settings(max_examples=40, deadline=None)
@given(heads=HEADS, policy=st.sampled_from(KeyPolicy), sound=st.booleans())
def test_both_lanes_answer_a_head_of_any_kind_alike(lanes, heads, policy, sound):
    body = b'{"rows": [{"id": "a", "amount": 2.5}], "at": "2020-01-01T00:00:00Z"}' if sound else b"no JSON"
    quick, plain, taken = lanes(policy, post("/predict/selftest", body, *heads))
    assert taken == 1
    assert quick == plain
    assert int(quick.split(b" ")[1]) in (200, 400, 401, 403)


def test_a_wrong_key_is_refused_before_the_body_is_decoded(lanes):
    quick, plain, _ = lanes(KeyPolicy.ALL, post("/predict/selftest", b"no JSON", "Authorization: Bearer rm_wrong"))
    assert quick.startswith(b"HTTP/1.1 401") and plain.startswith(b"HTTP/1.1 401")
    assert b'www-authenticate: Bearer realm="raymill", error="invalid_token"' in quick


def test_a_body_that_is_still_on_its_way_is_not_waited_for_nor_kept(tmp_path):
    async def test():
        found = await keyed(tmp_path, KeyPolicy.ALL)
        app = selftest.as_serve_does(found.__serve_build_asgi_app__())
        config = uvicorn.Config(lambda: app, factory=True, lifespan="off", log_config=None)
        config.load()
        fast = Fast(found, refusal=found.door.refusal)
        protocol = FastLane(fast, config=config, server_state=uvicorn.server.ServerState(), app_state={})
        wire, size = selftest.Wire(), 8 << 20
        protocol.connection_made(wire)
        protocol.data_received(post("/predict/selftest", b"x" * size, last=False)[:5000])
        while not wire.sent:
            await asyncio.sleep(0.001)
        assert wire.sent.startswith(b"HTTP/1.1 401")
        for _ in range(size >> 16):
            protocol.data_received(b"x" * (64 << 10))
            assert protocol._held == b"" and protocol._parts == []
        protocol.connection_lost(None)
        found.stop()

    asyncio.run(asyncio.wait_for(test(), 20))


def test_grpc_asks_the_same_door(tmp_path):
    from raymill.actors import open_inference_pb2 as pb

    async def test():
        found = await keyed(tmp_path, KeyPolicy.ALL)
        grpc_service.answer_with(found)
        server = grpc.aio.server()
        grpc_service.add_to_server(None, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

            async def code(method, *metadata):
                call = channel.unary_unary(f"/{grpc_service.SERVICE}/{method}")
                try:
                    await call(pb.ServerLiveRequest().SerializeToString(), metadata=metadata, timeout=10)
                except grpc.aio.AioRpcError as err:
                    return err.code().name
                return "OK"

            def bearer(name):
                return ("authorization", f"Bearer {KEYS[name]}")

            assert await code("ServerLive") == "OK"
            assert await code("ServerReady") == "UNAUTHENTICATED"
            assert await code("ServerReady", ("authorization", "Bearer rm_wrong")) == "UNAUTHENTICATED"
            assert await code("ModelInfer", bearer("revoked")) == "UNAUTHENTICATED"
            assert await code("ServerReady", bearer("manage")) == "PERMISSION_DENIED"
            assert await code("ServerReady", bearer("both")) == "OK"
            assert await code("ModelInfer", bearer("both")) == "NOT_FOUND"  # let in, and asks for no model
            stream = channel.stream_stream(f"/{grpc_service.SERVICE}/ModelStreamInfer")(iter([b""]), timeout=10)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        await server.stop(0)
        found.stop()

    asyncio.run(test())
