"""Mixtures of experts within a network: their last layers, and what is done with what these give out.

::

    experts (..., K, o) -> views -> times the router's weights (..., K, 1) -> views -> summed over K
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from taylorfx.coupling.units import Coupling
from taylorfx.layers.roles import Experts, Product, Summing, Viewing
from taylorfx.network.labels import Labels
from taylorfx.network.spec import Node, Spec

__all__ = ["Mixture", "mixtures"]


@dataclass(frozen=True)
class Mixture:
    """The last layer of experts: no other experts with the same router consume what it gives out.

    Attributes:
        experts: its node.
        role: its role.
        units: ``(factors, experts)``, the units of the experts; -1 for none.
        product: the node that multiplies its output, in which every row stands at its place; ``None`` if none does.
        weights: the node with one factor for each row, if their products are then summed over the rows of a position;
            otherwise ``None``.
    """

    experts: Node
    role: Experts
    units: Labels
    product: str | None
    weights: str | None


def mixtures(coupling: Coupling) -> Iterator[Mixture]:
    """All mixtures of a network, in order."""
    spec = coupling.spec
    roles = {node.name: role for node in spec if (role := node.layer.role(Experts))}
    for name, role in roles.items():
        node, after = spec[name], spec.downstream([name]) - {name}
        if any(other in after and spec[other].inputs[0] == node.inputs[0] for other in roles):
            continue
        units = coupling.axes[coupling.letters[name][role.letter]]
        product = _beyond_views(spec, name)
        if product is None or not spec[product].layer.role(Product):
            yield Mixture(node, role, units, None, None)
        else:
            yield Mixture(node, role, units, product, _weights(coupling, node, product))


def _beyond_views(spec: Spec, name: str) -> str | None:
    """The only node that consumes a node's value, through views that leave the order of its numbers."""
    while len(spec.consumers[name]) == 1 and spec.uses[name] == 1:
        node = spec.consumers[name][0]
        viewing = node.layer.role(Viewing)
        if viewing is None or viewing.dims is not None:
            return node.name
        name = node.name
    return None


def _weights(coupling: Coupling, experts: Node, product: str) -> str | None:
    spec, (*_, count, width) = coupling.spec, coupling.bounds[experts.name].shape
    rows = math.prod(coupling.bounds[experts.name].shape) // width
    factors = [
        name
        for name, shape in zip(spec[product].inputs, coupling.bounds[product].inputs, strict=True)
        if math.prod(shape) == rows
    ]
    total = _beyond_views(spec, product)
    summing = None if total is None else spec[total].layer.role(Summing)
    if total is None or summing is None or len(factors) != 1 or len(spec[product].inputs) != 2:
        return None
    shape = coupling.bounds[total].inputs[0]
    over = [dim % len(shape) for dim in summing.dims]
    return factors[0] if over == [len(shape) - 2] and shape[-2:] == (count, width) else None
