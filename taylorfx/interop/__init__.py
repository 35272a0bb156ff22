"""In and out of PyTorch's modules."""

from taylorfx.interop import huggingface
from taylorfx.interop.capture.export import from_torch
from taylorfx.interop.capture.optional import Call
from taylorfx.interop.capture.reader import CaptureError
from taylorfx.interop.capture.rules import Value, rule
from taylorfx.interop.deployment import Deployed, deploy
from taylorfx.interop.like import LikeError
from taylorfx.interop.module import to_torch
from taylorfx.interop.optim import carry, reschedule
from taylorfx.interop.rows import Rows, keep_rows
from taylorfx.interop.runners import onnx_runtime
from taylorfx.interop.trials import holdable

__all__ = [
    "Call", "CaptureError", "Deployed", "LikeError", "Rows", "Value", "carry", "deploy", "from_torch", "holdable",
    "huggingface", "keep_rows", "onnx_runtime", "reschedule", "rule", "to_torch",
]  # fmt: skip
