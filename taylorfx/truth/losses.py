"""The mean loss of a network on examples, in inference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taylorfx.coupling.units import Coupling
from taylorfx.cutting.plan import Plan
from taylorfx.distributed import alone, sharing
from taylorfx.network.run import apply
from taylorfx.scoring.batches import Batch, Batches, each_batch
from taylorfx.scoring.gates import Gates
from taylorfx.scoring.losses import Objective
from taylorfx.scoring.measurement import Measurement
from taylorfx.tree import Params
from taylorfx.truth.gated import either
from taylorfx.truth.oracles import observations

__all__ = ["mean_loss"]


def mean_loss(
    params: Params, coupling: Coupling, batches: Batches, measurement: Measurement, *, plan: Plan | None = None
) -> float:
    """The mean over the examples, with ``measurement.total`` over those of all processes; NaN if one is not finite.

    Args:
        coupling: of the network.
        batches: one batch ``(inputs, targets)``, or any other iterable of such.
        measurement: the loss, as in `measure`. A loss of whole batches counts every batch once.
        plan: the network without the units that it leaves out, by its gates.

    Raises:
        ValueError: for no examples.
    """
    objective, gates = measurement.objective, None if plan is None else plan.gates

    def summed() -> Tensor:
        sums = torch.zeros(3, dtype=torch.float64)
        with sharing(params) as own:
            for batch in each_batch(batches):
                some = observations(batch, coupling, objective)
                sums += sum(_losses(own, one, coupling, objective, gates) for one in some)
        return sums

    loss, strange, count = (measurement.total or alone)(summed).tolist()
    if not count:
        raise ValueError("A network is judged by its loss on examples; received none.")
    return math.nan if strange else loss / count


def _losses(params: Params, batch: Batch, coupling: Coupling, objective: Objective, gates: Gates | None) -> Tensor:
    """``(3,)``: the sum of the losses that are finite, how many are not, and how many there are."""
    inputs, targets = batch
    with torch.no_grad():
        outputs = apply(params, coupling.spec, inputs, gates=gates)
        each = either(lambda plain: (objective.plain if plain else objective.vectorized)(outputs, targets)).cpu()
    finite = each.isfinite()
    return torch.stack([each[finite].sum().double(), (~finite).sum().double(), torch.tensor(float(len(each))).double()])
