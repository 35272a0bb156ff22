"""The oracle: what the loss really does when a unit leaves, which every criterion estimates.

For unit ``u`` and every example,

    dL_u = L(m_u = 0) - L(1),

one forward pass per unit and batch, with the unit's gate at zero: "the oracle" of Molchanov et al. 2016 (arXiv
1611.06440, section 3.2). What does not depend on any read of the unit is computed once; only the
`Part` of the network that does is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import optree
import torch
from torch import Tensor

from taylorfx.coupling.couple import own
from taylorfx.coupling.units import Coupling
from taylorfx.network.labels import Labels
from taylorfx.network.run import apply, bind_inputs, evaluate, fitted
from taylorfx.network.spec import Spec
from taylorfx.progress import LOG, bar
from taylorfx.scoring.batches import Batch, Batches, each_batch, one_by_one
from taylorfx.scoring.gates import gates
from taylorfx.scoring.losses import Objective, refuse_flat
from taylorfx.scoring.measurement import Measurement, objective_of
from taylorfx.tree import Params, flatten, restrict
from taylorfx.truth.gated import Network, either, gated, rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from taylorfx.scoring.measurement import ObjectiveOptions

__all__ = ["Oracle", "alone", "observations", "ones", "oracle", "parted"]


@dataclass(frozen=True)
class Oracle:
    """Sums over the examples of the change of their loss when a unit leaves, alone: an additive value.

    The sums are kept separately for the examples at even and at odd places, so that the oracle knows its own noise;
    ``+`` goes on counting where the first one ended.

    Attributes:
        n: the number of examples.
        loss: the sum of their losses with all units.
        sum, sum_abs: ``(2, units)``, of the changes and of their absolute values, for either half of the examples.
        units: the names of the units.
    """

    n: int
    loss: Tensor
    sum: Tensor
    sum_abs: Tensor
    units: tuple[str, ...]

    def signed(self, half: int | None = None) -> Tensor:
        """``E[dL]``, ``(units,)``: how much the loss rises without the unit; of one half (0, 1) of the examples."""
        return self._mean(self.sum, half)

    def absolute(self, half: int | None = None) -> Tensor:
        """``|E[dL]|``: by how much the loss changes, either way."""
        return self.signed(half).abs()

    def mean_absolute(self, half: int | None = None) -> Tensor:
        """``E|dL|``: by how much the loss of an example changes, either way."""
        return self._mean(self.sum_abs, half)

    def _mean(self, sums: Tensor, half: int | None) -> Tensor:
        return sums.sum(0) / self.n if half is None else sums[half] / ((self.n + 1 - half) // 2)

    def __add__(self, other: Oracle | int) -> Oracle:
        if isinstance(other, int) and other == 0:  # the start of Python's sum()
            return self
        if not isinstance(other, Oracle):
            return NotImplemented
        if self.units != other.units:
            raise ValueError(
                f"Oracles add up when they are of the same units in the same order; received {len(self.units)} and "
                f"{len(other.units)} units that differ. Ask both with one coupling and the same units=."
            )
        order = [1, 0] if self.n % 2 else [0, 1]  # the other's first example comes at an odd place
        return Oracle(
            self.n + other.n,
            self.loss + other.loss,
            self.sum + other.sum[order],
            self.sum_abs + other.sum_abs[order],
            self.units,
        )

    __radd__ = __add__


def oracle(
    params: Params,
    spec: Spec,
    batches: Batches,
    coupling: Coupling,
    *,
    measurement: Measurement | None = None,
    units: Sequence[int] | None = None,
    chunk: int | None = None,
    progress: bool = False,
    **options: Unpack[ObjectiveOptions],
) -> Oracle:
    """Leave each unit out by its gate and see what the losses of the examples do: no derivatives, the truth.

    Args:
        batches: one batch ``(inputs, targets)`` (a tuple), or any other iterable of batches.
        measurement, options: the loss, as in `measure`: ``loss``, ``per_example``, ``split``. With
            ``per_example=False`` a batch counts as one example.
        units: the numbers of the units to ask about; all by default.
        chunk: how many units to leave out side by side, under ``torch.func.vmap``. By default as many as make a batch
            of 64 examples on the CPU and of 4,096 elsewhere; with larger ones the CPU is slower than one by one.
        progress: draw a progress bar (needs rich).

    Units that are not ``coupling.exact`` are silenced, not cut: norms go on to count their channels. A network whose
    layers mix examples is asked one example at a time, unless the loss is of the whole batch.

    Raises:
        ValueError: for units that there are not, no or empty batches, or losses that are not finite or do not change
            with the outputs.
        ImportError: if a progress bar is asked for without rich.
    """
    own(params, spec, coupling)
    chosen = _chosen(units, coupling)
    objective, parts = objective_of(measurement, options), parted(params, coupling, chosen)
    total: Oracle | None = None
    first: Batch | None = None
    known = None
    if isinstance(batches, Sequence):
        known = [objective.observations(objective.parted(*batch, spec)[0], spec) for batch in each_batch(batches)]
    with torch.no_grad(), bar(progress, "oracle", sum(known) * len(chosen) if known else None) as advance:
        for one in (x for batch in each_batch(batches) for x in observations(batch, coupling, objective)):
            first = first or one
            asked = _ask(params, one, coupling, chosen, parts, objective, chunk, advance)
            total = asked if total is None else total + asked
    if total is None or first is None:
        raise ValueError("There is nothing to ask: received no batch. Was the iterator already used up?")
    bad = [name for name, good in zip(total.units, total.sum_abs.sum(0).isfinite().tolist(), strict=True) if not good]
    if bad or not total.loss.isfinite():
        raise ValueError(
            f"Losses have to be finite; that of the network itself is {total.loss.item():.3g}, and {len(bad)} of "
            f"{len(chosen)} units change it to what is not{', first ' + bad[0] if bad else ''}. Check the inputs and "
            "the parameters; a loss that compares examples has to be asked for the whole batch, per_example=False."
        )
    largest, mean = total.mean_absolute().max(), total.loss / total.n
    refuse_flat(objective, params, spec, first, largest, mean, values=True)
    LOG.info("oracle: left out %d units, each for %d examples", len(chosen), total.n)
    return total


def _ask(
    params: Params,
    batch: Batch,
    coupling: Coupling,
    units: Sequence[int],
    parts: Sequence[Part],
    objective: Objective,
    chunk: int | None,
    advance: Callable[[int], None],
) -> Oracle:
    """The oracle of one batch."""
    whole, place = ones(params, coupling), {unit: k for k, unit in enumerate(units)}
    base = _changed((params, coupling.spec, *batch, coupling), whole[None], objective)[0].to(whole.dtype)
    sums = whole.new_zeros(2, 2, len(units))  # of the changes and of their absolute values, by halves
    for some, network in alone(params, batch, coupling, parts, chunk):
        off = whole.repeat(len(some), 1)
        off[range(len(some)), some] = 0
        changes = _changed(network, off, objective).to(whole.dtype) - base
        both = torch.stack([changes, changes.abs()])  # (2, units, N)
        halves = [both[..., half::2].sum(-1) for half in (0, 1)]
        sums[:, :, [place[unit] for unit in some]] = torch.stack(halves, 1)
        advance(changes.numel())
    return Oracle(len(base), base.sum(), sums[0], sums[1], tuple(coupling.names[unit] for unit in units))


def _changed(network: Network, points: Tensor, objective: Objective) -> Tensor:
    """The losses with the gates at each of the points, ``(points, N)``; side by side, and the loss, too, if it can."""

    def outputs(values: Tensor) -> Any:
        params, spec, inputs, _, coupling = network
        return apply(params, spec, inputs, gates=gates(coupling, values))

    def losses(plain: bool) -> Tensor:
        if not plain:
            return rows(partial(gated, network, objective=objective, plain=False), points)
        values = rows(outputs, points)
        each = (optree.tree_map(lambda x, k=k: x[k], values) for k in range(len(points)))
        return torch.stack([objective.plain(one, network[3]) for one in each])

    return either(losses)


@dataclass(frozen=True, eq=False)
class Part:
    """Units that are read at the same places, and the part of the network that depends on them.

    Its ``inputs`` are nodes of the whole network, whose values do not depend on these units.
    """

    units: tuple[int, ...]
    params: Params
    spec: Spec
    coupling: Coupling
    inputs: tuple[str, ...]


def alone(
    params: Params, batch: Batch, coupling: Coupling, parts: Sequence[Part], chunk: int | None = None
) -> Iterator[tuple[list[int], Network]]:
    """Go through the units of all parts, some at a time, with the part of the network that depends on their gates.

    The part's losses are those of the whole network, as long as the gates of all other units are one.
    """
    inputs, targets = batch
    wanted = {name for part in parts for name in part.inputs}
    values = bind_inputs(coupling.spec, (inputs,))
    if chunk is None:
        first = next(iter(values.values()))
        chunk = max(1, (64 if first.device.type == "cpu" else 4096) // len(first))
    if chunk < 1:
        raise ValueError(f"At least one unit is left out at a time; received chunk={chunk}.")

    def keep(name: str, slot: int, x: Tensor) -> Tensor:
        if slot == -1 and name in wanted:
            values[name] = x
        return x

    evaluate(params, coupling.spec, (inputs,), tap=keep)
    here = fitted(coupling.spec, inputs)
    for part in parts:
        if here is not coupling.spec:
            names = [node.name for node in part.spec if node.name not in part.spec.input_layers]
            part = replace(part, spec=here.part(names, part.spec.outputs, part.spec.keys))
        inputs_of_part = {name: values[name] for name in part.inputs}
        for start in range(0, len(part.units), chunk):
            yield (
                list(part.units[start : start + chunk]),
                (part.params, part.spec, inputs_of_part, targets, part.coupling),
            )


def parted(params: Params, coupling: Coupling, units: Sequence[int]) -> list[Part]:
    """The units by where they are read, each kind with its part of the network."""
    read = np.zeros((len(coupling.reads), len(coupling) + 1), bool)
    for k, place in enumerate(coupling.reads):
        read[k, place.units.ravel()] = True
    kinds, member = np.unique(read[:, list(units)], axis=1, return_inverse=True)
    numbers: Labels = np.asarray(units, np.int64)
    return [
        _part(params, coupling, kinds[:, k], tuple(numbers[member.ravel() == k].tolist()))
        for k in range(kinds.shape[1])
    ]


def _part(params: Params, coupling: Coupling, read: Labels, units: tuple[int, ...]) -> Part:
    """The part of the network that depends on what is read at some of its places."""
    spec = coupling.spec
    reads = tuple(place for place, here in zip(coupling.reads, read, strict=True) if here)
    names = spec.downstream(place.node for place in reads)
    part = spec.part(names, spec.outputs, spec.keys)
    inputs = tuple(name for name in part.input_layers if name not in names)
    return Part(units, restrict(params, part.shapes), part, replace(coupling, reads=reads), inputs)


def observations(batch: Batch, coupling: Coupling, objective: Objective) -> list[Batch]:
    """The batch, parted; its examples one at a time where layers would mix them, and the loss does not."""
    batch = objective.parted(*batch, coupling.spec)
    return one_by_one(batch, coupling.spec) if coupling.mixing and objective.per_example else [batch]


def ones(params: Params, coupling: Coupling) -> Tensor:
    """All gates at one, ``(units,)``, in single precision or better, where the parameters are."""
    real = next((x for x in flatten(params).values() if x.is_floating_point()), torch.ones(()))
    return torch.ones(len(coupling), dtype=torch.promote_types(real.dtype, torch.float32), device=real.device)


def _chosen(units: Sequence[int] | None, coupling: Coupling) -> list[int]:
    chosen = list(range(len(coupling))) if units is None else [int(unit) for unit in units]
    strange = [unit for unit in chosen if not 0 <= unit < len(coupling)]
    if strange or len(set(chosen)) < len(chosen) or not chosen:
        raise ValueError(
            f"Units are chosen by their numbers, 0 to {len(coupling) - 1}, each once and at least one; received "
            f"{len(chosen)}, {len(chosen) - len(set(chosen))} twice, and {strange or 'none'} that there are not."
        )
    return chosen
