"""A real S3 server for tests: moto's, in a process of its own, which ends with this one.

Of its own, since delta-rs holds Python's lock while it lists files: a server in a thread would never answer.
"""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

_SERVE = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(sys.argv[1], 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
_BUCKET = "lakes"


@dataclass(frozen=True)
class S3Server:
    """Where a running server is."""

    endpoint: str

    def url(self, prefix: str) -> str:
        """URL of a lake of that name."""
        return f"s3://{_BUCKET}/{prefix}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def running(address: str = "127.0.0.1") -> Iterator[S3Server]:
    """A server with one bucket, reached at an address of this host, until the block ends."""
    pytest.importorskip("moto")
    command = [sys.executable, "-c", _SERVE, address]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        endpoint = f"http://{address}:{int(process.stdout.readline())}"
        made = urllib.request.Request(f"{endpoint}/{_BUCKET}", method="PUT")
        with urllib.request.urlopen(made, timeout=30):
            yield S3Server(endpoint)
    finally:
        process.kill()
        process.communicate()
