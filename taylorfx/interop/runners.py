"""Networks run by other libraries, as runners of `taylorfx.cost.Timings`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taylorfx.interop.module import to_torch
from taylorfx.network.spec import Spec
from taylorfx.tree import Params

__all__ = ["onnx_runtime", "session_of"]


def onnx_runtime(params: Params, spec: Spec, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """The network as ``torch.onnx.export`` writes it, run by ONNX Runtime on as many threads as torch.

    Raises:
        ImportError: without onnxruntime and onnxscript.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's exporter uses names that torch deprecates
        program = torch.onnx.export(to_torch(params, spec).eval(), inputs, dynamo=True, verbose=False)
    assert program is not None, "torch.onnx.export gives a program where it is given no file"
    session = session_of(program.model_proto.SerializeToString())
    names = [argument.name for argument in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return lambda: session.run(None, feeds)


def session_of(model: str | bytes) -> Any:
    """ONNX Runtime's session of a file or what is in it, on as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
