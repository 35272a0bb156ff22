"""Runs of torch.export: a module as a graph of operators, in inference and beside it in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind

from taylorfx.internals import equal_sizes, pytree
from taylorfx.interop.calls import stretched
from taylorfx.interop.capture.tracing import tracing
from taylorfx.interop.capture.training import Difference, align, is_plain

__all__ = ["Axis", "Example", "Opened", "cumulative", "each_tensor", "exported", "first_line", "tensors", "trained"]

T = TypeVar("T")

Example = tuple[tuple[object, ...], dict[str, object]]
"""The arguments of a call, by position and by name."""


class _Norm(Protocol):
    """A norm with running statistics."""

    running_mean: Tensor
    momentum: float | None


Axis = tuple[int, int]
"""An axis of the k-th tensor of an example."""


@dataclass(frozen=True)
class Opened:
    """What a capture leaves open, as far as the module does.

    Attributes:
        axes: these sizes.
        examples: the number of examples.
        alike: a size of one is like any other, so that torch.export asks and fixes little; that may leave sizes
            unknown. Otherwise all are taken for two or more.
        patient: follow sizes however long their formulas are.
    """

    axes: frozenset[Axis] = frozenset()
    examples: bool = True
    alike: bool = False
    patient: bool = False


def exported(module: nn.Module, example: Example, opened: Opened) -> ExportedProgram:
    """The module as a graph."""
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    for k, tensor in enumerate(tensors(example) if opened.examples else ()):
        shapes[tensor] = {0: Dim.DYNAMIC} | {axis: Dim.AUTO for n, axis in opened.axes if n == k}
    handle = module.register_forward_pre_hook(_same_number, prepend=True, with_kwargs=True)
    try:
        with tracing(module, alike=opened.alike, patient=opened.patient):
            return torch.export.export(module, *example, dynamic_shapes=shapes, strict=False)
    finally:
        handle.remove()


def _same_number(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Tell torch.export that every tensor has as many examples, as `_refuse` demands: one symbol is theirs."""
    counts = [x.shape[0] for x in tensors((args, kwargs))]
    for n in counts[1:]:
        equal_sizes(n, counts[0])


def trained(twin: nn.Module, example: Example, opened: Opened, tracked: Sequence[_Norm]) -> tuple[ExportedProgram, str]:
    """The graph of inference, into which is written what training does; and what cannot be, if anything.

    Where no size is among the arguments of the graph, training is captured at plain numbers, which takes a small part
    of the time: numbers other than the example's, so that none of them equals what inference has by chance.
    """
    program = exported(twin.eval(), example, opened)
    if opened.axes and is_plain(program):
        with suppress(Exception):
            align(program, _training(twin, _larger(example, program), Opened(examples=False), tracked))
            return program, ""
        program = exported(twin, example, opened)  # what was written into the graph until then is not taken back
    try:
        align(program, _training(twin, example, opened, tracked))
    except Difference as difference:
        return program, f"{difference}"
    except Exception as error:
        align(program, None)
        return program, f"anywhere, since it cannot be captured in training mode ({first_line(error)})"
    return program, ""


def _training(twin: nn.Module, example: Example, opened: Opened, tracked: Sequence[_Norm]) -> ExportedProgram:
    """The graph of training; the module is in inference mode afterwards."""
    try:
        for part in tracked:
            part.momentum = 0.1  # any constant: the average's own factor changes from batch to batch
        return exported(twin.train(), example, opened)
    finally:
        twin.eval()
        for part in tracked:
            part.momentum = None


def _larger(example: Example, program: ExportedProgram) -> Example:
    """The example with every axis that is open in the graph 32 positions longer, its positions over and over."""
    inputs = [x.arg.name for x in program.graph_signature.input_specs if x.kind is InputKind.USER_INPUT]
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.name in {*inputs}}
    shapes = [x.shape for x in map(values.get, inputs) if isinstance(x, Tensor)]
    larger: dict[int, Tensor] = {}
    for x, shape in zip(tensors(example), shapes, strict=True):
        larger[id(x)] = x
        for axis in [k for k, n in enumerate(shape) if k and isinstance(n, torch.SymInt) and n.node.expr.free_symbols]:
            larger[id(x)] = stretched(larger[id(x)], axis, x.shape[axis] + 32)
    return each_tensor(lambda x: larger[id(x)], example)


def cumulative(part: nn.Module) -> TypeGuard[_Norm]:
    """A norm whose running statistics are averages over all batches."""
    return getattr(part, "running_mean", None) is not None and getattr(part, "momentum", 0.1) is None


def each_tensor(function: Callable[[Tensor], Tensor], tree: T) -> T:
    changed: T = pytree.tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, tree)
    return changed


def tensors(tree: object) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
