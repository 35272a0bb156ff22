"""Second moments at the reads: of what layers consume, and of the loss's derivatives by it.

A removed unit's activation ``a_u`` can partly be predicted from those that stay, and a repair by least squares puts the
prediction in its place. What is lost is the rest. What that costs depends on the variance of the rest, and on how
steeply the loss depends on ``a_u``; `taylorfx.selection.surgeon` reads both off these products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from taylorfx.coupling.units import Coupling, Place
from taylorfx.internals import Function
from taylorfx.layers.roles import Mixing
from taylorfx.network.run import bind_inputs, evaluate, fitted
from taylorfx.network.spec import Spec
from taylorfx.scoring.batches import Batch, Batches, each_batch, one_by_one, sliced
from taylorfx.scoring.losses import Objective, Unvectorized, refuse_flat
from taylorfx.scoring.measurement import Measurement
from taylorfx.tree import Params, flatten, unflatten

__all__ = ["Products", "Sums", "key_of", "memory_of_products", "products"]

ROWS = 4096
"""How many positions of a batch are looked at, at most; the others are taken to be like them."""


@dataclass(frozen=True)
class Sums:
    """Of the activations ``a`` of one value and the loss's derivatives ``d`` by them: additive.

    Attributes:
        count: how many positions were looked at.
        a: ``(size,)``, the sum of ``a``.
        aa: ``(size, size)``, the sum of ``a a'``.
        dd: ``(size, size)``, the sum of ``d d'`` over all layers that read the value.
    """

    count: Tensor
    a: Tensor
    aa: Tensor
    dd: Tensor

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.count + other.count, self.a + other.a, self.aa + other.aa, self.dd + other.dd)


@dataclass(frozen=True)
class Products:
    """The sums of all values that are read, by `key_of`: batches and processes add up with ``+``.

    Attributes:
        n: the number of examples.
        sums: of every value.
        units: the names of the coupling's units.
    """

    n: int
    sums: Mapping[str, Sums] = field(default_factory=dict)
    units: tuple[str, ...] = ()

    def __add__(self, other: Products) -> Products:
        if not (self.n and other.n):
            return self if self.n else other
        if self.units != other.units:
            raise ValueError(f"Products add up when they are of the same units; received {len(self.units)} and others.")
        both = {**self.sums, **other.sums}
        mine = {key: self.sums[key] + other.sums[key] for key in self.sums.keys() & other.sums.keys()}
        return replace(self, n=self.n + other.n, sums={**both, **mine})


def key_of(spec: Spec, place: Place) -> str:
    """What reads have in common that consume one value along one axis, and can both be repaired, or neither."""
    value = spec[place.node].inputs[place.slot] if place.slot >= 0 else f"state of {place.node}"
    return f"{value}, axis {place.axis}{'' if spec[place.node].layer.role(Mixing) else ', as it is'}"


def memory_of_products(coupling: Coupling) -> int:
    """About how many bytes are in use at once, at most, while products are summed and chosen by.

    Of every value two squares of its width in single precision and two in double, and some of the widest.
    """
    places = {key_of(coupling.spec, place): place for place in coupling.reads if place.units.shape[1] > 1}
    squares = [int(place.units.shape[1]) ** 2 for place in places.values()]
    return sum(squares) * (2 * 4 + 2 * 8) + max(squares, default=0) * 8 * 5


def products(params: Params, spec: Spec, batches: Batches, coupling: Coupling, *, measurement: Measurement) -> Products:
    """Sum the products of all batches: one forward and one backward pass each, no weight gradients.

    Raises:
        ValueError: for no batch, losses that are not finite, and what `measure` refuses in a loss.
    """
    return measurement.of_all(params, coupling, lambda own: _of_one(own, spec, batches, coupling, measurement))


def _of_one(params: Params, spec: Spec, batches: Batches, coupling: Coupling, measurement: Measurement) -> Products:
    """The products of one process's batches."""
    detached = unflatten({path: leaf.detach() for path, leaf in flatten(params).items()})
    run, objective = _Pass(detached, spec, coupling), measurement.objective
    total = Products(0, units=coupling.names)
    for inputs, targets in each_batch(batches):
        batch = objective.parted(inputs, targets, spec)
        count = len(next(iter(bind_inputs(spec, (inputs,)).values())))
        size = measurement.micro_batch or count
        parts = [sliced(batch, slice(k, k + size)) for k in range(0, count, size)] if size < count else [batch]
        if coupling.mixing and objective.per_example:
            parts = one_by_one(batch, spec)
        for part in parts:
            total = run(part, objective, total)
        steepest = max((sums.dd.diagonal().max().sqrt() for sums in total.sums.values()), default=torch.ones(()))
        if not steepest:
            refuse_flat(objective, params, spec, batch, steepest, torch.ones(()))
    if not total.n and not isinstance(batches, (list, tuple)):
        raise ValueError("There is nothing to measure: received no batch. Was the iterator already used up?")
    return total


@dataclass(frozen=True, eq=False)
class _Pass:
    """One forward and one backward pass of a network, as a function of the batch and of the sums before."""

    params: Params
    spec: Spec
    coupling: Coupling

    def __call__(self, batch: Batch, objective: Objective, before: Products) -> Products:
        inputs, targets = batch
        places = {(place.node, place.slot): place for place in self.coupling.reads if place.units.shape[1] > 1}
        sums, read = dict(before.sums), set[str]()
        sinks: list[tuple[str, Tensor]] = []

        def tap(name: str, slot: int, x: Tensor) -> Tensor:
            place = places.get((name, slot))
            if place is None:
                return x
            key, some = key_of(self.spec, place), _some(x, place.axis)
            if key not in read or slot < 0:  # a state is read many times
                rows = _rows(x.detach(), place.axis, some)
                square = rows.T @ rows
                new = Sums(rows.new_tensor(len(rows)), rows.sum(0), square, _none(square))
                sums[key] = sums[key] + new if key in sums else new
                read.add(key)
            sinks.append((key, _none(sums[key].aa).requires_grad_()))
            tapped: Tensor = _Tap.apply(x, sinks[-1][1], place.axis, some)
            return tapped

        with torch.enable_grad():
            outputs, _ = evaluate(self.params, fitted(self.spec, inputs), (inputs,), tap=tap)
            try:
                losses = objective.vectorized(outputs, targets)
            except Unvectorized:
                losses = objective.plain(outputs, targets)
            if not losses.isfinite().all():
                raise ValueError("Losses have to be finite; some are not. Check the inputs and the parameters.")
            wanted = [sink for _, sink in sinks]
            follows = bool(wanted) and losses.requires_grad  # or the loss does not change with the outputs
            found = torch.autograd.grad(losses.sum(), wanted, materialize_grads=True) if follows else wanted
        for (key, _), dd in zip(sinks, found, strict=True):
            sums[key] = replace(sums[key], dd=sums[key].dd + dd.detach())
        return Products(before.n + len(losses), sums, self.coupling.names)


class _Tap(Function):
    """Identity whose second argument receives, for its gradient, the sum of ``d d'`` over examples and positions."""

    @staticmethod
    def forward(x: Tensor, sink: Tensor, axis: int, some: Tensor | None) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, _, ctx.axis, ctx.some = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (grad,) = grads
        rows = _rows(grad, ctx.axis, ctx.some)
        share = grad.numel() / max(1, rows.numel())
        return grad, share * (rows.T @ rows), None, None


def _none(square: Tensor) -> Tensor:
    """Zeros of this shape, which take no memory."""
    return square.new_zeros(()).expand_as(square)


def _some(x: Tensor, axis: int) -> Tensor | None:
    """The positions of a batch that are looked at, drawn once and for all; none for all."""
    count = x.numel() // max(1, x.shape[axis])
    if count <= ROWS:
        return None
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:ROWS].to(x.device)


def _rows(x: Tensor, axis: int, some: Tensor | None) -> Tensor:
    """``(positions, size)``, in single precision or better."""
    rows = x.movedim(axis, -1).reshape(-1, x.shape[axis])
    rows = rows if some is None else rows[some]
    return rows.to(torch.promote_types(x.dtype, torch.float32))
