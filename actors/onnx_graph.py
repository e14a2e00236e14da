"""ONNX graphs as programs, run by ONNX Runtime: on CUDA where its provider is there, else on the CPU."""

from __future__ import annotations

from typing import Any

from raymill.actors.model_files import F32, Data, Kind, Loaded, fitting
from raymill.runtime.errors import ModelError

_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


def load(data: Data) -> Loaded:
    """The program of a graph with one float input [rows, n].

    Its answer is the float output, [rows] or [rows, k]; of a classifier as skl2onnx writes it (a label, and two
    probabilities) it is the second one's, of more classes all of them.

    Raises:
        ModelError: the bytes are no graph, or it has other inputs or outputs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # replicas share their cores
    options.log_severity_level = 3
    wanted = [p for p in _PROVIDERS if p in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(bytes(data), options, providers=wanted)
    except Exception as err:  # its errors have no common base but Exception
        raise ModelError(f"{len(data)} bytes are no graph of ONNX that can be run: {_short(err)}") from err
    name, columns = _input(session.get_inputs())
    output, column = _output(session.get_outputs())

    def run(x: F32) -> Any:
        try:
            (found,) = session.run([output], {name: x})
        except Exception as err:  # as above
            raise ModelError(f"the graph fails on {list(x.shape)} float32: {_short(err)}") from err
        return found if column is None else found[:, column]

    return Loaded(kind=Kind.ONNX, run=fitting(run, columns), columns=columns)


def _input(inputs: list[Any]) -> tuple[str, int | None]:
    told = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 2:
        raise ModelError(f"the graph takes {told}: one input tensor(float) [rows, n] is served")
    rows, columns = inputs[0].shape
    if isinstance(rows, int):
        raise ModelError(f"the graph takes {told}: export it with a free number of rows (a dynamic axis)")
    return inputs[0].name, columns if isinstance(columns, int) else None


def _output(outputs: list[Any]) -> tuple[str, int | None]:
    """Name of the output that answers, and which of its columns; None: all of them."""
    told = ", ".join(f"{o.name} {o.type} {o.shape}" for o in outputs)
    if any(o.type.startswith("seq(") for o in outputs):
        raise ModelError(f"the graph gives {told}: convert it with options={{'zipmap': False}}")
    floats = [o for o in outputs if o.type in ("tensor(float)", "tensor(double)")]
    labels = [o for o in outputs if o.type in ("tensor(int64)", "tensor(string)")]
    if len(floats) != 1 or len(outputs) != len(floats) + len(labels):
        raise ModelError(f"the graph gives {told}: one float output, [rows] or [rows, k], is served")
    width = floats[0].shape[1] if len(floats[0].shape) == 2 else 1
    return floats[0].name, 1 if width == 2 and labels else None


def _short(err: Exception) -> str:
    return " ".join(str(err).split())[:300]
