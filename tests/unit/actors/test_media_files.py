"""Media by URL, against a web server of this host: what is declared is read, and nothing else is asked for."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest

from raymill.actors import media_files
from raymill.actors.media import MEDIA, lies_in
from raymill.actors.media_files import with_bytes
from raymill.runtime.errors import StoreError
from raymill.runtime.spec import Col

DATA = b"\x89PNG\r\n\x1a\n" + bytes(2000)


class Server:
    """Serves `/photos/…` by what the path says; keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                server.answer(self)

            def log_message(self, *args) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, asked: BaseHTTPRequestHandler) -> None:
        name = asked.path.rpartition("/")[2]
        moved = {
            "to-file": "file:///etc/hostname",
            "to-other": f"{self.url}/secret/a",
            "to-ftp": "ftp://127.0.0.1/a",
            "to-photo": "/photos/a",
            "round": "/photos/round",
        }.get(name)
        if moved is not None:
            asked.send_response(302)
            asked.send_header("Location", moved)
            asked.end_headers()
            return
        asked.send_response(404 if name == "gone" else 200)
        asked.end_headers()
        if name == "slow":  # a byte now and then, for ever
            for i in range(200):
                asked.wfile.write(DATA[i : i + 1])
                asked.wfile.flush()
                time.sleep(0.02)
        elif name == "silent":
            time.sleep(1)
        else:
            asked.wfile.write(DATA + b"x" * (10_000 if name == "large" else 0))


@pytest.fixture(scope="module")
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def read(server: Server, url: str, data: bytes = DATA, **more) -> bytes:
    declared = Col("media", media_types=("image/png",), max_bytes=4096, urls=(f"{server.url}/photos/",), **more)
    row = {"bytes": None, "url": url, "media_type": "image/png", "sha256": hashlib.sha256(data).hexdigest()}
    server.asked.clear()
    (found,) = with_bytes(pa.array([row], MEDIA), "photo", declared).to_pylist()
    return found["bytes"]


def test_what_lies_in_a_declared_folder_is_read_and_a_redirect_within_it_followed(server):
    assert read(server, f"{server.url}/photos/a") == DATA
    assert read(server, f"{server.url}/photos/to-photo") == DATA and server.asked == ["/photos/to-photo", "/photos/a"]


@pytest.mark.parametrize(
    "url",
    ["{}/secret/a", "{}/photos/../secret/a", "{}/photos/%2e%2e/secret/a", "{}/photos", "http://127.0.0.1:1/photos/a",
     "http://localhost@127.0.0.1/photos/a", "file:///etc/hostname", "/etc/hostname", "ftp://127.0.0.1/photos/a"],
)  # fmt: skip
def test_what_lies_elsewhere_is_not_even_asked_for(server, url):
    with pytest.raises(StoreError, match="none of its `urls`"):
        read(server, url.format(server.url))
    assert server.asked == []


@pytest.mark.parametrize("name", ["to-file", "to-other", "to-ftp"])
def test_a_redirect_to_elsewhere_or_to_another_scheme_is_not_followed(server, name):
    with pytest.raises(StoreError, match=r"sends on to|is not allowed"):
        read(server, f"{server.url}/photos/{name}")
    assert server.asked == [f"/photos/{name}"]


@pytest.mark.parametrize(
    ("name", "told"),
    [("gone", "404"), ("large", "max_bytes, 4096"), ("round", "can not be read"), ("slow", "within 0.3 s"),
     ("silent", "timed out")],
)  # fmt: skip
def test_what_is_gone_too_large_too_slow_or_goes_round_is_told(server, monkeypatch, name, told):
    monkeypatch.setattr(media_files, "TIMEOUT_S", 0.3)
    with pytest.raises(StoreError, match=told):
        read(server, f"{server.url}/photos/{name}")


def test_other_bytes_than_the_lake_has_the_checksum_of_are_refused(server):
    with pytest.raises(StoreError, match="other bytes"):
        read(server, f"{server.url}/photos/a", b"those of before")


def test_a_folder_holds_what_is_in_it_and_no_way_out():
    places = ("https://host/photos/", "/data/", "s3://bucket/")
    inside = ["https://host/photos/a.png", "/data/x/y.png", "file:///data/x", "s3://bucket/a..b"]
    outside = ["https://host/photos/", "https://host.evil/photos/a", "HTTPS://host/photos/a", "/data/../etc/passwd",
               "file:///data/%2e%2e/etc", "s3://bucket2/a", "/data/a/..\\..\\b", "data:,x", ""]  # fmt: skip
    assert [lies_in(u, places) for u in inside + outside] == [True] * 4 + [False] * 9
