"""The Open Inference Protocol over gRPC: messages to questions and answers to messages, pure.

The same tensors, names and refusals as over HTTP (`oip.py`). An answer comes in the form its request had: raw data for
raw data, `fp32_contents` for those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from raymill.actors import oip
from raymill.actors.answering import Write, question_of, version_of
from raymill.actors.asgi import Reply
from raymill.actors.models import Answer, LoadedModel, Question
from raymill.actors.oip import Infer
from raymill.actors.open_inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataResponse,
    ServerMetadataResponse,
)
from raymill.actors.rollout import ModelSpec
from raymill.actors.wire import MAX_BODY_BYTES
from raymill.runtime.errors import RequestError, TooLarge
from raymill.runtime.ids import MAX_ID_LENGTH

PROTOBUF = "application/x-protobuf"
_OTHER_CONTENTS = tuple(f"{kind}_contents" for kind in ("bool", "int", "int64", "uint", "uint64", "fp64", "bytes"))


@dataclass(frozen=True, slots=True)
class GrpcCall:
    """A `ModelInfer`; the reply's body is a `ModelInferResponse`."""

    request: ModelInferRequest
    headers: Mapping[str, str] = field(default_factory=dict)
    """The metadata that say which trace it belongs to."""
    timeout_s: float | None = None
    """As `Call.timeout_s`; None also where gRPC's server ends a call whose deadline is over."""

    @classmethod
    def of(cls, data: bytes, headers: Mapping[str, str], timeout_s: float | None = None) -> GrpcCall:
        """The call of a message's bytes.

        Raises:
            TooLarge: they are more than `MAX_BODY_BYTES`.
            RequestError: they are no `ModelInferRequest`.
        """
        if len(data) > MAX_BODY_BYTES:
            raise TooLarge(f"the message is larger than {MAX_BODY_BYTES} bytes: split the rows over several requests")
        try:
            return cls(ModelInferRequest.FromString(data), headers, timeout_s)
        except DecodeError as err:
            raise RequestError(f"the message is no ModelInferRequest ({err}): see the protocol's .proto") from err

    @property
    def model(self) -> str:
        """Name of the model asked."""
        return self.request.model_name

    def read(self, model: LoadedModel, now_us: int) -> tuple[Question, Write]:
        """What is asked, and how to write the answer.

        Raises:
            RequestError: it is no request for this model.
            TooLarge: it has too many rows.
            UnknownVersion: it names a version that can not be.
        """
        infer = read_infer(self.request, model.spec)
        question = question_of(infer, version_of(self.request.model_version or None), now_us)
        return question, partial(_write, model.spec, infer)


def read_infer(request: ModelInferRequest, spec: ModelSpec) -> Infer:
    """A request to infer; errors as in `GrpcCall.read`."""
    if len(request.inputs) != 1:
        raise RequestError(f"there are {len(request.inputs)} inputs: send one, {oip.INPUT!r} FP32")
    if len(request.id) > MAX_ID_LENGTH:
        raise RequestError(f"'id' has {len(request.id)} characters: {MAX_ID_LENGTH} may be")
    tensor = request.inputs[0]
    oip.check_input(tensor.name, tensor.datatype, spec)
    shape = oip.check_shape(list(tensor.shape), spec)
    for wanted in request.outputs:
        if wanted.name != spec.label:
            raise RequestError(f"there is no output {wanted.name!r}: model {spec.name!r} has {spec.label!r}")
    raw = bool(request.raw_input_contents)
    x = _raw(request, shape) if raw else _contents(tensor.contents, shape)
    return oip.infer_of(oip.finite(x), request.id or None, raw)


def write_infer(spec: ModelSpec, infer: Infer, version: int, p: npt.NDArray[np.float32]) -> ModelInferResponse:
    """The answer [rows], or [rows, k]."""
    response = ModelInferResponse(model_name=spec.name, model_version=str(version), id=infer.request_id or "")
    response.parameters["prediction_id"].string_param = infer.prediction_id
    output = response.outputs.add(name=spec.label, datatype="FP32", shape=p.shape)
    if infer.binary:
        response.raw_output_contents.append(p.astype("<f4").tobytes())
    else:
        output.contents.fp32_contents.extend(p.ravel().tolist())
    return response


def server_metadata() -> ServerMetadataResponse:
    """What server this is."""
    return ServerMetadataResponse(**oip.server_metadata())


def model_metadata(spec: ModelSpec, versions: Sequence[int]) -> ModelMetadataResponse:
    """What a model takes and gives."""
    return ModelMetadataResponse(**oip.model_metadata(spec, versions))


def _write(spec: ModelSpec, infer: Infer, answer: Answer) -> Reply:
    response = write_infer(spec, infer, int(answer.versions[0]), answer.p)
    return Reply(200, response.SerializeToString(), content_type=PROTOBUF)


def _raw(request: ModelInferRequest, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    if len(request.raw_input_contents) != 1 or request.inputs[0].HasField("contents"):
        raise RequestError("send the data of the one input either in 'raw_input_contents' or in 'contents', once")
    data = request.raw_input_contents[0]
    if len(data) != 4 * shape[0] * shape[1]:
        raise RequestError(
            f"'raw_input_contents' has {len(data)} bytes, shape {list(shape)} of FP32 takes {4 * shape[0] * shape[1]}"
        )
    return np.frombuffer(data, dtype="<f4").reshape(shape).astype(np.float32)


def _contents(contents: Any, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    strange = [name for name in _OTHER_CONTENTS if len(getattr(contents, name))]
    if strange:
        raise RequestError(f"the input is FP32, but its contents are in {strange[0]!r}: use 'fp32_contents'")
    values = contents.fp32_contents
    if len(values) != shape[0] * shape[1]:
        raise RequestError(f"'fp32_contents' has {len(values)} values, shape {list(shape)} takes {shape[0] * shape[1]}")
    return np.array(values, dtype=np.float32).reshape(shape)
