"""Label a network: the labels of all its axes, and what its layers say about them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from taylorfx.network.bind import propagate
from taylorfx.network.labels import Bound, Site, Ties
from taylorfx.network.limits import Room
from taylorfx.network.spec import Spec

__all__ = ["Labeling", "copies", "label"]


@dataclass(frozen=True)
class Labeling:
    """A network with labeled axes.

    Attributes:
        spec: the network.
        bounds: for every node, its signature bound to labels.
        ties: which labels leave together, which are products of others, and which have to stay.
    """

    spec: Spec
    bounds: Mapping[str, Bound]
    ties: Ties

    @property
    def reads(self) -> Iterator[Site]:
        """Every place where a layer mixes along labels."""
        return (site for bound in self.bounds.values() for site in bound.reads)

    @property
    def writes(self) -> Iterator[Site]:
        """Every place where a layer creates labels."""
        return (site for bound in self.bounds.values() for site in bound.writes)


def label(spec: Spec) -> Labeling:
    """Carry labels from the inputs of a network to its outputs, which keep their size.

    Raises:
        ShapeError: if an input's shape is not declared, or the layers do not fit each other.
    """
    ties = Ties(room=Room.beside(spec.shapes.values()))
    bounds = propagate(spec, ties)
    for name in spec.outputs:
        for axis in bounds[name].output:
            ties.freeze(axis, _given_out(name))
    return Labeling(spec, bounds, ties)


def _given_out(name: str) -> str:
    return f"{name} is an output of the network"


def copies(spec: Spec) -> dict[str, tuple[str, ...]]:
    """For every output of a captured module that its layers consume, too: why it is frozen, and the output's names.

    Without such an output the module computes the others as before. Numbered ones (``hidden_states.3``) are named
    together (``hidden_states.*``).
    """
    names: dict[str, tuple[str, ...]] = {}
    for key, name in zip(spec.keys or map(str, range(len(spec.outputs))), spec.outputs, strict=True):
        if spec.interface is not None and spec.consumers[name]:
            kind = re.sub(r"\.\d+(?=\.|$)", ".*", key)
            names[_given_out(name)] = tuple(dict.fromkeys((*names.get(_given_out(name), ()), kind)))
    return names
