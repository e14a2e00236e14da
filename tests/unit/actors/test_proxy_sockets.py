"""The replica's sockets take what waits, however many those are, until its server stops."""

import asyncio
import os
import resource
import socket
from types import SimpleNamespace

import pytest
import uvloop

from raymill.actors import proxy_sockets
from raymill.actors.proxy_sockets import ProxySockets


@pytest.mark.parametrize("by", ["unix", "tcp"])
def test_two_hundred_connections_of_a_proxy_are_taken_in_a_few_turns_of_the_loop(tmp_path, monkeypatch, by):
    async def test():
        made = []

        class Counted(asyncio.Protocol):
            def connection_made(self, transport):
                made.append(transport)

        async def reached(host, port):
            return None, SimpleNamespace(close=lambda: None)

        monkeypatch.setattr(asyncio, "open_connection", reached)
        monkeypatch.setattr(proxy_sockets, "FastLane", lambda fast: Counted())
        monkeypatch.setattr(ProxySockets, "_listening", lambda self: ("127.0.0.1", 8123, port.fileno()))
        port = socket.create_server(("127.0.0.1", 0), backlog=2048)
        names = {proxy_sockets.SOCKETS_VARIABLE: str(tmp_path), **dict.fromkeys(proxy_sockets._RANGE, "8123")}
        beside = ProxySockets(SimpleNamespace(arguments={}), names)
        await beside.open("10.0.0.7")
        path = tmp_path / "10.0.0.7_8123.sock"
        assert oct(path.stat().st_mode & 0o777) == "0o600"
        unix, tcp = (socket.AF_UNIX, str(path)), (socket.AF_INET, port.getsockname())
        family, place = unix if by == "unix" else tcp
        clients = []
        for _ in range(200):
            clients.append(socket.socket(family))
            clients[-1].connect(place)
        turns = 0
        while len(made) < len(clients):
            await asyncio.sleep(0)
            turns += 1
        assert turns < 20
        port.close()  # as uvicorn does when it stops
        with socket.socket(family) as late:
            late.connect(place)
            late.settimeout(5)
            with pytest.raises(ConnectionResetError):
                await asyncio.to_thread(late.recv, 1)
        assert len(made) == 200
        beside.close()
        assert not path.exists()
        with pytest.raises(OSError):
            socket.socket(socket.AF_UNIX).connect(str(path))
        for one in [*clients, *made]:
            one.close()

    uvloop.run(test())


def test_a_listener_without_descriptors_takes_connections_again_later(tmp_path, monkeypatch, caplog):
    async def test():
        monkeypatch.setattr(proxy_sockets, "_AGAIN_S", 0.05)
        made = asyncio.Event()

        class Told(asyncio.Protocol):
            def connection_made(self, transport):
                made.set()
                transport.close()

        listening = socket.create_server(str(tmp_path / "a.sock"), family=socket.AF_UNIX)
        listener = proxy_sockets._Listener(listening, Told, lambda: True)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket(socket.AF_UNIX) as client:
            free = os.dup(client.fileno())
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            try:
                client.connect(str(tmp_path / "a.sock"))
                await asyncio.sleep(0.2)
                assert not made.is_set()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await asyncio.wait_for(made.wait(), 5)
        listener.close()
        assert "no connection is taken" in caplog.text

    uvloop.run(test())
