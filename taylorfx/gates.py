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
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor

from taylorfx.coupling import Coupling, Place
from taylorfx.layers import Conv2d, ShapeError
from taylorfx.lean import lean
from taylorfx.loss import Batch, Loss, cross_entropy, each_batch, examples, one_by_one, own, per_example
from taylorfx.spec import Inputs, Spec, apply, bind_inputs, evaluate
from taylorfx.statistics import Moments, Statistics
from taylorfx.taps import Taps, followed
from taylorfx.tree import Params, flatten

__all__ = ["Gates", "curvature", "derivatives", "gated_loss", "gates", "gradient", "measure"]

Gates = dict[tuple[str, int, int], Tensor]
"""Factors at the reads, by node, input and axis, ready to broadcast."""


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


def measure(
    params: Params,
    spec: Spec,
    batches: Batch | Iterable[Batch],
    coupling: Coupling,
    *,
    loss: Loss = cross_entropy,
    moments: bool = False,
    rows: bool = False,
    at_writes: bool = False,
    training: bool = False,
    around: Gates | None = None,
    generator: torch.Generator | None = None,
    fold: bool = True,
    channels_last: bool | None = None,
    micro_batch: int | None = None,
) -> Statistics:
    """Sum the gate derivatives of all examples: one forward and one backward pass per batch, no weight gradients.

    Args:
        batches: one batch ``(inputs, targets)`` (a tuple), or any other iterable of batches.
        loss: called on each example as a batch of one (by ``torch.func.vmap``), so that a mean and a sum over the
            batch mean the same: the derivative is that of the example's own loss.
        moments: also sum the activations that are read (for `activation_mean`, `activation_std`, `apoz`).
        rows: also keep every example's derivatives (for `joint`): four bytes for each example and unit.
        at_writes: differentiate where activations are made instead of where they are read (for `compat`).
        training: run the network in training mode (for `compat`). Batch norm then lets examples hear each other, so
            that only sums over a batch mean something.
        around: gate the deviation from these values at the reads instead of the activation itself, from
            `Means.centers`: ``m_u = 0`` then leaves the mean in the unit's place, and the derivative is ``(a - mean) *
            dL/da``. Reads that are not named are gated as ever.
        fold: score a private copy of which batch norms are folded (`taylorfx.fold`), activations written over each
            other, and positions that nobody hears left out: the reads and so the derivatives are the same up to
            rounding, with less time and memory. Not where activations are made, nor in training.
        channels_last: run images that convolutions read in ``torch.channels_last`` memory; by default the private copy
            does so on a CPU, where it is faster.
        micro_batch: run at most so many examples at a time, which bounds the memory; the statistics are the same.

    A network whose layers mix examples (``coupling.mixing``) is measured one example at a time.

    Raises:
        ValueError: for no or empty batches, targets that do not match, losses that are not finite, or micro-batches
            in training, where examples hear each other.
    """
    run = _scoring(
        params, spec, coupling, loss=loss, moments=moments, at_writes=at_writes, training=training, around=around or {},
        generator=generator, fold=fold, channels_last=channels_last, micro_batch=micro_batch,
    )  # fmt: skip
    total: Statistics | None = None
    finite: list[Tensor] = []
    for batch in each_batch(batches):
        losses, summed, mean, found = run(*batch)
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
            rows=summed if rows else None,
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
    fold: bool = True,
    channels_last: bool | None = None,
    micro_batch: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Moments | None]:
    """The losses ``(N,)`` and gate derivatives ``(N, units)`` of one batch, summed and averaged over positions.

    This is `measure` before it sums over the examples; the arguments are the same. Neither can be differentiated in its
    turn, as the backward pass frees and writes over what it has used; `gradient` can.

    Raises:
        ValueError: as `measure`, or if ``torch.func.grad``, ``jvp`` or the like follow the parameters or inputs.
    """
    run = _scoring(
        params, spec, coupling, loss=loss, moments=moments, at_writes=at_writes, training=training, around=around or {},
        generator=generator, fold=fold, channels_last=channels_last, micro_batch=micro_batch,
    )  # fmt: skip
    return run(inputs, targets)


Scored = tuple[Tensor, Tensor, Tensor, Moments | None]
"""What `derivatives` gives back."""


def _scoring(
    params: Params,
    spec: Spec,
    coupling: Coupling,
    *,
    moments: bool,
    around: Gates,
    at_writes: bool,
    training: bool,
    fold: bool,
    channels_last: bool | None,
    **options: Any,
) -> Callable[[Inputs, Any], Scored]:
    """`derivatives` as a function of the batch: what is the same for all batches is made here, once.

    What is run is a lean copy, which has the same reads; the network itself says what is wrong with inputs.
    """
    own(params, spec, coupling)
    _refuse_followed(flatten(params).values())
    networks = [(params, spec)]
    if fold and not (at_writes or training):
        if channels_last is None:
            channels_last = all(leaf.device.type == "cpu" for leaf in flatten(params).values())
        whole = moments or bool(around)  # they may differ by position
        networks = [lean(params, coupling, channels_last=channels_last, whole=whole), *networks]
    sums = Sums.at(coupling.writes if at_writes else coupling.reads, len(coupling), params)
    return partial(
        _derivatives, networks, coupling=coupling, sums=sums, moments=moments, around=around, training=training,
        channels_last=bool(channels_last), **options,
    )  # fmt: skip


def _refuse_followed(values: Iterable[Any]) -> None:
    if any(isinstance(x, Tensor) and followed(x) for x in values):  # what is no tensor is refused where it is used
        raise ValueError(
            "What is measured cannot be differentiated; received parameters or inputs inside of torch.func.grad, vjp "
            "or jvp. Use tfx.gradient, which can, or measure outside."
        )


def _derivatives(networks: Sequence[tuple[Params, Spec]], *batch: Any, **options: Any) -> Scored:
    """Those of the first network; what is wrong with its inputs is said in the names of the last."""
    try:
        return _of_batch(*networks[0], *batch, **options)
    except ShapeError:
        return _of_batch(*networks[-1], *batch, **options)


def _of_batch(
    params: Params,
    spec: Spec,
    inputs: Inputs,
    targets: Any,
    *,
    coupling: Coupling,
    sums: Sums,
    moments: bool,
    training: bool,
    channels_last: bool,
    micro_batch: int | None,
    **options: Any,
) -> Scored:
    count = examples(inputs, targets, spec)
    _refuse_followed(bind_inputs(spec, (inputs,)).values())
    if micro_batch is not None and (micro_batch < 1 or training):
        raise ValueError(
            f"Micro-batches have one or more examples, and are not for training; received micro_batch={micro_batch}, "
            f"training={training}."
        )
    alone = not training and (coupling.mixing or any(place.example is None for place in sums.places))
    run: Callable[..., tuple[Tensor, ...]] = partial(
        _one_pass, params, spec, sums=sums, moments=moments, training=training,
        channels_last=channels_last and not alone, **options,
    )  # fmt: skip
    if alone:
        run = partial(_apart_by_vmap, run, spec)
    whole: Any = (inputs, targets)
    size = micro_batch or count
    parts = [run(*optree.tree_map(lambda x: x[k : k + size], whole)) for k in range(0, count, size)]  # noqa: B023
    *rows, tallies = zip(*parts, strict=True)
    each, summed, mean = (torch.cat(column) for column in rows)
    return each, summed, mean, Moments(*sum(tallies)) if moments else None


def _apart_by_vmap(
    run: Callable[..., tuple[Tensor, ...]], spec: Spec, inputs: Inputs, targets: Any
) -> tuple[Tensor, ...]:
    """Every example as a batch of one: vectorized, or one after the other where an operator cannot be."""
    batch: Any = (inputs, targets)
    try:
        each, summed, mean, tally = torch.func.vmap(run)(*optree.tree_map(lambda x: x.unsqueeze(1), batch))
    except (RuntimeError, ShapeError):  # if that was not the reason, it comes again
        rows = [run(*one) for one in one_by_one(batch, spec)]
        each, summed, mean, tally = (torch.stack(column) for column in zip(*rows, strict=True))
    return each.squeeze(1), summed.squeeze(1), mean.squeeze(1), tally.sum(0)


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


def _one_pass(
    params: Params,
    spec: Spec,
    inputs: Inputs,
    targets: Any,
    *,
    sums: Sums,
    loss: Loss,
    moments: bool,
    training: bool,
    around: Gates,
    generator: torch.Generator | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = len(next(iter(bind_inputs(spec, (inputs,)).values())))
    kind: dict[str, Any] = {"dtype": sums.dtype, "device": sums.index.device}
    zeros = {str(place.key): torch.zeros(count, place.units.shape[1], **kind) for place in sums.places}
    spread: dict[str, float] = {}  # how many positions of an example each index of a read stands for

    def losses(given: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        taps = Taps(params, spec, sums.places, given, around, moments=moments)
        laid_out = _channels_last(spec, inputs) if channels_last else inputs  # not held for the backward pass
        outputs, _ = evaluate(params, spec, (laid_out,), tap=taps, training=training, generator=generator)
        spread.update(taps.spread)
        each = per_example(loss, outputs, targets)
        return each, (each.detach(), taps.seen)

    pulled: Any = torch.func.vjp(losses, zeros, has_aux=True)
    each, pull, (found, seen) = pulled
    (grads,) = pull(torch.ones_like(each), retain_graph=False, create_graph=False)
    tally = sums(4, seen) if moments else each.new_zeros(0)
    return found, sums(count, grads), sums(count, grads, spread), tally


def _channels_last(spec: Spec, inputs: Inputs) -> Inputs:
    images = {x for node in spec.nodes if isinstance(node.layer, Conv2d) for x in node.inputs}
    return {
        name: x.to(memory_format=torch.channels_last) if name in images and isinstance(x, Tensor) and x.ndim == 4 else x
        for name, x in bind_inputs(spec, (inputs,)).items()
    }


def gated_loss(
    params: Params, spec: Spec, inputs: Inputs, targets: Any, coupling: Coupling, values: Tensor,
    *, loss: Loss = cross_entropy,
) -> Tensor:  # fmt: skip
    """The loss as a function of the gates: ``(N,)``, of every example, at gates ``(units,)`` or ``(N, units)``."""
    return per_example(loss, apply(params, spec, inputs, gates=gates(coupling, values)), targets)


def gradient(
    params: Params, spec: Spec, inputs: Inputs, targets: Any, coupling: Coupling, values: Tensor,
    *, loss: Loss = cross_entropy,
) -> Tensor:  # fmt: skip
    """Derivatives by the gates at any ``values`` of them; `derivatives` has those at one, with less memory.

    Returns:
        In the shape of the values: at ``(units,)`` those of the sum of the examples' losses, at ``(N, units)`` each
        example's own.
    """
    pulled: Any = torch.func.vjp(partial(gated_loss, params, spec, inputs, targets, coupling, loss=loss), values)
    each, pull = pulled
    (grad,) = pull(torch.ones_like(each))
    return torch.as_tensor(grad)


def curvature(
    params: Params, spec: Spec, inputs: Inputs, targets: Any, coupling: Coupling, values: Tensor, direction: Tensor,
    *, loss: Loss = cross_entropy,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The `gradient` at ``values`` and its change along ``direction``, ``H v`` with the Hessian by the gates.

    All are ``(units,)``, of the sum of the examples' losses. Forward over reverse (Pearlmutter 1994, "Fast exact
    multiplication by the Hessian"): some four forward passes, and the Hessian itself never exists.
    """
    slope = partial(gradient, params, spec, inputs, targets, coupling, loss=loss)
    with torch.enable_grad():  # without it some backward passes are fused, and then cannot be differentiated
        moved: Any = torch.func.jvp(slope, (values,), (direction,))
    return moved[0], moved[1]


def _among(gate: Tensor, shape: Sequence[int], axis: int, before: int) -> Tensor:
    """The reverse of `apart` for gates that broadcast: the examples back into the axis in which they run."""
    sizes = [-1] * gate.ndim
    sizes[axis + 1] = shape[axis]
    spread: Tensor = gate.expand(sizes).unflatten(axis + 1, (before, -1))  # type: ignore[no-untyped-call]
    return spread.movedim(0, axis + 1).flatten(axis, axis + 2)
