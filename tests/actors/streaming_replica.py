"""A server as a replica's, whose answers are what a request's headers say; run by itself, with a folder for sockets.

Headers: `wait` (seconds), `size` (bytes of the answer), `refused` (why), `ends` (a file: whoever creates it is killed
by that request).
"""

import asyncio
import os
import signal
import socket
import sys
from functools import partial

import uvicorn

from raymill.actors import proxy_sockets
from raymill.actors.asgi import Reply, error_reply
from raymill.actors.fast_server import Fast, NoAccounts
from raymill.actors.fastlane import FastLane
from raymill.actors.oip_grpc import GrpcCall
from raymill.actors.open_inference_pb2 import ModelInferResponse
from raymill.actors.proxy_streams import Streams
from raymill.runtime.errors import RequestError
from raymill.runtime.home import SOCKETS_VARIABLE


class Told:
    def submit(self, call, done):
        if path := call.headers.get("ends"):
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        if why := call.headers.get("refused"):
            done(error_reply(RequestError(why)))
            return
        size = int(call.headers.get("size", 0))
        if isinstance(call, GrpcCall):
            answer = ModelInferResponse(id=call.request.id, raw_output_contents=[bytes(size)])
            reply = Reply(200, answer.SerializeToString())
        else:
            reply = Reply(200, call.body.ljust(size, b"."))
        asyncio.get_running_loop().call_later(float(call.headers.get("wait", 0)), done, reply)


async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    body = b"success" if scope["path"].endswith("/Healthz") else b"app"  # what HAProxy waits for from gRPC's servers
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def main(folder):
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    port = listening.getsockname()[1]
    fast = Fast(Told(), lambda app: NoAccounts())
    fast.as_streams = partial(Streams, fast)
    config = uvicorn.Config(
        lambda: app, factory=True, lifespan="off", log_level="warning", http=partial(FastLane, fast)
    )
    sockets = proxy_sockets.ProxySockets(
        fast, {SOCKETS_VARIABLE: folder, **dict.fromkeys(proxy_sockets._RANGE, str(port))}
    )
    served = asyncio.create_task(uvicorn.Server(config).serve([listening]))
    await sockets.open("10.0.0.7")
    print(port, flush=True)
    await served


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
