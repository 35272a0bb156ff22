"""The mean loss of a network on examples, in inference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taylorfx.coupling.units import Coupling
from taylorfx.cutting.plan import Plan
from taylorfx.distributed import alone, sharing
from taylorfx.network.run import apply
from taylorfx.scoring.batches import Batches, Targets, each_batch
from taylorfx.scoring.losses import Objective, Outputs
from taylorfx.scoring.measurement import Measurement
from taylorfx.tree import Params
from taylorfx.truth.gated import either
from taylorfx.truth.oracles import observations

__all__ = ["each_loss", "mean_loss"]


def mean_loss(
    params: Params, coupling: Coupling, batches: Batches, measurement: Measurement, *, plan: Plan | None = None
) -> float:
    """The mean over the examples, with ``measurement.total`` over those of all processes; NaN if one is not finite.

    The arguments are those of `each_loss`.

    Raises:
        ValueError: for no examples.
    """

    def summed() -> Tensor:
        losses = each_loss(params, coupling, batches, measurement, plan=plan)
        finite = losses.isfinite()
        return torch.stack([losses[finite].sum(), finite.sum(), (~finite).sum()])

    loss, finite, strange = (measurement.total or alone)(summed).tolist()
    if not finite + strange:
        raise ValueError("A network is judged by its loss on examples; received none.")
    return math.nan if strange else loss / finite


def each_loss(
    params: Params, coupling: Coupling, batches: Batches, measurement: Measurement, *, plan: Plan | None = None
) -> Tensor:
    """The loss of every example, ``(N,)`` in double precision: of this process, if there are several.

    Args:
        coupling: of the network.
        batches: one batch ``(inputs, targets)``, or any other iterable of such; perhaps none.
        measurement: the loss, as in `measure`. A loss of whole batches counts every batch once.
        plan: the network without the units that it leaves out, by its gates.
    """
    objective, gates = measurement.objective, None if plan is None else plan.gates
    parts = [torch.zeros(0, dtype=torch.float64)]
    with torch.no_grad(), sharing(params) as own:
        for batch in each_batch(batches):
            for inputs, targets in observations(batch, coupling, objective):
                parts.append(_losses(objective, apply(own, coupling.spec, inputs, gates=gates), targets))
    return torch.cat(parts)


def _losses(objective: Objective, outputs: Outputs, targets: Targets) -> Tensor:
    """The loss of every example of a batch."""
    each = either(lambda plain: (objective.plain if plain else objective.vectorized)(outputs, targets))
    return each.to("cpu", torch.float64)
