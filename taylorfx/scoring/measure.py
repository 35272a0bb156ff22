"""Gates at the reads, and the derivatives of the loss with respect to them.

Every unit ``u`` owns one scalar gate ``m_u``. Wherever a layer mixes channels, the activation ``a`` that it reads is
multiplied by the gates of its channels. So ``m = 1`` is the network, ``m_u = 0`` is the network without ``u``, and

    dL/dm_u = sum over the unit's reads and positions of  a * dL/da,

the first-order Taylor term of Molchanov et al. 2016 (arXiv 1611.06440, eq. 8, without its mean over positions). Giving
every example gates of its own yields all per-example derivatives from a single backward pass.

Weights are not differentiated: one ``torch.func.vjp`` runs over the activations alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from operator import length_hint
from typing import TYPE_CHECKING, NamedTuple

import optree
import torch
from torch import Tensor

from taylorfx.coupling.couple import own
from taylorfx.coupling.units import Coupling
from taylorfx.distributed import refuse_alone
from taylorfx.internals import differentiated
from taylorfx.layers import ShapeError
from taylorfx.layers.roles import Memory
from taylorfx.network.run import Inputs, bind_inputs, evaluate, fitted
from taylorfx.network.spec import Spec
from taylorfx.progress import LOG, bar
from taylorfx.rewrite.lean import lean
from taylorfx.scoring.batches import Batches, Parted, Targets, each_batch, one_by_one, sliced
from taylorfx.scoring.fingerprint import fingerprint
from taylorfx.scoring.losses import Objective, Outputs, Unvectorized, refuse_flat
from taylorfx.scoring.measurement import Measurement
from taylorfx.scoring.positions import observed, position_axes
from taylorfx.scoring.statistics import Moments, Statistics
from taylorfx.scoring.sums import Sums
from taylorfx.scoring.tap_plan import TapPlan
from taylorfx.scoring.taps import Taps
from taylorfx.tree import Params, flatten

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from taylorfx.scoring.measurement import MeasurementOptions

__all__ = ["Derivatives", "derivatives", "measure"]


class Derivatives(NamedTuple):
    """Gate derivatives of the observations of one batch.

    An observation is an example or, as `Measurement` says, a position of an example or the whole batch.
    """

    losses: Tensor
    """``(N,)``: the loss of each example, or ``(1,)`` of the batch."""
    summed: Tensor
    """``(n, units)``: the derivatives by the gates, summed over the positions of a read."""
    mean: Tensor
    """``(n, units)``: the same, averaged over the positions of each read."""
    moments: Moments | None = None
    """Sums of the activations that are read, if asked for."""


def measure(
    params: Params,
    spec: Spec,
    batches: Batches,
    coupling: Coupling,
    *,
    measurement: Measurement | None = None,
    **options: Unpack[MeasurementOptions],
) -> Statistics:
    """Sum the gate derivatives of all examples: one forward and one backward pass per batch, no weight gradients.

    ::

        stats = tfx.measure(params, spec, batches, coupling, loss=loss, rows=True)

    Args:
        batches: one batch ``(inputs, targets)`` (a tuple), or any other iterable of batches.
        measurement: the loss, what is summed, and how the network is run; by default as `Measurement` says.
        options: the attributes of a `Measurement` as keywords instead: ``loss``, ``per_example``, ``split``,
            ``per_position``, ``moments``, ``rows``, ``at_writes``, ``training``, ``around``, ``generator``, ``fold``,
            ``channels_last``, ``micro_batch``, ``progress``, ``total``.

    A network whose layers mix examples (``coupling.mixing``) is measured one example at a time, unless the loss is of
    the whole batch. A list without a batch, an empty share of the data, gives `Statistics.neutral`.

    Raises:
        ValueError: for a used up iterator or empty batches, targets that do not match, losses that are not finite or
            do not change with the outputs, and what `Measurement` refuses. What the loss raises itself comes as it is.
        TypeError: for keywords that a `Measurement` does not have, or keywords beside one.
        ImportError: if a progress bar is asked for without rich.
    """
    how = Measurement.of(measurement, options)
    return how.of_all(params, coupling, lambda own: _of_one(own, spec, batches, coupling, how))


def _of_one(params: Params, spec: Spec, batches: Batches, coupling: Coupling, how: Measurement) -> Statistics:
    """What one process measures; parameters that it shares with others are gathered when they are used."""
    run = _Scorer.of(params, spec, coupling, how)
    total, first = Statistics.neutral(coupling.names), None
    finite: list[Tensor] = []
    known = 1 if isinstance(batches, tuple) else length_hint(batches, 0)
    with bar(how.progress, "measure", known) as advance:
        for batch in each_batch(batches):
            first = first or batch
            scored = run(*batch)
            finite.append(scored.losses.isfinite().all())
            total = total + _summed(scored, coupling, how)
            advance(1)
    if first is None:
        if isinstance(batches, Iterator):
            raise ValueError("There is nothing to measure: received no batch. Was the iterator already used up?")
        return total
    _refuse_infinite(torch.stack(finite), how.per_example)
    if len(coupling):
        whole = how.objective.parted(*first, spec)
        refuse_flat(how.objective, params, spec, whole, total.sum_abs.max() / total.n, total.loss / total.n)
    LOG.info("measure: %r", total)
    return replace(total, networks=(fingerprint(params, coupling),))


def _refuse_infinite(finite: Tensor, per_example: bool) -> None:
    if not finite.all():
        way_out = " A loss that compares examples has to be measured of the whole batch, per_example=False."
        raise ValueError(
            f"Losses have to be finite; that of batch {finite.logical_not().nonzero()[0].item()} is not. Check its "
            f"inputs and the parameters.{way_out * per_example}"
        )


def _summed(scored: Derivatives, coupling: Coupling, measurement: Measurement) -> Statistics:
    """The statistics of one batch."""
    losses, summed, mean, moments = scored
    return Statistics(
        n=len(summed),
        batches=1,
        loss=losses.sum(),
        sum=summed.sum(0),
        sum_abs=summed.abs().sum(0),
        sum_sq=summed.square().sum(0),
        sum_abs_mean=mean.abs().sum(0),
        sum_batch_abs=summed.sum(0).abs(),
        sum_batch_sq=summed.mean(0).square(),
        moments=moments,
        rows=summed if measurement.rows else None,
        units=coupling.names,
        per_example=measurement.per_example,
        per_position=measurement.per_position,
    )


def derivatives(
    params: Params,
    spec: Spec,
    inputs: Inputs,
    targets: Targets,
    coupling: Coupling,
    *,
    measurement: Measurement | None = None,
    **options: Unpack[MeasurementOptions],
) -> Derivatives:
    """The losses ``(N,)`` and gate derivatives ``(N, units)`` of one batch, summed and averaged over positions.

    With ``per_example=False`` they are those of one observation, ``(1,)`` and ``(1, units)``; with ``per_position`` the
    derivatives are those of every position, ``(N T, units)``, example by example, and add up to those of the examples.

    This is `measure` before it sums over the examples; the arguments are the same. Neither can be differentiated in its
    turn, as the backward pass frees and writes over what it has used; `taylorfx.truth.gradient` can.

    Raises:
        ValueError: as `measure`, or if ``torch.func.grad``, ``jvp`` or the like follow the parameters or inputs.
    """
    refuse_alone(params)
    return _Scorer.of(params, spec, coupling, Measurement.of(measurement, options))(inputs, targets)


def _refuse_followed(values: Iterable[object]) -> None:
    tensors = (x for x in values if isinstance(x, Tensor))  # what is no tensor is refused where it is used
    if any(map(differentiated, tensors)):
        raise ValueError(
            "What is measured cannot be differentiated; received parameters or inputs inside of torch.func.grad, vjp "
            "or jvp. Use tfx.truth.gradient, which can, or measure outside."
        )


class Pass(NamedTuple):
    """What one forward and one backward pass give; ``tally`` are the ``(4, units)`` sums of activations, if any."""

    losses: Tensor
    summed: Tensor
    mean: Tensor
    tally: Tensor


@dataclass
class Pace:
    """How a loss is called, batch after batch: vectorized, until that has turned out not to be possible."""

    objective: Objective
    plain: bool = False

    def __call__(self, run: Callable[..., Pass], inputs: Inputs, targets: Targets) -> Pass:
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


@dataclass(frozen=True, eq=False)
class _Scorer:
    """`derivatives` as a function of the batch: what is the same for all batches is made once.

    Attributes:
        networks: what is run, first a lean copy with the same reads; the network itself, the last, says what is wrong
            with inputs.
        planned: plans the taps of a network that is run.
        plan: that of the first.
        pace: how the loss is called, which the first batch finds out.
        sums: how derivatives at the reads add up to those of units.
        images: the inputs that are laid out in ``torch.channels_last`` memory.
    """

    networks: Sequence[tuple[Params, Spec]]
    planned: Callable[[Params, Spec], TapPlan]
    plan: TapPlan
    coupling: Coupling
    measurement: Measurement
    objective: Objective
    pace: Pace
    sums: Sums
    images: frozenset[str]

    @staticmethod
    def of(params: Params, spec: Spec, coupling: Coupling, measurement: Measurement) -> _Scorer:
        own(params, spec, coupling)
        _refuse_followed(flatten(params).values())
        networks, channels_last, axis = [(params, spec)], measurement.channels_last, measurement.per_position
        if measurement.fold and not (measurement.at_writes or measurement.training):
            if channels_last is None:
                channels_last = all(leaf.device.type == "cpu" for leaf in flatten(params).values())
            whole = measurement.moments or bool(measurement.around or axis)  # they may differ by position
            networks = [lean(params, coupling, channels_last=channels_last, whole=whole), *networks]
        objective, places = measurement.objective, coupling.writes if measurement.at_writes else coupling.reads
        planned: Callable[[Params, Spec], TapPlan] = partial(
            TapPlan.of, places=places, around=measurement.around, moments=measurement.moments, bounds=coupling.bounds,
            positions={} if axis is None else position_axes(coupling.spec, places, axis),
        )  # fmt: skip
        sums, pace = Sums.at(places, len(coupling), params), Pace(objective)
        images = _images(networks[0][1]) if channels_last else frozenset[str]()
        return _Scorer(networks, planned, planned(*networks[0]), coupling, measurement, objective, pace, sums, images)

    def __call__(self, inputs: Inputs, targets: Targets) -> Derivatives:
        try:
            return self._of_batch(*self._for(inputs), inputs, targets)
        except ShapeError:
            return self._of_batch(*self.networks[-1], self.planned(*self.networks[-1]), inputs, targets)

    def _for(self, inputs: Inputs) -> tuple[Params, Spec, TapPlan]:
        """The network that is run, and its plan, for inputs of these shapes."""
        params, spec = self.networks[0]
        here = fitted(spec, inputs)
        if here is spec:
            return params, spec, self.plan
        return params, here, self.planned(params, here)

    def _of_batch(self, params: Params, spec: Spec, plan: TapPlan, inputs: Inputs, targets: Targets) -> Derivatives:
        """Those of one network, some examples at a time."""
        batch = self.objective.parted(inputs, targets, spec)
        values, how = bind_inputs(spec, (inputs,)), self.measurement
        _refuse_followed(values.values())
        mixed = self.coupling.mixing or any(place.example is None for place in self.sums.places)
        alone = mixed and self.objective.per_example and not how.training
        plainly_or_not = partial(self._one_pass, params, spec, plan, images=frozenset[str]() if alone else self.images)
        run = partial(_each_alone, plainly_or_not, spec) if alone else partial(self.pace, plainly_or_not)
        count = len(next(iter(values.values())))
        size = how.micro_batch or count
        passes = [run(*sliced(batch, slice(k, k + size))) for k in range(0, count, size)]
        losses, summed, mean = (torch.cat(column) for column in ([one[k] for one in passes] for k in range(3)))
        tally = torch.stack([one.tally for one in passes]).sum(0)
        return Derivatives(losses, summed, mean, Moments(*tally) if how.moments else None)

    def _one_pass(
        self,
        params: Params,
        spec: Spec,
        plan: TapPlan,
        inputs: Inputs,
        targets: Targets,
        *,
        plain: bool,
        images: frozenset[str],
    ) -> Pass:
        """One forward and one backward pass of the network, with gates of one at every place."""
        how, sums = self.measurement, self.sums
        size = observed(bind_inputs(spec, (inputs,)), how.per_position)
        count = math.prod(size)
        spread: dict[str, float] = {}  # how many positions of an observation each index of a read stands for

        def network(gates: Mapping[str, Tensor]) -> tuple[Outputs, dict[str, Tensor]]:
            taps = Taps(plan, gates)
            laid_out = _channels_last(spec, inputs, images)  # not held for the backward pass
            outputs, _ = evaluate(params, spec, (laid_out,), tap=taps, training=how.training, generator=how.generator)
            spread.update(taps.spread)
            return outputs, taps.seen

        zero = torch.zeros((), dtype=sums.dtype, device=sums.index.device)
        zeros = {str(place.key): zero.expand(*size, place.units.shape[1]) for place in sums.places}
        each, pulled, seen = self._pulled(network, zeros, targets, plain=plain)
        grads = {key: grad.flatten(0, -2) for key, grad in pulled.items()}
        tally = sums(4, seen) if how.moments else each.new_zeros(0)
        summed, mean = sums(count, grads), sums(count, grads, spread)
        if not self.objective.per_example:
            summed, mean = summed.sum(0, keepdim=True), mean.sum(0, keepdim=True)
        return Pass(each, summed, mean, tally)

    def _pulled(
        self,
        network: Callable[[Mapping[str, Tensor]], tuple[Outputs, dict[str, Tensor]]],
        zeros: Mapping[str, Tensor],
        targets: Targets,
        *,
        plain: bool,
    ) -> tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]]:
        """The losses, the derivatives of their sum at every place, and what the network saw there."""

        def losses(gates: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            outputs, seen = network(gates)
            each = self.objective.vectorized(outputs, targets)
            return each, (each.detach(), seen)

        if plain:  # the loss stays outside of the transform, where it may look at numbers
            outputs, pull, seen = torch.func.vjp(network, zeros, has_aux=True)  # type: ignore[misc]
            each, slopes = self.objective.slopes(outputs, targets)
        else:
            slopes, pull, (each, seen) = torch.func.vjp(losses, zeros, has_aux=True)  # type: ignore[misc]
            slopes = torch.ones_like(slopes)
        try:
            (grads,) = pull(slopes, retain_graph=False, create_graph=False)
        except RuntimeError as error:
            if plain or "inplace operation" not in str(error):
                raise
            raise Unvectorized from error  # a loss that writes over the outputs gets copies of its own when it is plain
        return each, grads, seen


def _each_alone(run: Callable[..., Pass], spec: Spec, inputs: Inputs, targets: Targets) -> Pass:
    """Every example as a batch of one: vectorized, or one after the other where an operator or the loss cannot be."""
    batch: Targets = (inputs, targets)
    columns: Sequence[Tensor] | None = None
    if not isinstance(targets, Parted):
        with suppress(RuntimeError, ShapeError, Unvectorized):  # if that was not the reason, it comes again
            columns = torch.func.vmap(partial(run, plain=False))(*optree.tree_map(lambda x: x.unsqueeze(1), batch))
    if columns is None:
        rows = [run(*one, plain=True) for one in one_by_one(batch, spec)]
        columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    each, summed, mean, tally = columns
    return Pass(each.flatten(0, 1), summed.flatten(0, 1), mean.flatten(0, 1), tally.sum(0))


def _images(spec: Spec) -> frozenset[str]:
    """The values that layers consume which are faster on images in ``torch.channels_last`` memory."""
    roles = [(node, node.layer.role(Memory)) for node in spec.nodes]
    return frozenset(x for node, role in roles if role is not None and role.channels_last for x in node.inputs)


def _channels_last(spec: Spec, inputs: Inputs, images: frozenset[str]) -> Inputs:
    if not images:
        return inputs
    return {
        name: x.to(memory_format=torch.channels_last) if name in images and isinstance(x, Tensor) and x.ndim == 4 else x
        for name, x in bind_inputs(spec, (inputs,)).items()
    }
