"""Unused positions are not computed: of a network that classifies by one token, all others of the last block.

A slice is taken earlier: not of the values of layers that treat the positions along its axis each alone, but of what
these layers consume. A network that uses token 0 of 197::

    x --> norm --> linear --> slice        becomes        x --> slice --> norm --> linear

Along an axis that may shrink, all layers treat positions each alone, unless they take statistics over it or have
parameters for its positions; along a rigid one those that state it (`Layer.separate`), as attention does of queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from taylorfx import layers as L
from taylorfx.coupling.units import Coupling
from taylorfx.layers.axes import letters
from taylorfx.layers.roles import Role, Slicing
from taylorfx.network.build import unused
from taylorfx.network.labels import is_example
from taylorfx.network.spec import Node, Spec

__all__ = ["Found", "Only", "way", "without_unheard"]


@dataclass(frozen=True)
class Only(L.Slice):
    """A slice that is taken earlier: the nodes from here to its `Found` have fewer positions than in the network."""

    def roles(self) -> tuple[Role, ...]:
        return ()  # no pass may take it for a slice of the network itself


@dataclass(frozen=True)
class Found(L.Identity):
    """Where the network has the slice: the nodes from here on have as many positions as in the network."""


def without_unheard(coupling: Coupling) -> Spec:
    """The network with its slices taken before matrix products, where they can be."""
    earlier = _Earlier(coupling)
    for node in coupling.spec.nodes:
        role = node.layer.role(Slicing)
        if role is not None:
            earlier.take(node, role)
    return earlier.spec()


Way = tuple[str, tuple[int | None, ...]]
"""How positions run through a layer: their letter in its signature, and its axis in each input, if it is there."""


def way(coupling: Coupling, node: Node, axis: int) -> Way | None:
    """How positions along an axis of a node's value run through its layer, if it treats each alone.

    Of a linear layer ``B T i, weight: o i -> B T o``, axis 1 does, as ``("T", (1,))``, and axis 2 does not: ``None``.
    """
    signature = coupling.signature(node)
    letter = None if signature is None else signature.output.singles[axis]
    if signature is None or letter is None or letter in node.layer.inexact:
        return None
    if letter.isupper() and letter not in node.layer.separate:
        return None
    if any(letter in letters(pattern) for pattern in signature.parameters.values()):
        return None
    axes: list[int | None] = []
    for pattern in signature.inputs:
        places = [k for k, single in enumerate(pattern.singles) if single == letter]
        if len(places) != letters(pattern).count(letter) or len(places) > 1:
            return None
        axes.append(places[0] if places else None)
    return None if axes.count(None) == len(axes) else (letter, tuple(axes))


class _Earlier:
    """The nodes of a network as they are after the slices taken until now."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling, self.nodes = coupling, dict(coupling.spec.by_name)

    def spec(self) -> Spec:
        whole = self.coupling.spec
        return whole if len(self.nodes) == len(whole.nodes) else replace(whole, nodes=tuple(self.nodes.values()))

    def take(self, node: Node, role: Slicing) -> None:
        """Take a slice as early as it can be, if that spares matrix products."""
        (source,), bounds, count = node.inputs, self.coupling.bounds, role.stop - role.start
        if count == bounds[source].shape[role.dim] or is_example(bounds[source].output[role.dim]):
            return
        ways = dict(self._ways(source, role.dim))
        if not any(self.nodes[x].layer.multiplies for x in ways):
            return
        self.nodes[node.name] = replace(node, layer=Found())
        taken: dict[tuple[str, int], str] = {}  # the name of the slice of each value that the spared layers consume
        for name, (letter, axes) in ways.items():
            node, bound = self.nodes[name], bounds[name]
            inputs = list(node.inputs)
            for slot, (x, axis) in enumerate(zip(node.inputs, axes, strict=True)):
                if axis is not None and x not in ways:
                    inputs[slot] = taken[x, axis] = taken.get((x, axis)) or unused(f"{x}.only", self.nodes)
                    self.nodes[inputs[slot]] = Node(inputs[slot], Only(axis, role.start, role.stop), (x,))
            resized = node.layer.resize({**bound.sizes, letter: count}, *bound.inputs)
            self.nodes[name] = replace(node, layer=resized, inputs=tuple(inputs))

    def _ways(self, name: str, axis: int) -> Iterator[tuple[str, Way]]:
        """The nodes whose value along an axis is used by the slice alone, from its input upwards, and how it runs."""
        asked: dict[str, list[int]] = {}
        waiting = [(name, axis)]
        while waiting:
            name, axis = waiting.pop()
            axes = asked.setdefault(name, [])
            axes.append(axis)
            node = self.nodes[name]
            all_ask = axes == [axis] * self.coupling.spec.uses.get(name, 0)  # the slice alone uses it, along one axis
            taken = isinstance(node.layer, (Only, Found)) or node.layer.role(Slicing) is not None
            through = way(self.coupling, node, axis) if all_ask and not taken else None
            if through is not None:
                yield name, through
                waiting += [(x, k) for x, k in zip(node.inputs, through[1], strict=True) if k is not None]
