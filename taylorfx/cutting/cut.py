"""Cut: a `Plan` decides which units stay; `cut` takes the others out of any tree that is shaped like the parameters.

Pruning is indexing: an index of an axis stays if all its units do.

    weight (3 outputs, 4 inputs)     outputs 0 and 2 stay, inputs 0, 1 and 3 stay

        0  1  2  3
        4  5  6  7          0  1  3
        8  9 10 11          8  9 11

The law that cutting is tested by: the cut network computes what the original computes with the gates of the units that
leave at zero, ``apply(cut(params, plan), plan.spec, x) == apply(params, spec, x, gates=plan.gates)``, if these units
are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taylorfx.cutting.plan import Indices, Plan, PlanError
from taylorfx.distributed import alike, indexed, is_shared
from taylorfx.internals import wrapped
from taylorfx.layers import Shape
from taylorfx.layers.roles import Mixing
from taylorfx.network.spec import Node, Spec
from taylorfx.tree import Params, flatten, map_paths, unflatten

__all__ = ["Scratch", "compose", "cut", "expand", "fits", "take"]


def cut(tree: Params, plan: Plan) -> Params:
    """Take what leaves out of a tree: the parameters, or gradients, momentum or averages of them.

    Args:
        tree: some or all of the parameters, in their original shapes.

    Returns:
        A new tree, without what is of branches that leave. Leaves that lose nothing are the same tensors, not copies.
        Parameters that processes share (``DTensor``) are cut by all of them together, one after the other, and are
        placed as they were; the processes compare their plans first.

    Raises:
        PlanError: listing every leaf that is not one of the plan's parameters or not of its original shape.

    >>> from taylorfx import Input, couple, serial
    >>> from taylorfx.layers import Linear
    >>> spec = serial(Input((2,)), Linear(2, 3, bias=False), Linear(3, 2, bias=False))
    >>> params = {"0": {"weight": torch.arange(6).reshape(3, 2)}, "1": {"weight": torch.arange(6).reshape(2, 3)}}
    >>> plan = Plan(couple(params, spec), np.array([True, False, True]))
    >>> cut(params, plan)["0"]["weight"].tolist(), cut(params, plan)["1"]["weight"].tolist()
    ([[0, 1], [4, 5]], [[0, 2], [3, 5]])
    """
    fits(tree, plan.coupling.spec.shapes, "A plan cuts trees like")
    indices, scratch = plan.indices, Scratch()
    if plan.gone:
        tree = unflatten((path, leaf) for path, leaf in flatten(tree).items() if path not in plan.gone)
    alike(tree, f"plan {plan.digest}")
    return map_paths(lambda path, leaf: _taken(leaf, indices[path], scratch), tree)


def _taken(leaf: Tensor, indices: Indices, scratch: Scratch) -> Tensor:
    """What stays of one tensor, which processes may share."""
    return indexed(leaf, indices, partial(take, scratch=scratch)) if is_shared(leaf) else take(leaf, indices, scratch)


class Scratch(dict[torch.dtype, Tensor]):
    """Memory for intermediate results of cuts, by type. To take new memory for each costs more time than to cut."""

    def rows(self, count: int, of: Tensor) -> Tensor:
        """A tensor of ``count`` rows like those of another, with any values, in the memory of the last one."""
        memory = self.get(of.dtype)
        if memory is None:
            memory = self[of.dtype] = of.new_empty(0)
        return memory.resize_(count, *of.shape[1:])


def take(leaf: Tensor, indices: Indices, scratch: Scratch) -> Tensor:
    """Take the kept indices of every axis of one tensor.

    In main memory a large tensor is cut block by block, so that intermediate results stay in the cache:

        rows that stay      a block of them       their other axes       the last axis, into the result
        0 2 3 5 7 8    ->   0 2 3            ->   index_select      ->   result[0:3]
                            5 7 8            ->   index_select      ->   result[3:6]

    On another device, and where derivatives, transforms or a compiler follow the tensor, one axis is cut after the
    other.

    Returns:
        A contiguous tensor with memory of its own; the tensor itself if all indices stay.
    """
    axes = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    small = leaf.nbytes <= BLOCK
    if not axes or axes[-1][0] == 0 or (small and len(axes) == 1) or not _plain(leaf):
        for axis, index in axes:
            leaf = leaf.index_select(axis, index if leaf.is_cpu else index.to(leaf.device))
        return leaf
    bits = leaf.detach().view(_WORDS[leaf.itemsize])
    return (_at_once if small else _by_blocks)(bits, indices, scratch).view(leaf.dtype)


def _at_once(bits: Tensor, indices: Indices, scratch: Scratch) -> Tensor:
    """Cut one axis after the other. What lies between the first and the second one is in the scratch."""
    outer = indices[0]
    if outer is not None:
        bits = torch.index_select(bits, 0, outer, out=scratch.rows(len(outer), bits))
    for axis, index in enumerate(indices):
        if axis and index is not None:
            bits = bits.index_select(axis, index)
    return bits


def _by_blocks(bits: Tensor, indices: Indices, scratch: Scratch) -> Tensor:
    """Cut block by block of the rows that stay. Some axis but the first one loses something."""
    outer = indices[0]
    *between, (last, final) = [(k, index) for k, index in enumerate(indices) if k and index is not None]
    result = bits.new_empty([n if i is None else len(i) for n, i in zip(bits.shape, indices, strict=True)])
    step = max(1, BLOCK * len(bits) // bits.nbytes)
    for start in range(0, len(result), step):
        rows = bits[start : start + step]
        if outer is not None:
            kept = outer[start : start + step]
            rows = torch.index_select(bits, 0, kept, out=scratch.rows(len(kept), bits))
        for axis, index in between:
            rows = rows.index_select(axis, index)
        _along(rows, last, final, result[start : start + step])
    return result


BLOCK = 2**19
"""Bytes of the rows that `take` cuts at a time: they fit into the cache of a core."""


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.float32, 8: torch.int64}
"""By the bytes of an element, the type as which it is copied: the one that torch copies fastest."""


def _along(rows: Tensor, axis: int, index: Tensor, out: Tensor) -> None:
    """Cut one axis of a block into its part of the result."""
    if rows.itemsize != 4 and math.prod(rows.shape[axis + 1 :]) == 1:
        # Unless they are floats, index_select takes three times as long as gather for single elements (torch 2.13).
        flat = rows.reshape(-1, rows.shape[axis])
        torch.gather(flat, 1, index.expand(len(flat), -1), out=out.view(-1, len(index)))
    else:
        torch.index_select(rows, axis, index, out=out)


def _plain(leaf: Tensor) -> bool:
    """Whether a tensor is nothing but real numbers in main memory: no derivative, transform or compiler follows it."""
    watched = leaf.requires_grad and torch.is_grad_enabled()
    plain = type(leaf) in (Tensor, torch.nn.Parameter) and not wrapped(leaf)
    traced = watched or not plain or torch.compiler.is_compiling()
    return leaf.device.type == "cpu" and not leaf.is_complex() and not traced


def expand(tree: Params, plan: Plan, *, like: Params | None = None) -> Params:
    """Bring a cut tree back to its original shapes, with zeros where something was taken out.

    What left as a whole, with a branch, comes back as zeros: on the device of the first leaf and in its dtype, unless
    the layer's own are whole numbers. With ``gates=plan.gates`` the original network then computes what the smaller one
    does; without them, where a branch of zeros gives out zeros.

    Args:
        like: the original parameters. What left as a whole then has their dtypes and devices, and buffers have their
            numbers: a captured module may have tables of whole numbers (positions to look up, masks), of which a layer
            knows the dtype, but not the numbers.

    Raises:
        PlanError: listing every leaf that is not of the shape that the plan cuts to, or of ``like`` cuts from.
    """
    shapes: dict[str, Shape] = {}
    for path, indices in plan.indices.items():
        sizes = _sizes(plan, path)
        shapes[path] = tuple(n if i is None else len(i) for n, i in zip(sizes, indices, strict=True))
    fits(tree, shapes, "A plan expands what it has cut of")
    fits(like or {}, plan.coupling.spec.shapes, "A plan expands a tree like")

    def fill(path: str, leaf: Tensor) -> Tensor:
        for axis, (size, index) in enumerate(zip(_sizes(plan, path), plan.indices[path], strict=True)):
            if index is not None:
                shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])
                leaf = leaf.new_zeros(shape).index_copy(axis, index.to(leaf.device), leaf)
        return leaf

    expanded = map_paths(fill, tree)
    return unflatten({**flatten(expanded), **_zeros(tree, plan, flatten(like or {}))}) if plan.gone else expanded


def _zeros(tree: Params, plan: Plan, original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that left as a whole, as zeros; of the original buffers, if there are any, the numbers."""
    spec, leaves = plan.coupling.spec, list(flatten(tree).values())
    first = next((leaf for leaf in leaves if leaf.is_floating_point()), torch.zeros(()))
    like = {path: original.get(path, first) for path in spec.shapes if path in plan.gone}
    zeros = {path: leaf.new_zeros(spec.shapes[path]) for path, leaf in like.items()}
    for node in spec:
        if node.layer.buffers and not plan.gone.isdisjoint(node.paths.values()):
            fresh = node.layer.init(torch.Generator())
            for path, leaf in ((node.path(leaf), leaf) for leaf in node.layer.buffers):
                if path in zeros:
                    dtype = like[path].dtype if fresh[leaf].is_floating_point() else fresh[leaf].dtype
                    zeros[path] = original.get(path, zeros[path].to(dtype))
    return zeros


def compose(first: Plan, second: Plan) -> Plan:
    """Two successive plans as one plan for the original network.

        indices of an axis       0  1  2  3  4  5
        the first keeps          0     2  3     5
        the second, of those     0        2  3          its indices are those of the smaller network
        together                 0        3     5

    Between the two, layers may have gained biases from a repair. They are not of the original network, so that the one
    plan says nothing of them.

    Raises:
        PlanError: if the second plan is not of the network that the first one leaves, or if no plan keeps just what
            both keep.
    """
    if not _same_but_for_biases(first.spec, second.coupling.spec):
        raise PlanError(
            "Plans compose if the second is of the network that the first one leaves; received one of another network. "
            "Select it for couple(cut(params, first), first.spec)."
        )
    coupling, leave = first.coupling, {x.operand for x in second.coupling.branches if not second.keep[x.unit]}
    if strange := {node for node, _ in leave - first.operands.keys()}:
        raise PlanError(
            "The units of the first plan tell what both keep; received a second plan without the branches of "
            f"{', '.join(sorted(strange))}, which are no units of the first. Make that for couple(..., branches=True)."
        )
    alive = np.zeros(len(coupling) + 1, bool)
    alive[[branch.unit for branch in coupling.branches]] = True
    alive[[branch.unit for operand in leave for branch in first.operands[operand]]] = False
    survivors: dict[str, list[NDArray[np.int64]]] = {}
    for path in (path for path in first.indices if path in second.indices):
        survivors[path] = []
        for axis, size in enumerate(_sizes(first, path)):
            kept = np.arange(size)
            for plan in (first, second):
                index = plan.indices[path][axis]
                kept = kept if index is None else kept[index.numpy()]
            survivors[path].append(kept)
            alive[coupling.unit_ids(path, axis)[:, kept]] = True
    plan = Plan(coupling, alive[:-1] & first.keep, " then ".join(filter(None, (first.asked, second.asked))))
    others = [*(survivors.keys() ^ plan.indices.keys())]
    for path, kept_axes in survivors.items() if not others else ():
        for index, kept, size in zip(plan.indices[path], kept_axes, _sizes(first, path), strict=True):
            if not np.array_equal(np.arange(size) if index is None else index.numpy(), kept):
                others.append(path)
    if others:
        raise PlanError(
            "Two plans are one if some units of the first network keep what both keep; received plans for which "
            f"{others[0]} would keep other indices. Apply them one after the other."
        )
    return plan


def _same_but_for_biases(before: Spec, after: Spec) -> bool:
    """Whether a network is another one, some layers of which may have gained a bias."""
    if before == after or len(before) != len(after):
        return before == after

    def gained(one: Node, other: Node) -> bool:
        role, biased = (node.layer.role(Mixing) for node in (one, other))
        return role is not None and biased is not None and biased.has_bias and role.with_bias() == other.layer

    return replace(after, nodes=before.nodes) == before and all(
        one == other or (replace(one, layer=other.layer) == other and gained(one, other))
        for one, other in zip(before, after, strict=True)
    )


def _sizes(plan: Plan, path: str) -> list[int]:
    """The original shape of a parameter."""
    return [plan.coupling.axes[number].shape[1] for number in plan.coupling.parameters[path]]


def fits(tree: Params, shapes: Mapping[str, Shape], what: str) -> None:
    """Refuse a tree with leaves that are not of these shapes.

    Args:
        what: the beginning of the error: what takes the parameters of its own network.

    Raises:
        PlanError: listing every such leaf.
    """
    errors: list[str] = []
    for path, leaf in flatten(tree).items():
        shape = leaf.shape if isinstance(leaf, Tensor) else None
        if path not in shapes:
            errors.append(f"{path}: the network has no such parameter")
        elif shape != shapes[path]:
            received = type(leaf).__name__ if shape is None else tuple(shape)
            errors.append(f"{path}: expected {shapes[path]}, received {received}")
    if errors:
        advice = ""
        if {"state", "param_groups"} <= tree.keys() and not shapes.keys() & flatten(tree).keys():
            advice = (
                "\nThis is the state of an optimizer of torch: taylorfx.interop.carry(optimizer, plan, ...) cuts it."
            )
        raise PlanError(f"{what} its own network's parameters; received:\n  " + "\n  ".join(errors) + advice)
