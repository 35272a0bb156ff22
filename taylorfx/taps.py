"""The taps of one pass: where activations are multiplied by their gradients and summed to the derivatives of gates.

A tap is the identity; in the backward pass it takes ``a * dL/da``. What it keeps for that is the activation ``a``, or,
where this is made anew with little work from something that is kept anyway, nothing: an activation function keeps its
input, so that what it gave out need not be kept for the linear layer that reads it (no derivative by weights asks for
it); fused attention keeps its output, of which the layer behind it reads another view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taylorfx import layers as L
from taylorfx.coupling import Place
from taylorfx.lean import Affine, Fused, Normalized
from taylorfx.spec import Node, Spec
from taylorfx.tree import Params, flatten

__all__ = ["Taps"]

ACTIVATIONS = (L.GELU, L.SiLU, L.Mish, L.Hardswish, L.Softplus)
"""They keep their input for their derivative."""

VIEWS = (L.Permute, L.View, L.Reshape, L.Flatten)


@dataclass(frozen=True)
class Origin:
    """What is kept anyway, and the steps from there to a value."""

    kept: Tensor
    steps: tuple[Callable[..., Tensor], ...] = ()
    rows: bool = True
    """The steps leave the examples where they are, first, and treat each alone."""

    def then(self, step: Callable[..., Tensor], *, rows: bool) -> Origin:
        return Origin(self.kept, (*self.steps, step), self.rows and rows)


class Taps:
    """Called by `taylorfx.spec.evaluate` at every input and output of a node; gives back the tensor, tapped or not.

    Args:
        gates: ones that receive the derivatives, ``(N, size)`` for every place, by its key as text.
        around: what activations are measured from, by place.
        moments: also sum what is read, into ``seen``.

    Attributes:
        seen: ``(4, size)`` for every place: count, sum, sum of squares and zeros of the activations.
        spread: how many positions of an example each index of a place stands for.
    """

    def __init__(
        self, params: Params, spec: Spec, places: Sequence[Place], gates: Mapping[str, Tensor],
        around: Mapping[tuple[str, int, int], Tensor], *, moments: bool,
    ) -> None:  # fmt: skip
        self.gates, self.around, self.moments = gates, around, moments
        self.leaves = flatten(params)
        self.nodes = {node.name: node for node in spec.nodes}
        self.last = {x: node.name for node in spec.nodes for x in node.inputs}
        self.places: dict[tuple[str, int], list[Place]] = {}
        for place in places:
            self.places.setdefault((place.node, place.slot), []).append(place)
        self.origins: dict[str, Origin] = {}
        self.tapped: dict[str, list[tuple[Tensor, Place, Tensor]]] = {}
        self.seen: dict[str, Tensor] = {}
        self.spread: dict[str, int] = {}

    def __call__(self, name: str, slot: int, x: Tensor) -> Tensor:
        node = self.nodes[name]
        for place in self.places.get((name, slot), ()):
            x = self._through(node, x, place)
        self._trace(node, slot, x)
        if slot < 0:  # what nobody hears any more is not held
            for heard in node.inputs:
                if self.last[heard] == name:
                    self.origins.pop(heard, None)
                    self.tapped.pop(heard, None)
        return x

    def _through(self, node: Node, x: Tensor, place: Place) -> Tensor:
        """A tensor that several layers read the same way (queries, keys and values) is tapped once for all."""
        key, size, example, gate = str(place.key), place.units.shape[1], place.example, self.gates[str(place.key)]
        self.spread[key] = x.numel() // (size * (1 if example is None else len(gate)))
        if self.moments:
            alone = x.detach()[None] if example is None else apart(x.detach(), len(gate), *example)
            self.seen[key] = activation(alone, place.axis + 1)
        heard = node.name if place.slot < 0 else node.inputs[place.slot]
        center = self.around.get(place.key)
        for given, other, made in self.tapped.get(heard, ()) if center is None else ():
            if given is x and other.axis == place.axis and np.array_equal(other.units, place.units):
                return made
        origin = (self.origins.get(heard) if type(node.layer) is L.Linear else None) or Origin(x)
        fresh: Tensor = Tap.apply(x, gate, place, center, origin.kept, origin)  # type: ignore[no-untyped-call]
        if center is None:
            self.tapped.setdefault(heard, []).append((x, place, fresh))
        return fresh

    def _trace(self, node: Node, slot: int, x: Tensor) -> None:
        """Find out what a value can be made from."""
        kind = type(node.layer)
        if slot < 0 and kind in (Fused, Normalized):
            self.origins[node.name] = Origin(x)
        elif slot == 0 and kind in (*ACTIVATIONS, *VIEWS, Affine):
            origin = Origin(x) if kind in ACTIVATIONS else self.origins.get(node.inputs[0])
            if origin is not None:
                step = partial(node.layer.apply, {leaf: self.leaves[path] for leaf, path in node.paths.items()})
                self.origins[node.name] = origin.then(step, rows=kind not in VIEWS)


class Tap(torch.autograd.Function):
    """Identity whose second argument, ``(N, size)``, receives ``a * dL/da`` summed over all axes but one, per example.

    Given a ``center``, it is ``(a - center) * dL/da``. ``kept`` is what ``a`` is made from again, or ``a``.
    A tensor that is the same for all examples, of which there is then one or a batch that trains, has one sum, of which
    every example gets the same share.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gate: Tensor, place: Place, center: Tensor | None, kept: Tensor, origin: Origin) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, gate, ctx.place, ctx.center, kept, origin = inputs
        ctx.save_for_backward(kept)
        ctx.steps, ctx.rows, ctx.count, ctx.dtype = origin.steps, origin.rows, len(gate), gate.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (x,), (grad,), axis, example = ctx.saved_tensors, grads, ctx.place.axis, ctx.place.example
        steps = ctx.steps
        straight = example == (0, 1) and len(grad) == ctx.count
        if not (straight and ctx.rows and ctx.center is None):
            for step in steps:
                x = step(x)
            x, steps = x if ctx.center is None else x - ctx.center.to(x), ()
        if example is None:
            gate = contract(x[None], grad[None], axis + 1).expand(ctx.count, -1) / ctx.count
        elif straight:
            gate = contract(x, grad, axis, steps)
        else:
            gate = contract(apart(x, ctx.count, *example), apart(grad, ctx.count, *example), axis + 1)
        return grad, gate.to(ctx.dtype), None, None, None, None


def apart(x: Tensor, count: int, axis: int, before: int) -> Tensor:
    """The examples first: ``(N, ...)``, the rest shaped as for one example."""
    split: Tensor = x.unflatten(axis, (before, count, -1)).movedim(axis + 1, 0)  # type: ignore[no-untyped-call]
    return split.flatten(axis + 1, axis + 2)


def contract(x: Tensor, y: Tensor, axis: int, steps: Sequence[Callable[..., Tensor]] = ()) -> Tensor:
    """``(x * y)`` summed over all axes but the first and ``axis``: ``(N, size)``; of ``x`` after these steps.

    A product and a sum, some examples at a time so that the product stays in the processor's cache: as fast in every
    memory format, where einsum would copy and multiply matrices of one row.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rest = [k for k in range(1, x.ndim) if k != axis]
    some = max(1, CACHED * len(x) // max(1, x.numel())) if x.device.type == "cpu" else len(x)
    parts = []
    for a, b in zip(torch.split(x, some), torch.split(y, some), strict=True):
        for step in steps:
            a = step(a)
        product = a.to(wide) * b if rest else a * b
        parts.append(product.sum(rest) if rest else product)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


CACHED = 2**20
"""How many numbers a product has that is summed up before it leaves the processor's cache."""


def activation(x: Tensor, axis: int) -> Tensor:
    """``(4, size)``: count, sum, sum of squares and zeros along ``axis``."""
    rest = [k for k in range(x.ndim) if k != axis]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = torch.full((x.shape[axis],), x.numel() // x.shape[axis], dtype=wide.dtype, device=x.device)
    return torch.stack([count, wide.sum(rest), wide.square().sum(rest), (wide == 0).to(wide.dtype).sum(rest)])
