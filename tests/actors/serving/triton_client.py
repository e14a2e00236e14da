"""What a user of tritonclient does, HTTP and gRPC alike; run by `test_answers.py` in an environment of its own."""

import json
import sys

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException


def tell(kind, url: str, model: str) -> dict:
    """Readiness, metadata, an answer and refusals."""
    client = kind.InferenceServerClient(url)
    x = np.array([[1.0, 2.0], [np.nan, 4.0], [0.5, -1.0]], dtype=np.float32)

    def infer(name=model, version="", columns=2):
        tensor = kind.InferInput("features", [3, columns], "FP32")
        tensor.set_data_from_numpy(np.ascontiguousarray(x[:, :columns]))
        return client.infer(name, [tensor], model_version=version, request_id="mine")

    def refused(ask, *given, **named):
        try:
            ask(*given, **named)
        except InferenceServerException as err:
            return err.message()
        return "it was not refused"

    answer = infer()
    response = answer.get_response()
    metadata = client.get_model_metadata(model)
    if kind is tritonclient.grpc:
        metadata = client.get_model_metadata(model, as_json=True)
        response = answer.get_response(as_json=True)
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(model),
        "server": dict(
            client.get_server_metadata(as_json=True) if kind is tritonclient.grpc else client.get_server_metadata()
        )["name"],
        "inputs": [t["name"] for t in metadata["inputs"]],
        "id": response["id"],
        "p": answer.as_numpy("long").tolist(),
        "no_model": refused(infer, "bus"),
        "no_version": refused(infer, version="9"),
        "narrow": refused(infer, columns=1),
    }


if __name__ == "__main__":
    http_url, grpc_url, name = sys.argv[1:]
    print(
        json.dumps({"http": tell(tritonclient.http, http_url, name), "grpc": tell(tritonclient.grpc, grpc_url, name)})
    )
