"""What surrounds a run of torch.export: sizes stay symbols as far as they can; the line that fixes one is known."""

from __future__ import annotations

import io
import logging
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import sympy
import torch
from torch import Tensor, nn
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

from taylorfx.internals import alike_sizes, in_order
from taylorfx.interop.capture.shorter import shortened

__all__ = ["quiet", "tracing"]

_OPERATIONS = 60
"""The longest size that is followed, in operations: the anchors of a detector on six maps take 41."""

_OURS = tuple(f"{Path(module.__file__ or '').parent}/" for module in (torch, sys.modules["taylorfx"]))
"""Where torch's code and ours lies."""

_STANDARD = ("<", sysconfig.get_path("stdlib"))
"""Where Python's own code lies, and what lies in no file."""


@contextmanager
def tracing(module: nn.Module, *, alike: bool, patient: bool) -> Iterator[None]:
    """Trace a module with open sizes.

    Args:
        module: the one that is traced.
        alike: have torch.export treat a size of one like any other, as far as it can: it then asks, and fixes, far
            less. `taylorfx.interop.capture.proof.proven` runs the network at a size of one before it takes it.
        patient: follow sizes however long their formulas are; torch reasons for minutes about long ones.

    Raises:
        OverflowError: for a size that is too long.
    """
    ones = alike_sizes() if alike else nullcontext()
    with (
        torch.no_grad(), quiet(), _Followed(alike=alike, patient=patient), _shortened(), ones, _user_lines(),
        _own_code(module), _batched_experts(module),
    ):  # fmt: skip
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings and log about what the caller is told in one error."""
    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


_COPYING = (Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.contiguous)
"""Functions that copy if the order of the values in memory asks for it."""


class _Followed(TorchFunctionMode):
    """Follows sizes through the functions of torch, as `tracing` says; ends the export where one is too long."""

    def __init__(self, *, alike: bool, patient: bool) -> None:
        super().__init__()
        self.alike, self.patient = alike, patient

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        x = args[0] if args else None
        if self.alike and function in _COPYING and isinstance(x, Tensor) and not in_order(x):
            # Whether that is so depends on sizes: an axis of one position has no order. A copy does at all of them.
            args = (x.clone(memory_format=torch.contiguous_format), *args[1:])
        result = function(*args, **(kwargs or {}))
        for n in result.shape if isinstance(result, Tensor) and not self.patient else ():
            if isinstance(n, torch.SymInt) and n.node.expr.count_ops() > _OPERATIONS:
                raise OverflowError(f"a size with a long formula, {_user_line(sys._getframe(1))}; sizes= follows it")
        return result


@contextmanager
def _shortened() -> Iterator[None]:
    """Have every size that torch derives from others be in its short form."""
    original: Any = SymNode.__init__

    def made(node: SymNode, size: Any, *args: Any, **kwargs: Any) -> None:
        original(node, shortened(size) if isinstance(size, sympy.Expr) else size, *args, **kwargs)

    with mock.patch.object(SymNode, "__init__", made):
        yield


@contextmanager
def _own_code(module: nn.Module) -> Iterator[None]:
    """Let ``len(x)`` in the module's own code be ``x.shape[0]``, a symbol: Python's ``len`` is a plain number.

    Code of ``transformers`` that asks whether it is exported is told that it is not, and does what it does when it
    runs. For other runtimes it has loops there, of hundreds of operators for each layer.
    """
    codes = [getattr(type(part).forward, "__globals__", {}) for part in module.modules()]
    spaces = {id(space): space for space in codes if not str(space.get("__name__", "torch.")).startswith("torch.")}
    changed: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for space in spaces.values():
        names: dict[str, Any] = {} if "len" in space else {"len": _length}
        if _EXPORTING[0] in space:
            names |= dict.fromkeys(_EXPORTING, _never)
        changed.append((space, {name: space.get(name) for name in names}))
        space.update(names)
    try:
        yield
    finally:
        for space, names in changed:
            for name, former in names.items():
                if former is None:
                    del space[name]
                else:
                    space[name] = former


_EXPORTING = ("is_torchdynamo_exporting", "is_torchdynamo_compiling")
"""Functions that say whether code is traced. Only where the first one is asked, the second one is answered, too."""


def _never() -> bool:
    return False


@contextmanager
def _batched_experts(module: nn.Module) -> Iterator[None]:
    """Let experts of ``transformers`` look their matrices up, whichever way of theirs is set.

    The others depend on how many tokens each expert has, or have no derivatives under ``torch.func``.
    """
    name = "_experts_implementation"
    configs = {id(config): config for part in module.modules() if (config := vars(part).get("config")) is not None}
    held = [(config, way) for config in configs.values() if (way := getattr(config, name, None)) is not None]
    for config, _ in held:
        setattr(config, name, "batched_mm")
    try:
        yield
    finally:
        for config, way in held:
            setattr(config, name, way)


def _length(x: Sized) -> Any:
    return x.shape[0] if isinstance(x, Tensor) and x.ndim else len(x)


@contextmanager
def _user_lines() -> Iterator[None]:
    """Have every guard know the line of the user's code that led to it."""
    if not hasattr(ShapeEnv, "_get_sloc"):
        yield
        return
    original: Any = ShapeEnv._get_sloc
    passed_over = {*symbolic_shapes.uninteresting_files(), __file__}  # when torch looks for its own line

    def located(env: ShapeEnv, framework_loc: str | None = None) -> Any:
        place = original(env, framework_loc)
        return replace(place, maybe_user_loc=_user_line(sys._getframe(1)) or place.maybe_user_loc)

    with (
        mock.patch.object(ShapeEnv, "_get_sloc", located),
        mock.patch.object(symbolic_shapes, "uninteresting_files", return_value=passed_over),
    ):
        yield


def _user_line(frame: FrameType | None) -> str:
    """``"net.py:31 in forward"``, of the innermost frame that is neither torch's nor ours."""
    while frame is not None and frame.f_code.co_name != "from_torch":
        file = frame.f_code.co_filename
        standard = file.startswith(_STANDARD) and "-packages/" not in file
        if not standard and not file.startswith(_OURS):
            return f"{file.rpartition('/')[2]}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
