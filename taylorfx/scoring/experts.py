"""What an expert of a mixture is worth by what it adds to the activations: REAP."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from taylorfx.coupling.couple import own
from taylorfx.coupling.units import Coupling
from taylorfx.layers.roles import Experts, Product, Viewing
from taylorfx.network.labels import Labels
from taylorfx.network.run import evaluate
from taylorfx.network.spec import Node, Spec
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
    mixtures = [*_mixtures(coupling)]
    experts = np.unique(np.concatenate([np.zeros(1, np.int64) - 1, *(mixture.units.ravel() for mixture in mixtures)]))
    if len(experts) == 1:
        raise ValueError(
            "REAP scores experts that may leave, whose outputs a router's weights multiply; received a network without "
            "any. Take another criterion."
        )
    sums = torch.zeros(2, len(coupling) + 1, dtype=torch.float64)  # of norms, and how many these are
    wanted, seen = {name for mixture in mixtures for name in (mixture.experts.name, mixture.product)}, Seen()

    def keep(name: str, slot: int, x: Tensor) -> Tensor:
        if name in wanted:
            seen[name, slot] = x
        return x

    with torch.no_grad():
        for inputs, _ in each_batch(batches):
            evaluate(params, spec, (inputs,), tap=keep)
            for mixture in mixtures:
                units, norms = mixture.rows(seen)
                for row in units % len(sums[0]):  # what is no unit comes last
                    sums.index_add_(1, row, torch.stack([norms, torch.ones_like(norms)]))
    scores = sums[0, :-1] / sums[1, :-1].clamp(min=1)
    others = torch.ones(len(coupling), dtype=torch.bool).index_fill(0, torch.as_tensor(experts[1:]), 0)
    return scores.masked_fill(others, float(scores.max()))


Seen = dict[tuple[str, int], Tensor]
"""What layers consume and give, by node and slot."""


class _Mixture(NamedTuple):
    """Experts whose outputs are multiplied by a router's weights.

    Attributes:
        experts: the node of the experts' last layer.
        role: the role of that layer.
        units: ``(factors, experts)``, the units of the experts; -1 for none.
        product: the node that multiplies its output, in which every row stands at its place.
    """

    experts: Node
    role: Experts
    units: Labels
    product: str

    def rows(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Of every row that an expert makes, the units ``(factors, rows)`` and the norm of what it adds ``(rows,)``."""
        numbers = self.role.numbers(*(seen[self.experts.name, slot] for slot in range(len(self.experts.inputs)))).cpu()
        added = seen[self.product, -1].reshape(*numbers.shape, -1).cpu().double()
        return torch.as_tensor(self.units)[:, numbers[numbers >= 0]], added.norm(dim=-1)[numbers >= 0]


def _mixtures(coupling: Coupling) -> Iterator[_Mixture]:
    """The last layers of experts: those whose output is not consumed by others with the same router."""
    spec = coupling.spec
    roles = {node.name: role for node in spec if (role := node.layer.role(Experts))}
    for name, role in roles.items():
        node, after = spec[name], spec.downstream([name]) - {name}
        if not any(other in after and spec[other].inputs[0] == node.inputs[0] for other in roles):
            yield _Mixture(node, role, coupling.axes[coupling.letters[name][role.letter]], _product(spec, node))


def _product(spec: Spec, node: Node) -> str:
    """The node that multiplies a node's value, through views of it."""
    current = node
    while True:
        consumers = spec.consumers[current.name]
        if len(consumers) == 1 and consumers[0].layer.role(Product):
            return consumers[0].name
        if len(consumers) != 1 or not consumers[0].layer.role(Viewing):
            raise ValueError(
                f"Outputs of experts are multiplied by the router's weights; received {node.name}, whose output "
                f"{', '.join(x.name for x in consumers) or 'no layer'} consumes."
            )
        current = consumers[0]
