"""A server as a replica's, whose answers are what the request's headers say; run by itself, with a folder for sockets.

Headers: `wait` (seconds), `size` (bytes of the answer), `ends` (a file: whoever creates it is killed by that request).
"""

import asyncio
import os
import signal
import socket
import sys
from functools import partial

import uvicorn

from raymill.actors import proxy_sockets
from raymill.actors.asgi import Reply
from raymill.actors.fast_server import Fast, NoAccounts
from raymill.actors.fastlane import FastLane
from raymill.actors.proxy_streams import Streams
from raymill.runtime.home import SOCKETS_VARIABLE


class Told:
    def submit(self, call, done):
        if path := call.headers.get("ends"):
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        reply = Reply(200, call.body.ljust(int(call.headers.get("size", 0)), b"."))
        asyncio.get_running_loop().call_later(float(call.headers.get("wait", 0)), done, reply)


async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3")]})
    await send({"type": "http.response.body", "body": b"app"})


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
