"""Networks run by other libraries, as runners of `taylorfx.cost.Timings`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from taylorfx.interop.module import to_torch
from taylorfx.network.spec import Spec
from taylorfx.tree import Params

__all__ = ["in_onnx", "onnx_runtime", "session_of"]


def onnx_runtime(params: Params, spec: Spec, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """The network as ``torch.onnx.export`` writes it, run by ONNX Runtime on as many threads as torch.

    Raises:
        ImportError: without onnxruntime and onnxscript.
    """
    session = session_of(in_onnx(to_torch(params, spec), inputs).model_proto.SerializeToString())
    names = [argument.name for argument in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return lambda: session.run(None, feeds)


def in_onnx(network: nn.Module | torch.export.ExportedProgram, inputs: tuple[Tensor, ...] = ()) -> Any:
    """A module on these inputs, or a program that is already exported, as a program of ONNX."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's exporter uses names that torch deprecates
        return torch.onnx.export(network, inputs, dynamo=True, verbose=False)


def session_of(model: str | bytes) -> Any:
    """ONNX Runtime's session of a file or what is in it, on as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
