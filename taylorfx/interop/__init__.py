"""In and out of PyTorch's modules."""

from taylorfx.interop.capture import CaptureError, from_torch
from taylorfx.interop.module import to_torch

__all__ = ["CaptureError", "from_torch", "to_torch"]
