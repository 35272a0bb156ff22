"""Gates at the reads, and the derivatives of the loss with respect to them.

Every unit ``u`` owns one scalar gate ``m_u``. Wherever a layer mixes channels, the activation ``a`` that it reads is
multiplied by the gates of its channels. So ``m = 1`` is the network, ``m_u = 0`` is the network without ``u``, and

    dL/dm_u = sum over the unit's reads and positions of  a * dL/da,

the first-order Taylor term of Molchanov et al. 2016 (arXiv 1611.06440, eq. 8, without its mean over positions). Giving
every example gates of its own yields all per-example derivatives from a single backward pass.

Weights are not differentiated: one ``torch.func.vjp`` runs over the activations alone.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from taylorfx.coupling.couple import own
from taylorfx.coupling.units import Coupling
from taylorfx.layers import Conv2d, ShapeError
from taylorfx.network.run import Inputs, bind_inputs, evaluate
from taylorfx.network.spec import Spec
from taylorfx.rewrite.lean import lean
from taylorfx.scoring.batches import Batch, Parted, Split, each_batch, one_by_one
from taylorfx.scoring.gates import Gates
from taylorfx.scoring.losses import Loss, Objective, Unvectorized, cross_entropy, refuse_flat
from taylorfx.scoring.statistics import Moments, Statistics
from taylorfx.scoring.taps import Sums, Taps, followed
from taylorfx.tree import Params, flatten

__all__ = ["derivatives", "measure"]


def fingerprint(params: Params, coupling: Coupling) -> str:
    """What tells networks apart, their parameters and units, as text: their dtypes and two digests.

    Of a parameter the shape and some 4,000 of its numbers count, evenly spread, so that this costs next to nothing.
    """
    leaves, values = flatten(params), hashlib.sha256()
    for path, leaf in leaves.items():
        flat = leaf.detach().resolve_conj().resolve_neg().flatten()
        some = flat[:: max(1, -(-len(flat) // 2**12))].contiguous()
        values.update(f"{path} {leaf.dtype} {tuple(leaf.shape)} ".encode())
        values.update(some.view(torch.uint8).cpu().numpy().tobytes())
    units = hashlib.sha256(repr(coupling.names).encode())
    for place in coupling.reads:
        units.update(f"{place.key} {place.units.shape} ".encode() + place.units.tobytes())
    dtypes = "/".join(sorted({str(leaf.dtype).removeprefix("torch.") for leaf in leaves.values()}))
    return f"{dtypes}, parameters {values.hexdigest()[:12]}, units {units.hexdigest()[:12]}"


def measure(
    params: Params,
    spec: Spec,
    batches: Batch | Iterable[Batch],
    coupling: Coupling,
    *,
    loss: Loss = cross_entropy,
    per_example: bool = True,
    split: Split | None = None,
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
        loss: called on each example as a batch of one, so that a mean and a sum over the batch mean the same: the
            derivative is that of the example's own loss. By ``torch.func.vmap``, or one example after the other where
            the loss looks at numbers (``item``, branches, numpy) or the targets are lists with one entry per example.
        per_example: otherwise the loss is called on each batch as it is, and the batch is one observation: for losses
            that compare examples. The derivatives are those of that number by gates that all examples share; of a
            mean over examples, therefore, the mean of the per-example ones.
        split: ``split(targets, k)`` gives the targets of example ``k`` as those of a batch of one, where they are
            neither tensors nor lists with one entry per example.
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

    A network whose layers mix examples (``coupling.mixing``) is measured one example at a time, unless the loss is of
    the whole batch. A list without a batch, an empty share of the data, gives `Statistics.neutral`.

    Raises:
        ValueError: for a used up iterator or empty batches, targets that do not match, losses that are not finite or
            do not change with the outputs, or micro-batches where a batch is more than its examples: in training, or
            with a loss of the whole batch. What the loss raises itself comes as it is.
    """
    objective = Objective(loss, per_example, split)
    run = _scoring(
        params, spec, coupling, objective, moments=moments, at_writes=at_writes, training=training, around=around or {},
        generator=generator, fold=fold, channels_last=channels_last, micro_batch=micro_batch,
    )  # fmt: skip
    total, first = Statistics.neutral(coupling.names), None
    finite: list[Tensor] = []
    for batch in each_batch(batches):
        first = first or batch
        scored = run(*batch)
        finite.append(scored[0].isfinite().all())
        total = total + _summed(*scored, rows=rows, units=coupling.names, per_example=per_example)
    if first is None:
        if isinstance(batches, Iterator):
            raise ValueError("There is nothing to measure: received no batch. Was the iterator already used up?")
        return total
    _refuse_infinite(torch.stack(finite), per_example)
    if len(coupling):
        whole = objective.parted(*first, spec)
        refuse_flat(objective, params, spec, whole, total.sum_abs.max() / total.n, total.loss / total.n)
    return replace(total, networks=(fingerprint(params, coupling),))


def _refuse_infinite(finite: Tensor, per_example: bool) -> None:
    if not finite.all():
        way_out = " A loss that compares examples has to be measured of the whole batch, per_example=False."
        raise ValueError(
            f"Losses have to be finite; that of batch {finite.logical_not().nonzero()[0].item()} is not. Check its "
            f"inputs and the parameters.{way_out * per_example}"
        )


def _summed(
    losses: Tensor, summed: Tensor, mean: Tensor, moments: Moments | None, *, rows: bool, **alike: Any
) -> Statistics:
    """The statistics of one batch."""
    return Statistics(
        n=len(losses),
        batches=1,
        loss=losses.sum(),
        sum=summed.sum(0),
        sum_abs=summed.abs().sum(0),
        sum_sq=summed.square().sum(0),
        sum_abs_mean=mean.abs().sum(0),
        sum_batch_abs=summed.sum(0).abs(),
        sum_batch_sq=summed.mean(0).square(),
        moments=moments,
        rows=summed if rows else None,
        **alike,
    )


def derivatives(
    params: Params,
    spec: Spec,
    inputs: Inputs,
    targets: Any,
    coupling: Coupling,
    *,
    loss: Loss = cross_entropy,
    per_example: bool = True,
    split: Split | None = None,
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

    With ``per_example=False`` they are those of one observation, ``(1,)`` and ``(1, units)``.

    This is `measure` before it sums over the examples; the arguments are the same. Neither can be differentiated in its
    turn, as the backward pass frees and writes over what it has used; `gradient` can.

    Raises:
        ValueError: as `measure`, or if ``torch.func.grad``, ``jvp`` or the like follow the parameters or inputs.
    """
    run = _scoring(
        params, spec, coupling, Objective(loss, per_example, split), moments=moments, at_writes=at_writes,
        training=training, around=around or {}, generator=generator, fold=fold, channels_last=channels_last,
        micro_batch=micro_batch,
    )  # fmt: skip
    return run(inputs, targets)


Scored = tuple[Tensor, Tensor, Tensor, Moments | None]
"""What `derivatives` gives back."""


def _scoring(
    params: Params,
    spec: Spec,
    coupling: Coupling,
    objective: Objective,
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
        _derivatives, networks, coupling=coupling, pace=Pace(objective), sums=sums, moments=moments, around=around,
        training=training, channels_last=bool(channels_last), **options,
    )  # fmt: skip


def _refuse_followed(values: Iterable[Any]) -> None:
    if any(isinstance(x, Tensor) and followed(x) for x in values):  # what is no tensor is refused where it is used
        raise ValueError(
            "What is measured cannot be differentiated; received parameters or inputs inside of torch.func.grad, vjp "
            "or jvp. Use tfx.truth.gradient, which can, or measure outside."
        )


def _derivatives(networks: Sequence[tuple[Params, Spec]], *batch: Any, **options: Any) -> Scored:
    """Those of the first network; what is wrong with its inputs is said in the names of the last."""
    try:
        return _of_batch(*networks[0], *batch, **options)
    except ShapeError:
        return _of_batch(*networks[-1], *batch, **options)


@dataclass
class Pace:
    """How a loss is called, batch after batch: vectorized, until that has turned out not to be possible."""

    objective: Objective
    plain: bool = False

    def __call__(self, run: Callable[..., Pass], inputs: Inputs, targets: Any) -> Pass:
        """What ``run`` gives, which takes the batch and whether the loss is called plainly."""
        if self.plain or isinstance(targets, Parted) or not self.objective.per_example:
            return run(inputs, targets, plain=True)
        with suppress(Unvectorized):
            return run(inputs, targets, plain=False)
        result = run(inputs, targets, plain=True)  # what it raises is the user's own error
        self.plain = True
        warnings.warn(SLOW, stacklevel=2)
        return result


SLOW = (
    "torch.func.vmap cannot run the loss, which is called on one example after the other: the result is the same, and "
    "slower for large batches. A loss without item(), numpy, masks of booleans and branches on data is vectorized."
)


Pass = tuple[Tensor, Tensor, Tensor, Tensor]
"""The losses, the derivatives summed and averaged over positions, and the sums of activations."""


def _of_batch(
    params: Params,
    spec: Spec,
    inputs: Inputs,
    targets: Any,
    *,
    coupling: Coupling,
    pace: Pace,
    sums: Sums,
    moments: bool,
    training: bool,
    channels_last: bool,
    micro_batch: int | None,
    **options: Any,
) -> Scored:
    inputs, targets = pace.objective.parted(inputs, targets, spec)
    per_example, given = pace.objective.per_example, bind_inputs(spec, (inputs,))
    _refuse_followed(given.values())
    if micro_batch is not None and (micro_batch < 1 or training or not per_example):
        raise ValueError(
            "Micro-batches have one or more examples, and are not for training nor for a loss of the whole batch; "
            f"received micro_batch={micro_batch}, training={training}, per_example={per_example}."
        )
    alone = per_example and not training and (coupling.mixing or any(place.example is None for place in sums.places))
    run: Callable[..., Pass] = partial(
        _one_pass, params, spec, objective=pace.objective, sums=sums, moments=moments, training=training,
        channels_last=channels_last and not alone, **options,
    )  # fmt: skip
    run = partial(_apart_by_vmap, run, spec) if alone else partial(pace, run)
    whole: Any = (inputs, targets)
    count = len(next(iter(given.values())))
    size = micro_batch or count
    parts = [run(*optree.tree_map(lambda x: x[k : k + size], whole)) for k in range(0, count, size)]  # noqa: B023
    *rows, tallies = zip(*parts, strict=True)
    each, summed, mean = (torch.cat(column) for column in rows)
    return each, summed, mean, Moments(*sum(tallies)) if moments else None


def _apart_by_vmap(run: Callable[..., Pass], spec: Spec, inputs: Inputs, targets: Any) -> Pass:
    """Every example as a batch of one: vectorized, or one after the other where an operator or the loss cannot be."""
    batch: Any = (inputs, targets)
    found: Any = None
    if not isinstance(targets, Parted):
        with suppress(RuntimeError, ShapeError, Unvectorized):  # if that was not the reason, it comes again
            found = torch.func.vmap(partial(run, plain=False))(*optree.tree_map(lambda x: x.unsqueeze(1), batch))
    if found is None:
        rows = [run(*one, plain=True) for one in one_by_one(batch, spec)]
        found = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    each, summed, mean, tally = found
    return each.squeeze(1), summed.squeeze(1), mean.squeeze(1), tally.sum(0)


def _one_pass(
    params: Params,
    spec: Spec,
    inputs: Inputs,
    targets: Any,
    *,
    plain: bool,
    objective: Objective,
    sums: Sums,
    moments: bool,
    training: bool,
    around: Gates,
    generator: torch.Generator | None,
    channels_last: bool,
) -> Pass:
    count = len(next(iter(bind_inputs(spec, (inputs,)).values())))
    kind: dict[str, Any] = {"dtype": sums.dtype, "device": sums.index.device}
    zeros = {str(place.key): torch.zeros(count, place.units.shape[1], **kind) for place in sums.places}
    spread: dict[str, float] = {}  # how many positions of an example each index of a read stands for

    def network(given: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        taps = Taps(params, spec, sums.places, given, around, moments=moments)
        laid_out = _channels_last(spec, inputs) if channels_last else inputs  # not held for the backward pass
        outputs, _ = evaluate(params, spec, (laid_out,), tap=taps, training=training, generator=generator)
        spread.update(taps.spread)
        return outputs, taps.seen

    def losses(given: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        outputs, seen = network(given)
        each = objective.vectorized(outputs, targets)
        return each, (each.detach(), seen)

    if plain:  # the loss stays outside of the transform, where it may look at numbers
        outputs, pull, seen = torch.func.vjp(network, zeros, has_aux=True)  # type: ignore[misc]
        each, slopes = objective.slopes(outputs, targets)
    else:
        slopes, pull, (each, seen) = torch.func.vjp(losses, zeros, has_aux=True)  # type: ignore[misc]
        slopes = torch.ones_like(slopes)
    try:
        (grads,) = pull(slopes, retain_graph=False, create_graph=False)
    except RuntimeError as error:
        if plain or "inplace operation" not in str(error):
            raise
        raise Unvectorized from error  # a loss that writes over the outputs gets copies of its own when it is plain
    tally = sums(4, seen) if moments else each.new_zeros(0)
    summed, mean = sums(count, grads), sums(count, grads, spread)
    if not objective.per_example:
        summed, mean = summed.sum(0, keepdim=True), mean.sum(0, keepdim=True)
    return each, summed, mean, tally


def _channels_last(spec: Spec, inputs: Inputs) -> Inputs:
    images = {x for node in spec.nodes if isinstance(node.layer, Conv2d) for x in node.inputs}
    return {
        name: x.to(memory_format=torch.channels_last) if name in images and isinstance(x, Tensor) and x.ndim == 4 else x
        for name, x in bind_inputs(spec, (inputs,)).items()
    }
