"""In and out of PyTorch's modules."""

from taylorfx.interop.capture import from_torch
from taylorfx.interop.like import LikeError
from taylorfx.interop.module import to_torch
from taylorfx.interop.reader import CaptureError
from taylorfx.interop.rules import Value, rule

__all__ = ["CaptureError", "LikeError", "Value", "from_torch", "rule", "to_torch"]
