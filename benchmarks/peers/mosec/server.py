"""The peer mosec: JSON `{"data": [30 numbers]}`, dynamic batching, one worker; `server.py PORT MODEL`."""

import os
import sys

import numpy as np
import orjson
import xgboost
from mosec import Server, Worker


class Trees(Worker):
    """The model."""

    def __init__(self):
        self.model = xgboost.Booster({"nthread": 1})
        self.model.load_model(os.environ["MODEL"])
        self.model.set_param({"nthread": 1})

    def deserialize(self, data):
        return orjson.loads(data)["data"]

    def serialize(self, data):
        return orjson.dumps(data)

    def forward(self, data):
        p = self.model.inplace_predict(np.asarray(data, dtype=np.float32), validate_features=False)
        return [{"p": v} for v in p.tolist()]


if __name__ == "__main__":
    os.environ["MODEL"] = sys.argv[2]  # workers are processes of their own, which import this file again
    sys.argv = [sys.argv[0], "--port", sys.argv[1], "--address", "127.0.0.1", "--log-level", "warning"]
    server = Server()
    server.append_worker(Trees, num=1, max_batch_size=128, max_wait_time=1)
    server.run()
