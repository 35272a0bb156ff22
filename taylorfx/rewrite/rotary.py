"""A pass: a rotary embedding of queries and keys becomes one node (Su et al. 2021, arXiv 2104.09864, eq. 34).

Modules write it as products with cosines and sines, of which one is of the halves of ``x`` in the other order. That
makes six tensors, and in the backward pass fills two more with zeros. Cosines and sines do not depend on a gate, so
that the derivative is a rotation, too, and needs no activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from taylorfx.internals import Function, vectorized
from taylorfx.layers import Elementwise, Leaves
from taylorfx.layers.operators import SLOT
from taylorfx.layers.roles import Joining, Product, Slicing, Sum
from taylorfx.network.spec import Node
from taylorfx.rewrite.draft import Draft, StandIn

__all__ = ["Rotary", "rotations"]

NEGATIVE = Elementwise("neg.default", ((SLOT, 0),))


@dataclass(frozen=True)
class Rotary(StandIn):
    """``x cos + (-x2, x1) sin`` of the halves ``x1`` and ``x2`` of the last axis; the inputs are x, cos and sin."""

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        x, cos, sin = inputs
        wide = np.broadcast_shapes(x.shape, cos.shape, sin.shape) != x.shape or vectorized(x)
        if wide or not x.dtype == cos.dtype == sin.dtype or any(a.shape[-1] != x.shape[-1] for a in (cos, sin)):
            one, other = x.chunk(2, -1)
            return x * cos + torch.cat([-other, one], -1) * sin
        value: Tensor = _Rotation.apply(x, cos, sin)
        return value


class _Rotation(Function):
    """Of the inputs, cosines and sines are kept."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        one, other = sin.chunk(2, -1)
        return _rotated(x, cos, torch.cat([-one, other], -1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (cos, sin), (grad,) = ctx.saved_tensors, grads
        if grad is None:
            return None, None, None
        one, other = sin.chunk(2, -1)
        return _rotated(grad, cos, torch.cat([other, -one], -1)), None, None  # the other way around


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x cos + (x2, x1) sin``, in the order of x in memory, some positions at a time: what is between stays in the
    processor's cache."""
    y, positions = torch.empty_like(x), x.shape[-2]
    cos, sin = (a.expand(*a.shape[:-2], positions, -1) for a in (cos, sin))
    some = max(1, PIECE * positions // max(1, x.numel()))
    for piece, x_, cos_, sin_ in zip(*(torch.split(a, some, -2) for a in (y, x, cos, sin)), strict=True):
        x1, x2 = x_.chunk(2, -1)
        torch.mul(x_, cos_, out=piece).addcmul_(torch.cat([x2, x1], -1), sin_)
    return y


PIECE = 2**16
"""How many numbers are rotated at a time."""


def rotations(draft: Draft) -> Draft:
    """Replace a sum of products by a rotation where all of it is one, if nothing else uses what is between.

    x --> multiply by cos ------------------------> add --> y             x, cos, sin --> rotary --> y
      \\--> slices --> neg --> cat --> multiply by sin --/
    """
    found = {node.name: rotation for node in draft.spec.nodes if (rotation := _rotation(node, draft)) is not None}
    gone = {name for rotation in found.values() for name in rotation.between}
    nodes = [
        Node(node.name, Rotary(node.layer), found[node.name].inputs) if node.name in found else node
        for node in draft.spec.nodes
        if node.name not in gone
    ]
    return draft.rewritten(nodes)


class Rotation(NamedTuple):
    """The inputs of a rotation, and the nodes between them and its value."""

    inputs: tuple[str, str, str]
    between: tuple[str, ...]


def _rotation(node: Node, draft: Draft) -> Rotation | None:
    """That of which a node is the sum, if it is one."""
    if node.layer.role(Sum) is None or len(node.inputs) != 2 or node.inputs[0] == node.inputs[1]:
        return None
    for by_cos, by_sin in (node.inputs, node.inputs[::-1]):
        for x, cos in _by_constant(by_cos, draft):
            for turned, sin in _by_constant(by_sin, draft):
                halves = _turned(turned, x, draft)
                between = (by_cos, by_sin, turned, *halves)
                if halves and all(draft.spec.uses[name] == 1 for name in between):
                    return Rotation((x, cos, sin), between)
    return None


def _by_constant(name: str, draft: Draft) -> list[tuple[str, str]]:
    """The two factors of a product of which the second alone does not depend on a gate."""
    node = draft.spec[name]
    if node.layer.role(Product) is None or len(node.inputs) != 2:
        return []
    one, other = node.inputs
    return [(a, b) for a, b in ((one, other), (other, one)) if a in draft.gated and b not in draft.gated]


def _turned(name: str, x: str, draft: Draft) -> tuple[str, ...]:
    """The nodes by which a value is the halves of ``x`` in the other order, the first negative; none if it is not."""
    spec, cat = draft.spec, draft.spec[name]
    if x not in draft.coupling.bounds or len(cat.inputs) != 2:  # a slice taken earlier has no bound
        return ()
    *axes, size = draft.coupling.bounds[x].shape
    last, half = len(axes), size // 2
    negative, low = (spec[part] for part in cat.inputs)
    if cat.layer.role(Joining) != Joining(last) or negative.layer != NEGATIVE or size % 2:
        return ()
    high = spec[negative.inputs[0]]
    slices = [part.layer.role(Slicing) for part in (low, high)]
    whole = slices == [Slicing(last, 0, half), Slicing(last, half, size)] and low.inputs == high.inputs == (x,)
    return (negative.name, low.name, high.name) if whole else ()
