"""What an expert of a mixture is worth by what it adds to the activations: REAP."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from taylorfx.coupling.couple import own
from taylorfx.coupling.mixtures import Mixture, mixtures
from taylorfx.coupling.units import Coupling
from taylorfx.network.run import evaluate
from taylorfx.network.spec import Spec
from taylorfx.scoring.batches import Batches, each_batch
from taylorfx.scoring.criterion import Criterion
from taylorfx.scoring.losses import Loss, cross_entropy
from taylorfx.tree import Params

__all__ = ["reap"]


@partial(Criterion, of="network")
def reap(params: Params, spec: Spec, batches: Batches, coupling: Coupling, *, loss: Loss = cross_entropy) -> Tensor:
    """The router's weight times the norm of the expert's output (Lasby et al. 2025, "REAP", arXiv 2510.13999).

    It is the mean over the positions at which the router chooses the expert, and zero if there are none. Nothing is
    differentiated, and the loss is not called. Units that are no experts get the largest score of an expert: protect
    them.

    Raises:
        ValueError: if no experts may leave, or if their outputs are not multiplied by anything.
    """
    own(params, spec, coupling)
    found = [*mixtures(coupling)]
    if strange := [mixture.experts.name for mixture in found if mixture.product is None]:
        raise ValueError(
            "REAP multiplies outputs of experts by the router's weights; received a network in which nothing does that "
            f"with those of {', '.join(strange)}. Take another criterion."
        )
    experts = np.unique(np.concatenate([np.zeros(1, np.int64) - 1, *(mixture.units.ravel() for mixture in found)]))
    if len(experts) == 1:
        raise ValueError(
            "REAP scores experts that may leave, whose outputs a router's weights multiply; received a network without "
            "any. Take another criterion."
        )
    sums = torch.zeros(2, len(coupling) + 1, dtype=torch.float64)  # of norms, and how many these are
    wanted, seen = {name for mixture in found for name in (mixture.experts.name, mixture.product)}, Seen()

    def keep(name: str, slot: int, x: Tensor) -> Tensor:
        if name in wanted:
            seen[name, slot] = x
        return x

    with torch.no_grad():
        for inputs, _ in each_batch(batches):
            evaluate(params, spec, (inputs,), tap=keep)
            for mixture in found:
                units, norms = _rows(mixture, seen)
                for row in units % len(sums[0]):  # what is no unit comes last
                    sums.index_add_(1, row, torch.stack([norms, torch.ones_like(norms)]))
    scores = sums[0, :-1] / sums[1, :-1].clamp(min=1)
    others = torch.ones(len(coupling), dtype=torch.bool).index_fill(0, torch.as_tensor(experts[1:]), 0)
    return scores.masked_fill(others, float(scores.max()))


Seen = dict[tuple[str, int], Tensor]
"""What layers consume and give, by node and slot."""


def _rows(mixture: Mixture, seen: Seen) -> tuple[Tensor, Tensor]:
    """Of every row that an expert makes, the units ``(factors, rows)`` and the norm of what it adds ``(rows,)``."""
    node, product = mixture.experts, mixture.product
    assert product is not None
    numbers = mixture.role.numbers(*(seen[node.name, slot] for slot in range(len(node.inputs)))).cpu()
    added = seen[product, -1].reshape(*numbers.shape, -1).cpu().double()
    return torch.as_tensor(mixture.units)[:, numbers[numbers >= 0]], added.norm(dim=-1)[numbers >= 0]
