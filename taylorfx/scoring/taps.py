"""The taps of one pass: where activations are multiplied by their gradients and summed to the derivatives of gates.

A tap is the identity; in the backward pass it takes ``a * dL/da``. What each keeps for that, and where the same tap
serves several layers, is planned beforehand (`taylorfx.scoring.tap_plan`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from taylorfx.coupling.units import Place
from taylorfx.internals import Function, vectorized
from taylorfx.scoring.tap_plan import KEPT, Read, Recipe, TapPlan, Where

__all__ = ["Taps"]


class Taps:
    """Called by `taylorfx.network.run.evaluate` at every input and output of a node; returns the tensor, tapped or not.

    The plan says what to do; here is what it cannot know: the tensors, how many positions they have, and whether
    ``torch.func.vmap`` sees them.

    Args:
        gates: ones that receive the derivatives, ``(N, size)`` for every place, by its key as text; where positions are
            observations ``(N, T, size)``.

    Attributes:
        seen: ``(4, size)`` for every place: count, sum, sum of squares and zeros of the activations.
        spread: how many positions of an observation each index of a place stands for.
    """

    def __init__(self, plan: TapPlan, gates: Mapping[str, Tensor]) -> None:
        self.plan, self.gates = plan, gates
        self.kept: dict[Where, Tensor] = {}  # what activations are made from
        self.tapped: dict[int, Tensor] = {}  # what came out of the first of several twins
        self.shares: dict[str, float] = {}  # how many times as many positions there are before a node as behind it
        self.seen: dict[str, Tensor] = {}
        self.spread: dict[str, float] = {}

    def __call__(self, name: str, slot: int, x: Tensor) -> Tensor:
        stop = self.plan.stops.get((name, slot))
        if stop is None:
            return x
        for read in stop.reads:
            x = self._through(read, x)
        if stop.kept:
            self.kept[name, slot] = x
        if stop.only is not None:
            self.shares[name] = x.shape[stop.only.dim] / (stop.only.stop - stop.only.start)
        for source in stop.sources:
            del self.kept[source]
        for number in stop.twins:
            del self.tapped[number]
        return x

    def _through(self, read: Read, x: Tensor) -> Tensor:
        """The tensor, tapped; noted is what is known of it in the forward pass."""
        if read.counted:
            self._count(read, x)
        return self._tapped(read, x) if read.tapped else x

    def _count(self, read: Read, x: Tensor) -> None:
        place, gate = read.place, self.gates[read.key]
        observations = gate[..., 0].numel() / (len(gate) if place.example is None else 1)
        share = 1 if read.only is None else self.shares[read.only]
        self.spread.setdefault(read.key, 0.0)  # a state is read many times
        self.spread[read.key] += x.numel() / (place.units.shape[1] * observations) * share
        if self.plan.moments:
            rows = x.detach()[None] if place.example is None else examples_first(x.detach(), len(gate), *place.example)
            sums = _as_gated(activation_sums(rows, place.axis + 1), place)
            self.seen[read.key] = self.seen[read.key] + sums if read.key in self.seen else sums

    def _tapped(self, read: Read, x: Tensor) -> Tensor:
        gate = self.gates[read.key]
        if read.twin in self.tapped:
            return self.tapped[read.twin]
        kept, recipe = x if read.source is None else self.kept[read.source], read.recipe
        if recipe.slope is not None and vectorized(x):  # vmap has no operators that write over a gradient
            recipe = replace(recipe, slope=None)
        result: Tensor = Tap.apply(x, gate, read, kept, recipe)
        if read.twin is not None:
            self.tapped[read.twin] = result
        return result


class Tap(Function):
    """Identity whose second argument, ``(N, size)``, receives ``a * dL/da`` summed over all axes but one, per example.

    Where positions are observations it is ``(N, T, size)``: their axis is not summed over. Given a ``center``, it is
    ``(a - center) * dL/da``. ``kept`` is what ``a`` is made from again, or ``a``.
    A tensor that is the same for all examples, of which there is then one or a batch that trains, has one sum, of which
    every example gets the same share.
    """

    @staticmethod
    def forward(x: Tensor, gate: Tensor, read: Read, kept: Tensor, recipe: Recipe) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, gate, ctx.read, kept, ctx.recipe = inputs
        ctx.save_for_backward(kept)
        ctx.count, ctx.dtype = len(gate), gate.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (x,), (grad,), read, recipe = ctx.saved_tensors, grads, ctx.read, ctx.recipe
        center, example = read.center, read.place.example
        axes = (read.place.axis,) if read.position is None else (read.position, read.place.axis)
        if example == (0, 1) and len(grad) == ctx.count and recipe.rows and center is None and 0 not in axes:
            gate = contract(x, grad, axes, recipe)
        else:
            value = recipe(x) if center is None else recipe(x) - center.to(x)
            behind = tuple(axis + 1 for axis in axes)  # that of the examples, which comes first
            if example is None:
                one = contract(value[None], grad[None], behind)
                gate = one.expand(ctx.count, *one.shape[1:]) / ctx.count
            else:
                rows, slopes = (examples_first(tensor, ctx.count, *example) for tensor in (value, grad))
                gate = contract(rows, slopes, behind)
            if recipe.slope is not None:
                recipe.slope(x, grad, True)
        gate = _as_gated(gate, read.place)
        by_activation, by_kept = (grad, None) if recipe.slope is None else (None, grad)
        return by_activation, gate.to(ctx.dtype), None, by_kept, None


def _as_gated(sums: Tensor, place: Place) -> Tensor:
    """Sums along an axis, ``(..., size)``, as a place has gates: one sum where one gates the whole tensor."""
    return sums.sum(-1, keepdim=True) if place.units.shape[1] == 1 else sums


def examples_first(x: Tensor, count: int, axis: int, before: int) -> Tensor:
    """The examples first: ``(N, ...)``, the rest shaped as for one example.

    They run along ``axis``, perhaps among other factors of it, of which ``before`` is the size of the slower ones. Two
    examples, A and B, of 2 windows with 3 tokens each, as an axis of 12::

        window   0     0     1     1
                AAA   BBB   AAA   BBB         axis 0, before 2, count 2

    >>> x = torch.tensor([1, 2, 3, 10, 20, 30, 4, 5, 6, 40, 50, 60])
    >>> examples_first(x, 2, 0, 2)
    tensor([[ 1,  2,  3,  4,  5,  6],
            [10, 20, 30, 40, 50, 60]])
    """
    shape = (*x.shape[:axis], before, count, x.shape[axis] // (before * count), *x.shape[axis + 1 :])
    return x.reshape(shape).movedim(axis + 1, 0).flatten(axis + 1, axis + 2)


def contract(x: Tensor, y: Tensor, axes: Sequence[int], recipe: Recipe = KEPT) -> Tensor:
    """``a * y`` summed over all axes but the first and ``axes``: ``(N, *sizes)``; ``a`` is made from ``x``.

    A product and a sum, for some examples at a time, so that the product stays in the processor's cache. This is as
    fast in every memory format, where einsum would copy and multiply matrices of one row. A slope is then written over
    ``y``. Of 4 examples, 2 of which fit::

        x  [ 0 1 | 2 3 ]   -->   a  [ 0 1 ]   -->   a * y   -->   sums of 0 and 1   -->   y[0:2] *= slope
        y  [ 0 1 | 2 3 ]         then 2 and 3 likewise

    >>> a, y = torch.tensor([[[1., 2.], [3., 4.]]]), torch.tensor([[[1., 1.], [10., 10.]]])
    >>> contract(a, y, axes=[1])
    tensor([[ 3., 70.]])
    >>> contract(a, y, axes=[2, 1])
    tensor([[[ 1., 30.],
             [ 2., 40.]]])
    """
    some = max(1, CACHED * len(x) // max(1, x.numel())) if x.device.type == "cpu" else len(x)
    parts = []
    for a, b in zip(torch.split(x, some), torch.split(y, some), strict=True):
        parts.append(_dotted(recipe(a), b, axes, new=recipe.new))
        if recipe.slope is not None:
            recipe.slope(a, b, True)
    sums = torch.cat(parts) if len(parts) > 1 else parts[0]
    return sums if [*axes] == sorted(axes) else sums.mT


def _dotted(x: Tensor, y: Tensor, axes: Sequence[int], *, new: bool) -> Tensor:
    """The sums of products, in single precision or better. What is too large for the cache, as a long sequence is, is
    summed some positions at a time; ``x`` may be written over if it is ``new``."""
    wide, rest = torch.promote_types(x.dtype, torch.float32), [k for k in range(1, x.ndim) if k not in axes]
    if not rest:
        return x.to(wide) * y
    longest = max(rest, key=lambda k: x.shape[k])
    large = x.device.type == "cpu" and x.numel() > CACHED and not vectorized(x)
    some = max(1, x.shape[longest] * (CACHED // 4) // x.numel()) if large else max(1, x.shape[longest])
    total: Tensor | None = None
    for a, b in zip(torch.split(x, some, longest), torch.split(y, some, longest), strict=True):
        value = a.to(wide)
        part = (value.mul_(b) if new or value is not a else value * b).sum(rest)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


CACHED = 2**20
"""How many numbers a product has that is summed up before it leaves the processor's cache."""


def activation_sums(x: Tensor, axis: int) -> Tensor:
    """``(4, size)``: count, sum, sum of squares and number of zeros along ``axis``.

    >>> activation_sums(torch.tensor([[0., 2.], [3., 4.]]), axis=1)
    tensor([[ 2.,  2.],
            [ 3.,  6.],
            [ 9., 20.],
            [ 1.,  0.]])
    """
    rest = [k for k in range(x.ndim) if k != axis]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = torch.full((x.shape[axis],), x.numel() // x.shape[axis], dtype=wide.dtype, device=x.device)
    return torch.stack([count, wide.sum(rest), wide.square().sum(rest), (wide == 0).to(wide.dtype).sum(rest)])
