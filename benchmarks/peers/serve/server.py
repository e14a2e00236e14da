"""The peer Ray Serve as its documentation shows it: one replica, `@serve.batch`; `server.py PORT MODEL GRPC_PORT`.

Over gRPC it takes the message that we take (`open_inference_pb2`, on PYTHONPATH with this folder). What is told by
environment variables (HAProxy, throughput mode) is set by who starts this. Ends when stdin closes.
"""

import sys

import numpy as np
import open_inference_pb2
import orjson
import ray
import xgboost
from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=1, max_ongoing_requests=1000, logging_config={"enable_access_log": False})
class Trees:
    """The model."""

    def __init__(self, path: str):
        self.model = xgboost.Booster({"nthread": 1})
        self.model.load_model(path)
        self.model.set_param({"nthread": 1})

    @serve.batch(max_batch_size=128, batch_wait_timeout_s=0.002)
    async def predict(self, rows: list) -> list:
        p = self.model.inplace_predict(np.asarray(rows, dtype=np.float32), validate_features=False)
        return p.tolist()

    async def ModelInfer(self, request):
        row = np.frombuffer(request.raw_input_contents[0], dtype=np.float32)
        response = open_inference_pb2.ModelInferResponse(model_name="bench")
        response.raw_output_contents.append(np.float32(await self.predict(row)).tobytes())
        return response

    async def __call__(self, request: Request):
        row = orjson.loads(await request.body())["data"]
        return {"p": await self.predict(row)}


if __name__ == "__main__":
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
    )
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(sys.argv[1])},
        grpc_options={"port": int(sys.argv[3]), "grpc_servicer_functions": ["grpc_method.add_to_server"]},
        proxy_location="HeadOnly",
    )
    serve.run(Trees.bind(sys.argv[2]), route_prefix="/")
    print("up", flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()
