"""The going: a `Plan` says which units stay; `cut` takes the others out of any tree shaped like the parameters.

Pruning is indexing: an index of an axis stays if all its units do. ``cut(params)`` with ``plan.spec`` computes what the
original computes under ``plan.gates`` (for exact units), which is the law that everything here is tested by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taylorfx.cutting.plan import Indices, Plan, PlanError
from taylorfx.internals import wrapped
from taylorfx.layers import Shape
from taylorfx.tree import Params, flatten, map_paths

__all__ = ["Scratch", "compose", "cut", "expand", "fits", "take"]


def cut(tree: Params, plan: Plan) -> Params:
    """Take what leaves out of a tree: the parameters, or gradients, momentum, averages of them.

    Returns a new tree; leaves that lose nothing are the same tensors, and a plan that keeps all returns the tree.

    Raises:
        PlanError: listing every leaf that is not one of the plan's parameters or not of its original shape.
    """
    fits(tree, plan.coupling.spec.shapes, "A plan cuts trees like")
    indices, scratch = plan.indices, Scratch()
    return map_paths(lambda path, leaf: take(leaf, indices[path], scratch), tree)


class Scratch(dict[torch.dtype, Tensor]):
    """Memory for what lies between two axes of a cut, by type: new pages for every tensor cost more than their use."""

    def rows(self, count: int, of: Tensor) -> Tensor:
        """So many rows like those of a tensor, with any numbers in them; the last ones that were given out are gone."""
        held = self.get(of.dtype)
        if held is None:
            held = self[of.dtype] = of.new_empty(0)
        return held.resize_(count, *of.shape[1:])


def take(leaf: Tensor, indices: Indices, scratch: Scratch) -> Tensor:
    """The kept indices of every axis of one tensor, contiguous and in memory of its own; itself if all stay.

    In main memory tensors go through the cache in blocks of rows, from which the other axes are taken: there is never
    an intermediate larger than a block. Where derivatives, transforms or a compiler look on, or on another device, axis
    follows axis.
    """
    axes = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    small = leaf.nbytes <= BLOCK
    if not axes or axes[-1][0] == 0 or (small and len(axes) == 1) or not _plain(leaf):
        for axis, index in axes:
            leaf = leaf.index_select(axis, index if leaf.is_cpu else index.to(leaf.device))
        return leaf
    bits, outer = leaf.detach().view(_WORDS[leaf.itemsize]), indices[0]
    if outer is not None:
        axes = axes[1:]
    if small:
        if outer is not None:
            bits = torch.index_select(bits, 0, outer, out=scratch.rows(len(outer), bits))
        for axis, index in axes:
            bits = bits.index_select(axis, index)
        return bits.view(leaf.dtype)
    last, index = axes.pop()
    result = bits.new_empty([n if i is None else len(i) for n, i in zip(leaf.shape, indices, strict=True)])
    step = max(1, BLOCK * len(leaf) // leaf.nbytes)
    for start in range(0, len(result), step):
        rows = bits[start : start + step]
        if outer is not None:
            kept = outer[start : start + step]
            rows = torch.index_select(bits, 0, kept, out=scratch.rows(len(kept), bits))
        for axis, middle in axes:
            rows = rows.index_select(axis, middle)
        _along(rows, last, index, result[start : start + step])
    return result.view(leaf.dtype)


BLOCK = 2**19
"""Bytes of the rows that `take` indexes at a time: they stay in a core's cache in between."""


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.float32, 8: torch.int64}
"""What is copied where an element has so many bytes: the types that torch copies fastest."""


def _along(rows: Tensor, axis: int, index: Tensor, out: Tensor) -> None:
    """One axis of a block, into its part of the result."""
    if rows.itemsize != 4 and math.prod(rows.shape[axis + 1 :]) == 1:
        # But for floats, index_select takes three times as long as gather for single elements (torch 2.13).
        flat = rows.reshape(-1, rows.shape[axis])
        torch.gather(flat, 1, index.expand(len(flat), -1), out=out.view(-1, len(index)))
    else:
        torch.index_select(rows, axis, index, out=out)


def _plain(leaf: Tensor) -> bool:
    """Nothing but real numbers in main memory: nobody differentiates, maps or traces."""
    watched = leaf.requires_grad and torch.is_grad_enabled()
    plain = type(leaf) in (Tensor, torch.nn.Parameter) and not wrapped(leaf)
    traced = watched or not plain or torch.compiler.is_compiling()
    return leaf.device.type == "cpu" and not leaf.is_complex() and not traced


def expand(tree: Params, plan: Plan) -> Params:
    """Put a cut tree back into its original shape, with zeros where something was taken out.

    Raises:
        PlanError: listing every leaf that is not of the shape that the plan cuts to.
    """
    shapes: dict[str, Shape] = {}
    for path, indices in plan.indices.items():
        sizes = _sizes(plan, path)
        shapes[path] = tuple(n if i is None else len(i) for n, i in zip(sizes, indices, strict=True))
    fits(tree, shapes, "A plan expands what it has cut of")

    def fill(path: str, leaf: Tensor) -> Tensor:
        for axis, (size, index) in enumerate(zip(_sizes(plan, path), plan.indices[path], strict=True)):
            if index is not None:
                shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])
                leaf = leaf.new_zeros(shape).index_copy(axis, index.to(leaf.device), leaf)
        return leaf

    return map_paths(fill, tree)


def compose(first: Plan, second: Plan) -> Plan:
    """Two successive plans as one against the original network.

    Raises:
        PlanError: if the second plan was not made for what the first one leaves.
    """
    if second.coupling.spec != first.spec:
        raise PlanError(
            "Plans compose when the second is of the network that the first one leaves; received one of another. "
            "Make it from couple(cut(params, first), first.spec)."
        )
    coupling = first.coupling
    alive = np.zeros(len(coupling) + 1, bool)
    survivors: dict[str, list[NDArray[np.int64]]] = {}
    for path in coupling.parameters:
        survivors[path] = []
        for axis, size in enumerate(_sizes(first, path)):
            kept = np.arange(size)
            for plan in (first, second):
                index = plan.indices[path][axis]
                kept = kept if index is None else kept[index.numpy()]
            survivors[path].append(kept)
            alive[coupling.unit_ids(path, axis)[:, kept]] = True
    plan = Plan(coupling, alive[:-1] & first.keep, " then ".join(filter(None, (first.asked, second.asked))))
    for path, kept_axes in survivors.items():
        for index, kept, size in zip(plan.indices[path], kept_axes, _sizes(first, path), strict=True):
            if not np.array_equal(np.arange(size) if index is None else index.numpy(), kept):
                raise PlanError(f"The two plans cannot be said as one: {path} would keep other indices.")
    return plan


def _sizes(plan: Plan, path: str) -> list[int]:
    return [plan.coupling.axes[number].shape[1] for number in plan.coupling.parameters[path]]


def fits(tree: Params, shapes: Mapping[str, Shape], what: str) -> None:
    """Refuse a tree with leaves that are not of these shapes; ``what`` is done with it."""
    errors: list[str] = []
    for path, leaf in flatten(tree).items():
        shape = leaf.shape if isinstance(leaf, Tensor) else None
        if path not in shapes:
            errors.append(f"{path}: the network has no such parameter")
        elif shape != shapes[path]:
            found = type(leaf).__name__ if shape is None else tuple(shape)
            errors.append(f"{path}: expected {shapes[path]}, received {found}")
    if errors:
        raise PlanError(f"{what} its own network's parameters; received:\n  " + "\n  ".join(errors))
