"""Gates at the reads, and the derivatives of the loss with respect to them.

Every unit ``u`` owns one scalar gate ``m_u``. Wherever a layer mixes channels, the activation ``a`` that it reads is
multiplied by the gates of its channels. So ``m = 1`` is the network, ``m_u = 0`` is the network without ``u``, and

    dL/dm_u = sum over the unit's reads and positions of  a * dL/da,

the first-order Taylor term of Molchanov et al. 2016 (arXiv 1611.06440, eq. 8, without its mean over positions). Giving
every example gates of its own yields all per-example derivatives from a single backward pass.

Weights are not differentiated: one ``torch.func.vjp`` runs over the activations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.coupling import Coupling, Place
from taylorfx.spec import Inputs, Spec, bind_inputs, check, evaluate
from taylorfx.tree import Params, flatten

__all__ = ["Batch", "Gates", "Loss", "Moments", "Statistics", "cross_entropy", "derivatives", "gates", "measure"]

Gates = dict[tuple[str, int, int], Tensor]
"""Factors at the reads, by node, input and axis, ready to broadcast."""

Batch = tuple[Inputs, Any]
"""``(inputs, targets)``."""

Loss = Callable[[Any, Any], Tensor]
"""``loss(outputs, targets)``, called on every example as a batch of one, so that mean and sum are the same."""


def gates(coupling: Coupling, values: Tensor) -> Gates:
    """Lay the values of the units' gates out at the reads, for ``apply(..., gates=...)``.

    Args:
        values: ``(units,)``, or ``(N, units)`` for a batch of ``N`` examples with gates of their own. A mask (0 or 1)
            removes units, anything between softens them; differentiable.
    """
    if values.ndim not in (1, 2) or values.shape[-1] != len(coupling):
        raise ValueError(
            f"Gates are one per unit, ({len(coupling)},), or so for each example, (N, {len(coupling)}); "
            f"received values of shape {tuple(values.shape)}."
        )
    extended = torch.cat([values, torch.ones_like(values[..., :1])], -1)  # unit -1 is always on
    result: Gates = {}
    for place in coupling.reads:
        factors = [extended[..., torch.as_tensor(row, device=values.device)] for row in place.units]
        gate = factors[0]
        for factor in factors[1:]:
            gate = gate * factor
        shape = [1] * len(place.shape)
        shape[place.axis] = place.units.shape[1]
        result[place.key] = gate.reshape(*values.shape[:-1], *shape)
        if values.ndim == 2 and place.example is not None:
            result[place.key] = _among(result[place.key], place.shape, *place.example)
    return result


@dataclass(frozen=True)
class Moments:
    """Sums over the activations that are read, per unit: how many, their sum, their squares, how many are zero."""

    count: Tensor
    sum: Tensor
    sum_sq: Tensor
    zeros: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Statistics:
    """Additive sums of per-example gate derivatives ``g``: batches, processes and machines are all one ``+``.

    Attributes:
        n: the number of examples.
        batches: the number of batches.
        loss: the sum of the examples' losses.
        sum, sum_abs, sum_sq: ``(units,)``, of ``g``, ``|g|`` and ``g^2`` over the examples.
        sum_abs_mean: of ``|g|`` where each read is averaged over its positions (the paper's eq. 8 to the letter).
        sum_batch_abs, sum_batch_sq: over batches, of the absolute sum and of the squared mean of a batch's ``g``.
        moments: of the activations at the reads, if asked for.
        units: the units' names, by which statistics tell whether they are of the same coupling.
    """

    n: int
    batches: int
    loss: Tensor
    sum: Tensor
    sum_abs: Tensor
    sum_sq: Tensor
    sum_abs_mean: Tensor
    sum_batch_abs: Tensor
    sum_batch_sq: Tensor
    moments: Moments | None = None
    units: tuple[str, ...] = ()

    def __add__(self, other: Statistics | int) -> Statistics:
        if isinstance(other, int) and other == 0:  # the start of Python's sum()
            return self
        if not isinstance(other, Statistics):
            return NotImplemented
        if self.units != other.units or (self.moments is None) != (other.moments is None):
            kinds = (f"{len(x.sum)} units {'without' if x.moments is None else 'with'} moments" for x in (self, other))
            raise ValueError(
                "Statistics add up when they are of the same units, with or without moments alike; "
                f"received {' and '.join(kinds)}. Measure both with one coupling and the same options."
            )
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name != "units"}
        sums: dict[str, Any] = {name: None if a is None else a + b for name, (a, b) in pairs.items()}
        return replace(self, **sums)

    __radd__ = __add__


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """``torch.nn.functional.cross_entropy`` of each example, ``(N,)``: what `measure` takes by default.

    Raises:
        ValueError: if the targets' shape, dtype or device do not fit the outputs, or a target is no class (on the
            CPU; elsewhere looking would wait for the device).
    """
    classes, expected = outputs.shape[1], (outputs.shape[0], *outputs.shape[2:])
    fits = targets.shape == (outputs.shape if targets.is_floating_point() else expected)
    if not fits or targets.device != outputs.device:
        raise ValueError(
            f"Targets are classes of shape {tuple(expected)}, or their probabilities of shape {tuple(outputs.shape)}, "
            f"on {outputs.device} as the outputs; received {targets.dtype} of shape {tuple(targets.shape)} on "
            f"{targets.device}."
        )
    if not targets.is_floating_point() and targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if (low < 0 and low != -100) or high >= classes:
            raise ValueError(f"Targets are classes, 0 to {classes - 1}; received {low} to {high}.")
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses if losses.ndim == 1 else losses.flatten(1).mean(1)


def measure(
    params: Params,
    spec: Spec,
    batches: Batch | Iterable[Batch],
    coupling: Coupling,
    *,
    loss: Loss = cross_entropy,
    moments: bool = False,
    at_writes: bool = False,
    training: bool = False,
    around: Gates | None = None,
    generator: torch.Generator | None = None,
) -> Statistics:
    """Sum the gate derivatives of all examples: one forward and one backward pass per batch, no weight gradients.

    Args:
        batches: one batch ``(inputs, targets)`` (a tuple), or any other iterable of batches.
        loss: called on each example as a batch of one (by ``torch.func.vmap``), so that a mean and a sum over the
            batch mean the same: the derivative is that of the example's own loss.
        moments: also sum the activations that are read (for `activation_mean`, `activation_std`, `apoz`).
        at_writes: differentiate where activations are made instead of where they are read (for `compat`).
        training: run the network in training mode (for `compat`). Batch norm then lets examples hear each other, so
            that only sums over a batch mean something.
        around: gate the deviation from these values at the reads instead of the activation itself, from
            `Means.centers`: ``m_u = 0`` then leaves the mean in the unit's place, and the derivative is ``(a - mean) *
            dL/da``. Reads that are not named are gated as ever.

    A network whose layers mix examples (``coupling.mixing``) is measured one example at a time.

    Raises:
        ValueError: for no or empty batches, targets that do not match, or losses that are not finite.
    """
    total: Statistics | None = None
    finite: list[Tensor] = []
    for batch in [batches] if isinstance(batches, tuple) else batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            kind = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
            raise ValueError(
                f"A batch is a pair (inputs, targets), several come in a list; batch {len(finite)} is a {kind}."
            )
        losses, summed, mean, found = derivatives(
            params, spec, *batch, coupling, loss=loss, moments=moments, at_writes=at_writes, training=training,
            around=around, generator=generator,
        )  # fmt: skip
        finite.append(losses.isfinite().all())
        one = Statistics(
            n=len(losses),
            batches=1,
            loss=losses.sum(),
            sum=summed.sum(0),
            sum_abs=summed.abs().sum(0),
            sum_sq=summed.square().sum(0),
            sum_abs_mean=mean.abs().sum(0),
            sum_batch_abs=summed.sum(0).abs(),
            sum_batch_sq=summed.mean(0).square(),
            moments=found,
            units=coupling.names,
        )
        total = one if total is None else total + one
    if total is None:
        raise ValueError("There is nothing to measure: received no batch. Was the iterator already used up?")
    if not torch.stack(finite).all():
        first = torch.stack(finite).logical_not().nonzero()[0].item()
        raise ValueError(
            f"Losses have to be finite; that of batch {first} is not. Check its inputs and the parameters."
        )
    return total


def derivatives(
    params: Params,
    spec: Spec,
    inputs: Inputs,
    targets: Any,
    coupling: Coupling,
    *,
    loss: Loss = cross_entropy,
    moments: bool = False,
    at_writes: bool = False,
    training: bool = False,
    around: Gates | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Moments | None]:
    """The losses ``(N,)`` and gate derivatives ``(N, units)`` of one batch, summed and averaged over positions.

    This is `measure` before it sums over the examples; the arguments are the same.
    """
    if coupling.spec != spec:
        raise ValueError(
            f"Units are those of the network itself; received a coupling of another one, of {len(coupling)} units. "
            "Couple again: couple(params, spec)."
        )
    check(params, spec)
    count = _examples(inputs, targets, spec)
    run = partial(
        _one_pass, params, spec, coupling=coupling, loss=loss, moments=moments, at_writes=at_writes, training=training,
        around=around or {}, generator=generator,
    )  # fmt: skip
    if not coupling.mixing or training:
        return run(inputs, targets)
    rows = [run(*_take((inputs, targets), k)) for k in range(count)]
    each, summed, mean = (torch.cat(column) for column in list(zip(*rows, strict=True))[:3])
    found = [row[3] for row in rows if row[3] is not None]
    return each, summed, mean, sum(found[1:], found[0]) if found else None


def _one_pass(
    params: Params,
    spec: Spec,
    inputs: Inputs,
    targets: Any,
    *,
    coupling: Coupling,
    loss: Loss,
    moments: bool,
    at_writes: bool,
    training: bool,
    around: Gates,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor, Moments | None]:
    values = bind_inputs(spec, (inputs,))
    example = next(iter(values.values()))
    places: dict[tuple[str, int], list[Place]] = {}
    for place in coupling.writes if at_writes else coupling.reads:
        places.setdefault((place.node, place.slot), []).append(place)
    real = next((x for x in flatten(params).values() if x.is_floating_point()), example)
    kind: dict[str, Any] = {"dtype": torch.promote_types(real.dtype, torch.float32), "device": real.device}
    count, units = len(example), len(coupling)
    flat = [place for found in places.values() for place in found]
    zeros = {str(place.key): torch.zeros(count, place.units.shape[1], **kind) for place in flat}
    spread: dict[str, int] = {}  # how many positions of an example each index of a read stands for

    def losses(taps: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        seen: dict[str, Tensor] = {}

        def tap(name: str, slot: int, x: Tensor) -> Tensor:
            for place in places.get((name, slot), ()):
                key, axis, example = str(place.key), place.axis, place.example
                if example is None:  # the same for all: give every example its own
                    x, axis, example = x.expand(count, *x.shape), axis + 1, (0, 1)
                size = place.units.shape[1]
                spread[key] = x.numel() // (count * size)
                if moments:
                    seen[key] = _activation(_apart(x.detach(), count, *example), axis + 1)
                x = _Tap.apply(x, taps[key], axis, example, around.get(place.key))  # type: ignore[no-untyped-call]
            return x

        outputs, _ = evaluate(params, spec, (inputs,), tap=tap, training=training, generator=generator)
        each = _per_example(loss, outputs, targets)
        return each, (each.detach(), seen)

    pulled: Any = torch.func.vjp(losses, zeros, has_aux=True)
    each, pull, (found, seen) = pulled
    (grads,) = pull(torch.ones_like(each))
    summed, mean = torch.zeros(count, units + 1, **kind), torch.zeros(count, units + 1, **kind)
    tally = torch.zeros(4, units + 1, **kind)
    for place in flat:
        key = str(place.key)
        for row in place.units % (units + 1):
            index = torch.as_tensor(row, device=grads[key].device)
            positions = torch.as_tensor(np.bincount(row)[row] * spread[key], **kind)
            summed.index_add_(1, index, grads[key])
            mean.index_add_(1, index, grads[key] / positions)
            if moments:
                tally.index_add_(1, index, seen[key].to(tally.dtype))
    return found, summed[:, :-1], mean[:, :-1], Moments(*tally[:, :-1]) if moments else None


class _Tap(torch.autograd.Function):
    """Identity whose second argument, ``(N, size)``, receives ``a * dL/da`` summed over all axes but one, per example.

    Given a ``center``, it is ``(a - center) * dL/da``. Kept is only the input, which the layer that reads it keeps
    anyway.
    """

    @staticmethod
    def forward(x: Tensor, gate: Tensor, axis: int, example: tuple[int, int], center: Tensor | None) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, gate, *ctx.where = inputs
        ctx.save_for_backward(x)
        ctx.count, ctx.dtype = len(gate), gate.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (x,), (grad,), (axis, example, center) = ctx.saved_tensors, grads, ctx.where
        x = x if center is None else x - center.to(x)
        if example == (0, 1) and len(x) == ctx.count:
            gate = contract(x, grad, axis)
        else:
            gate = contract(_apart(x, ctx.count, *example), _apart(grad, ctx.count, *example), axis + 1)
        return grad, gate.to(ctx.dtype), None, None, None


def _apart(x: Tensor, count: int, axis: int, before: int) -> Tensor:
    """The examples first: ``(N, ...)``, the rest shaped as for one example."""
    apart: Tensor = x.unflatten(axis, (before, count, -1)).movedim(axis + 1, 0)  # type: ignore[no-untyped-call]
    return apart.flatten(axis + 1, axis + 2)


def _among(gate: Tensor, shape: Sequence[int], axis: int, before: int) -> Tensor:
    """The reverse of `_apart` for gates that broadcast: the examples back into the axis in which they run."""
    sizes = [-1] * gate.ndim
    sizes[axis + 1] = shape[axis]
    spread: Tensor = gate.expand(sizes).unflatten(axis + 1, (before, -1))  # type: ignore[no-untyped-call]
    return spread.movedim(0, axis + 1).flatten(axis, axis + 2)


def contract(x: Tensor, y: Tensor, axis: int) -> Tensor:
    """``(x * y)`` summed over all axes but the first and ``axis``: ``(N, size)``."""
    if x.ndim == 2:
        return x * y
    names = "nbcdefghijklm"[: x.ndim]
    return torch.einsum(f"{names},{names}->n{names[axis]}", x, y)


def _activation(x: Tensor, axis: int) -> Tensor:
    """``(4, size)``: count, sum, sum of squares and zeros along ``axis``."""
    rest = [k for k in range(x.ndim) if k != axis]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = torch.full((x.shape[axis],), x.numel() // x.shape[axis], dtype=wide.dtype, device=x.device)
    return torch.stack([count, wide.sum(rest), wide.square().sum(rest), (wide == 0).to(wide.dtype).sum(rest)])


def _per_example(loss: Loss, outputs: Any, targets: Any) -> Tensor:
    if loss is cross_entropy:
        return cross_entropy(outputs, targets)

    def one(output: Any, target: Any) -> Tensor:
        output, target = (optree.tree_map(lambda x: x[None], tree) for tree in (output, target))
        value: Any = loss(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"A loss is a tensor with one number per example; received {found}. Sum or average it.")
        return value.sum()

    return torch.func.vmap(one)(outputs, targets)


def _examples(inputs: Inputs, targets: Any, spec: Spec) -> int:
    """The number of examples of a batch, which all its tensors share."""
    tensors: Sequence[Any] = [*bind_inputs(spec, (inputs,)).values(), *optree.tree_leaves(targets)]
    sizes = {len(x) for x in tensors if isinstance(x, Tensor) and x.ndim}
    if len(sizes) != 1 or not min(sizes):
        raise ValueError(f"A batch has one or more examples, as many inputs as targets; received {sorted(sizes)}.")
    return sizes.pop()


def _take(batch: Any, k: int) -> Any:
    """Example ``k`` of a batch, as a batch of one."""
    taken: Any = optree.tree_map(lambda x: x[k : k + 1], batch)
    return taken
