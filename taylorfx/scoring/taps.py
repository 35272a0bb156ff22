"""The taps of one pass: where activations are multiplied by their gradients and summed to the derivatives of gates.

A tap is the identity; in the backward pass it takes ``a * dL/da``. What it keeps for that is the activation ``a``, or,
where this is made anew with little work from something that is kept anyway, nothing: an activation function or a layer
norm keeps its input, so that what it gave out need not be kept for the linear layer that reads it (no derivative by
weights asks for it); fused attention keeps its output, of which the layer behind it reads another view.

Where nobody else hears the activation function, the tap also multiplies the gradient by its derivative, part by part
while it is in the processor's cache, and over itself: it is the gradient of what is kept that then goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taylorfx import layers as L
from taylorfx.coupling.units import Place
from taylorfx.internals import Function, differentiated, vectorized
from taylorfx.network.spec import Node, Spec
from taylorfx.rewrite.fused import Fused
from taylorfx.rewrite.in_place import Over
from taylorfx.rewrite.unused import Found, Only
from taylorfx.tree import Params, flatten

followed = differentiated

__all__ = ["Sums", "Taps", "followed"]

KEEPERS = (L.GELU, L.SiLU, L.Mish, L.Hardswish, L.Softplus, L.LayerNorm)
"""They keep their input for their derivative."""

_ATEN = torch.ops.aten
SLOPES: dict[type[L.Layer], Callable[[Any, Tensor, Tensor], object]] = {
    L.GELU: lambda layer, x, y: _ATEN.gelu_backward.grad_input(y, x, approximate=layer.approximate, grad_input=y),
    L.SiLU: lambda layer, x, y: _ATEN.silu_backward.grad_input(y, x, grad_input=y),
    L.ReLU: lambda layer, x, y: _ATEN.threshold_backward.grad_input(y, x, 0, grad_input=y),
    L.ReLU6: lambda layer, x, y: _ATEN.hardtanh_backward.grad_input(y, x, 0, 6, grad_input=y),
}
"""Write over a gradient ``y`` its product with the derivative, at what is kept, ``x``."""

READERS = (L.Linear, L.Conv1d, L.Conv2d, L.Conv3d)
"""The gradients by their input are new and nobody else's."""

VIEWS = (L.Permute, L.View, L.Reshape, L.Flatten)


@dataclass(frozen=True)
class Recipe:
    """How an activation is made from what is kept."""

    steps: tuple[Callable[..., Tensor], ...] = ()
    rows: bool = True
    """The steps leave the examples where they are, first, and treat each alone."""
    new: bool = False
    """What they make is nobody else's."""
    slope: Callable[[Tensor, Tensor], object] | None = None
    """Writes over a gradient by the activation that by what is kept."""

    def then(self, step: Callable[..., Tensor], *, view: bool, slope: Any = None) -> Recipe:
        return Recipe((*self.steps, step), self.rows and not view, self.new or not view, slope)

    def __call__(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


KEPT = Recipe()
"""The activation itself is kept."""


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
        self.heard = Counter([*spec.outputs, *(x for node in spec.nodes for x in node.inputs)])
        self.last = {x: node.name for node in spec.nodes for x in node.inputs}
        self.places: dict[tuple[str, int], list[Place]] = {}
        for place in places:
            self.places.setdefault((place.node, place.slot), []).append(place)
        self.origins: dict[str, tuple[Tensor, Recipe]] = {}
        self.tapped: dict[str, list[tuple[Tensor, Place, Tensor]]] = {}
        self.seen: dict[str, Tensor] = {}
        self.spread: dict[str, float] = {}
        self.spared: dict[str, float] = {}  # how many times as many positions the network itself has

    def __call__(self, name: str, slot: int, x: Tensor) -> Tensor:
        node = self.nodes[name]
        for place in self.places.get((name, slot), ()):
            x = self._through(node, x, place)
        self._trace(node, slot, x)
        self._count(node, slot, x)
        if slot < 0:  # what nobody hears any more is not held
            for heard in node.inputs:
                if self.last[heard] == name:
                    self.origins.pop(heard, None)
                    self.tapped.pop(heard, None)
        return x

    def _through(self, node: Node, x: Tensor, place: Place) -> Tensor:
        """A tensor that several layers read the same way (queries, keys and values) is tapped once for all."""
        key, size, example, gate = str(place.key), place.units.shape[1], place.example, self.gates[str(place.key)]
        heard = node.name if place.slot < 0 else node.inputs[place.slot]
        self.spread[key] = x.numel() / (size * (1 if example is None else len(gate))) * self.spared.get(heard, 1)
        if self.moments:
            alone = x.detach()[None] if example is None else apart(x.detach(), len(gate), *example)
            self.seen[key] = activation(alone, place.axis + 1)
        center = self.around.get(place.key)
        for given, other, made in self.tapped.get(heard, ()) if center is None else ():
            if given is x and other.axis == place.axis and np.array_equal(other.units, place.units):
                return made
        kept, recipe = self.origins.get(heard, (x, KEPT))
        if type(node.layer) not in READERS or (recipe.steps and type(node.layer) is not L.Linear):
            kept, recipe = x, KEPT
        elif self.heard[heard] > 1 or vectorized(x):
            recipe = replace(recipe, slope=None)
        fresh: Tensor = Tap.apply(x, gate, place, center, kept, recipe)
        if center is None:
            self.tapped.setdefault(heard, []).append((x, place, fresh))
        return fresh

    def _count(self, node: Node, slot: int, x: Tensor) -> None:
        """Follow the positions that are not computed."""
        if isinstance(node.layer, Only):
            if slot == 0:
                self.spared[node.name] = x.shape[node.layer.dim] / (node.layer.stop - node.layer.start)
        elif slot >= 0 and node.inputs[slot] in self.spared and not isinstance(node.layer, Found):
            self.spared[node.name] = self.spared[node.inputs[slot]]

    def _trace(self, node: Node, slot: int, x: Tensor) -> None:
        """Find out what a value can be made from."""
        layer = node.layer.layer if isinstance(node.layer, Over) else node.layer
        kind = type(layer)
        slope = partial(SLOPES[kind], layer) if kind in SLOPES else None
        if slot < 0 and kind is Fused:
            self.origins[node.name] = x, KEPT
        elif slot == 0 and layer is not node.layer and slope:  # what is written over is the activation by now
            self.origins[node.name] = x, replace(KEPT, slope=slope)
        elif slot == 0 and (kind in KEEPERS or (kind in VIEWS and node.inputs[0] in self.origins)):
            kept, recipe = (x, KEPT) if kind in KEEPERS else self.origins[node.inputs[0]]
            step = partial(layer.apply, {leaf: self.leaves[path] for leaf, path in node.paths.items()})
            self.origins[node.name] = kept, recipe.then(step, view=kind in VIEWS, slope=slope)


class Tap(Function):
    """Identity whose second argument, ``(N, size)``, receives ``a * dL/da`` summed over all axes but one, per example.

    Given a ``center``, it is ``(a - center) * dL/da``. ``kept`` is what ``a`` is made from again, or ``a``.
    A tensor that is the same for all examples, of which there is then one or a batch that trains, has one sum, of which
    every example gets the same share.
    """

    @staticmethod
    def forward(x: Tensor, gate: Tensor, place: Place, center: Tensor | None, kept: Tensor, recipe: Recipe) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, gate, ctx.place, ctx.center, kept, ctx.recipe = inputs
        ctx.save_for_backward(kept)
        ctx.count, ctx.dtype = len(gate), gate.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (x,), (grad,), axis, example = ctx.saved_tensors, grads, ctx.place.axis, ctx.place.example
        recipe, center = ctx.recipe, ctx.center
        if example == (0, 1) and len(grad) == ctx.count and recipe.rows and center is None:
            gate = contract(x, grad, axis, recipe)
        else:
            value = recipe(x) if center is None else recipe(x) - center.to(x)
            if example is None:
                gate = contract(value[None], grad[None], axis + 1).expand(ctx.count, -1) / ctx.count
            else:
                gate = contract(apart(value, ctx.count, *example), apart(grad, ctx.count, *example), axis + 1)
            if recipe.slope is not None:
                recipe.slope(x, grad)
        by_activation, by_kept = (grad, None) if recipe.slope is None else (None, grad)
        return by_activation, gate.to(ctx.dtype), None, None, by_kept, None


def apart(x: Tensor, count: int, axis: int, before: int) -> Tensor:
    """The examples first: ``(N, ...)``, the rest shaped as for one example."""
    split: Tensor = x.unflatten(axis, (before, count, -1)).movedim(axis + 1, 0)  # type: ignore[no-untyped-call]
    return split.flatten(axis + 1, axis + 2)


def contract(x: Tensor, y: Tensor, axis: int, recipe: Recipe = KEPT) -> Tensor:
    """``(a * y)`` summed over all axes but the first and ``axis``: ``(N, size)``; ``a`` is made from ``x``.

    A product and a sum, some examples at a time so that the product stays in the processor's cache: as fast in every
    memory format, where einsum would copy and multiply matrices of one row. A slope is then written over ``y``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rest = [k for k in range(1, x.ndim) if k != axis]
    some = max(1, CACHED * len(x) // max(1, x.numel())) if x.device.type == "cpu" else len(x)
    parts = []
    for a, b in zip(torch.split(x, some), torch.split(y, some), strict=True):
        value = recipe(a).to(wide)
        product = value.mul_(b) if recipe.new else value * b
        parts.append(product.sum(rest) if rest else product)
        if recipe.slope is not None:
            recipe.slope(a, b)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


CACHED = 2**20
"""How many numbers a product has that is summed up before it leaves the processor's cache."""


def activation(x: Tensor, axis: int) -> Tensor:
    """``(4, size)``: count, sum, sum of squares and zeros along ``axis``."""
    rest = [k for k in range(x.ndim) if k != axis]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = torch.full((x.shape[axis],), x.numel() // x.shape[axis], dtype=wide.dtype, device=x.device)
    return torch.stack([count, wide.sum(rest), wide.square().sum(rest), (wide == 0).to(wide.dtype).sum(rest)])


@dataclass(frozen=True)
class Sums:
    """Which units' derivatives those at all places are; made once for all batches, as a copy to a device waits for it.

    Attributes:
        index: the units of all columns: one for every index of a place, and one more for every further unit that gates
            it. Where none does, it is one past the last.
        shares: for every row of units of a place, one by how many of its columns are the unit's.
        dtype: in which is summed: that of the parameters, single precision at least.
    """

    places: tuple[Place, ...]
    units: int
    index: Tensor
    shares: tuple[Tensor, ...]
    dtype: torch.dtype

    @staticmethod
    def at(places: Sequence[Place], units: int, params: Params) -> Sums:
        real = next((x for x in flatten(params).values() if x.is_floating_point()), torch.zeros(()))
        kind: dict[str, Any] = {"dtype": torch.promote_types(real.dtype, torch.float32), "device": real.device}
        rows = [row for place in places for row in place.units % (units + 1)]
        index = np.concatenate([np.zeros(0, np.int64), *rows])
        shares = np.concatenate([np.zeros(0), *(1 / np.bincount(row)[row] for row in rows)])
        split = torch.split(torch.as_tensor(shares, **kind), [len(row) for row in rows])
        return Sums(tuple(places), units, torch.as_tensor(index, device=real.device), split, kind["dtype"])

    def __call__(self, height: int, found: Mapping[str, Tensor], spread: Mapping[str, float] | None = None) -> Tensor:
        """The sums over each unit's columns, ``(height, units)``; given how far they are spread, of their means."""
        keys = [str(place.key) for place in self.places for _ in place.units]
        columns = [found[key].to(self.dtype) for key in keys]
        if spread is not None:
            columns = [x * share / spread[key] for x, share, key in zip(columns, self.shares, keys, strict=True)]
        zero = torch.zeros(height, self.units + 1, dtype=self.dtype, device=self.index.device)
        return zero.index_add(1, self.index, torch.cat([zero[:, :0], *columns], 1))[:, :-1]
