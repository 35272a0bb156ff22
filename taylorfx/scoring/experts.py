"""What an expert of a mixture is worth by what it adds to the activations: REAP."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from taylorfx.coupling.couple import own
from taylorfx.coupling.units import Coupling
from taylorfx.layers.roles import Experts, Product, Viewing
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
        ValueError: if there are no experts, or if their outputs are not multiplied by anything.
    """
    own(params, spec, coupling)
    mixtures = [*_mixtures(spec)]
    if not mixtures:
        raise ValueError(
            "REAP scores experts, whose outputs are multiplied by a router's weights; received a network without any. "
            "Take another criterion."
        )
    sums = torch.zeros(2, len(coupling) + 1, dtype=torch.float64)  # of norms, and how many these are
    seen: dict[tuple[str, int], Tensor] = {}
    wanted = {name for mixture in mixtures for name in (mixture.experts, mixture.product)}

    def keep(name: str, slot: int, x: Tensor) -> Tensor:
        if name in wanted:
            seen[name, slot] = x
        return x

    rows = [coupling.axes[coupling.letters[mixture.experts][mixture.role.letter]] for mixture in mixtures]
    with torch.no_grad():
        for inputs, _ in each_batch(batches):
            evaluate(params, spec, (inputs,), tap=keep)
            for mixture, units in zip(mixtures, rows, strict=True):
                given = [seen[mixture.experts, slot] for slot in range(len(spec[mixture.experts].inputs))]
                numbers, added = mixture.role.numbers(*given), seen[mixture.product, -1]
                numbers, added = (x.cpu() for x in (numbers, added.reshape(*numbers.shape, -1)))
                norms = added.double().norm(dim=-1)[numbers >= 0]
                both = torch.stack([norms, torch.ones_like(norms)])
                for row in torch.as_tensor(units)[:, numbers[numbers >= 0]]:
                    sums.index_add_(1, row % sums.shape[1], both)  # what is no unit comes last
    scores = sums[0, :-1] / sums[1, :-1].clamp(min=1)
    others = torch.ones(len(coupling), dtype=torch.bool)
    for units in rows:
        others[torch.as_tensor(units[units >= 0])] = False
    return scores.masked_fill(others, float(scores.max()))


class _Mixture(NamedTuple):
    """Experts whose outputs are multiplied by a router's weights.

    Attributes:
        experts: the node of the experts' last layer.
        role: the role of that layer.
        product: the node that multiplies its output, in which every row stands at its place.
    """

    experts: str
    role: Experts
    product: str


def _mixtures(spec: Spec) -> Iterator[_Mixture]:
    """The last layers of experts: those whose output is not consumed by others with the same router."""
    roles = {node.name: role for node in spec if (role := node.layer.role(Experts))}
    for name, role in roles.items():
        after = spec.downstream([name]) - {name}
        if not any(other in after and spec[other].inputs[0] == spec[name].inputs[0] for other in roles):
            yield _Mixture(name, role, _product(spec, spec[name]))


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
