"""What all sides of the serving benchmark serve and are sent: the model, one row and 64 rows in each form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson

from benchmarks import grpc_load
from raymill.actors.open_inference_pb2 import ModelInferRequest

WIDTH = 30


def write(folder: Path) -> None:
    """`model.ubj`; bodies: `row.lines`, `peer.lines` (64, of a row each), `row.grpc`, `rows64.json`, `rows64.bin`."""
    _train(folder / "model.ubj")
    x = np.round(np.random.default_rng(2).normal(size=(64, WIDTH)), 4).astype(np.float32)
    numbers = x.astype(float).round(4).tolist()
    ours = [orjson.dumps({"inputs": [_tensor(1, data=row)]}) for row in numbers]
    (folder / "row.lines").write_bytes(b"\n".join(ours))
    (folder / "peer.lines").write_bytes(b"\n".join(orjson.dumps({"data": row}) for row in numbers))
    (folder / "rows64.json").write_bytes(orjson.dumps({"inputs": [_tensor(64, data=numbers)]}))
    request = ModelInferRequest(model_name="bench", raw_input_contents=[x[0].tobytes()])
    request.inputs.add(name="features", datatype="FP32", shape=[1, WIDTH])
    grpc_load.write_message(folder / "row.grpc", request.SerializeToString())
    outputs = [{"name": "p", "parameters": {"binary_data": True}}]
    parameters = {"parameters": {"binary_data_size": x.nbytes}}
    head = orjson.dumps({"outputs": outputs, "inputs": [_tensor(64, **parameters)]})
    (folder / "rows64.bin").write_bytes(head + x.tobytes())


def binary_headers(body: Path) -> dict[str, str]:
    """The header that says where the JSON ends in a body of the binary extension."""
    return {"Inference-Header-Content-Length": str(body.read_bytes().index(b"}]}") + 3)}


def _tensor(rows: int, **more: object) -> dict[str, object]:
    return {"name": "features", "shape": [rows, WIDTH], "datatype": "FP32", **more}


def _train(path: Path) -> None:
    import xgboost

    random = np.random.default_rng(0)
    x = random.normal(size=(5000, WIDTH)).astype(np.float32)
    y = x[:, 0] * x[:, 1] + x[:, 2] + random.normal(size=5000) > 0
    settings = {"objective": "binary:logistic", "max_depth": 6, "nthread": 1, "seed": 0}
    xgboost.train(settings, xgboost.DMatrix(x, y), 200).save_model(path)
