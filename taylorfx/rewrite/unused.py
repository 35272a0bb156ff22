"""Positions that nobody hears are not computed: of a network that classifies by one token, the last block's others.

A slice is taken earlier: not of what layers give out that treat the positions along its axis each alone, but of what
they hear. Along an axis that may shrink all layers do so, unless they take statistics over it or have parameters for
its positions; along a rigid one those that say so, as attention does for its queries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from taylorfx import layers as L
from taylorfx.coupling.units import Coupling
from taylorfx.layers.axes import letters
from taylorfx.network.build import unused
from taylorfx.network.labels import is_example
from taylorfx.network.spec import Node, Spec

__all__ = ["Found", "Only", "way", "without_unheard"]


@dataclass(frozen=True)
class Only(L.Slice):
    """A slice that is taken earlier: what depends on it has fewer positions than before."""


@dataclass(frozen=True)
class Found(L.Identity):
    """Where the slice was: what depends on it is as before."""


def without_unheard(coupling: Coupling) -> Spec:
    """The network, its slices taken before matrix products where they can be."""
    earlier = _Earlier(coupling)
    for node in coupling.spec.nodes:
        if type(node.layer) is L.Slice:
            earlier.take(node, node.layer)
    return earlier.spec()


Way = tuple[str, tuple[int | None, ...]]
"""How positions run through a layer: their letter, and its axis in each input."""


def way(coupling: Coupling, node: Node, axis: int) -> Way | None:
    """How positions along an axis of its value run through a layer, if it treats each alone."""
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
        found = [k for k, single in enumerate(pattern.singles) if single == letter]
        if len(found) != letters(pattern).count(letter) or len(found) > 1:
            return None
        axes.append(found[0] if found else None)
    return None if axes.count(None) == len(axes) else (letter, tuple(axes))


class _Earlier:
    """A network on its way: its nodes by now."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling, self.nodes = coupling, {node.name: node for node in coupling.spec.nodes}
        self.heard = Counter([*coupling.spec.outputs, *(x for node in coupling.spec.nodes for x in node.inputs)])

    def spec(self) -> Spec:
        whole = self.coupling.spec
        return whole if len(self.nodes) == len(whole.nodes) else replace(whole, nodes=tuple(self.nodes.values()))

    def take(self, node: Node, layer: L.Slice) -> None:
        """Take a slice as early as it can be, if that spares matrix products."""
        (source,), bounds, count = node.inputs, self.coupling.bounds, layer.stop - layer.start
        if count == bounds[source].shape[layer.dim] or is_example(bounds[source].output[layer.dim]):
            return
        ways = dict(self._ways(source, layer.dim))
        if not any(self.nodes[x].layer.multiplies for x in ways):
            return
        self.nodes[node.name] = replace(node, layer=Found())
        taken: dict[tuple[str, int], str] = {}
        for name, (letter, axes) in ways.items():
            node, bound = self.nodes[name], bounds[name]
            inputs = list(node.inputs)
            for slot, (x, axis) in enumerate(zip(node.inputs, axes, strict=True)):
                if axis is not None and x not in ways:
                    inputs[slot] = taken[x, axis] = taken.get((x, axis)) or unused(f"{x}.only", self.nodes)
                    self.nodes[inputs[slot]] = Node(inputs[slot], Only(axis, layer.start, layer.stop), (x,))
            resized = node.layer.resize({**bound.sizes, letter: count}, *bound.inputs)
            self.nodes[name] = replace(node, layer=resized, inputs=tuple(inputs))

    def _ways(self, name: str, axis: int) -> Iterator[tuple[str, Way]]:
        """The layers of which only some positions along an axis are heard."""
        asked: dict[str, list[int]] = {}
        waiting = [(name, axis)]
        while waiting:
            name, axis = waiting.pop()
            axes = asked.setdefault(name, [])
            axes.append(axis)
            node = self.nodes[name]
            whole = axes != [axis] * self.heard[name] or isinstance(node.layer, (L.Slice, Found))
            found = None if whole else way(self.coupling, node, axis)
            if found is not None:
                yield name, found
                waiting += [(x, k) for x, k in zip(node.inputs, found[1], strict=True) if k is not None]
