"""A pass: positions that no output depends on are not computed.

Of a network that classifies by one token, the last block computes all others for nothing. A slice is taken earlier
than where it stands: not of what a layer gives out, but of what that layer consumes, if it treats the positions along
the axis of the slice each alone. Along an axis that may shrink all layers do so, unless they take statistics over it or
have parameters for its positions; along a rigid one those that say so, as attention does for its queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from taylorfx import layers as L
from taylorfx.coupling.units import Coupling
from taylorfx.layers.axes import letters
from taylorfx.layers.roles import Role, Slicing
from taylorfx.network.build import unused
from taylorfx.network.labels import is_example
from taylorfx.network.spec import Node
from taylorfx.rewrite.draft import Draft

__all__ = ["Only", "Positions", "Sliced", "positions", "unused_positions"]


@dataclass(frozen=True)
class Only(L.Slice):
    """A slice that is taken earlier than in the network: the values behind it have fewer positions than there."""

    def roles(self) -> tuple[Role, ...]:
        return ()  # no pass makes something else of it: taps count positions by it

    def kept(self, shape: L.Shape) -> L.Shape:
        """The shape of what is left of a tensor of this shape."""
        return (*shape[: self.dim], self.stop - self.start, *shape[self.dim + 1 :])


@dataclass(frozen=True)
class Sliced(L.Identity):
    """Where the slice was: the values behind it are as in the network."""


def unused_positions(draft: Draft) -> Draft:
    """Take slices before the layers that treat positions each alone, if that spares matrix products. The first pass.

    tokens --> up --> gelu --> down --> slice --> first token
    tokens --> only --> up --> gelu --> down --> sliced --> first token
    """
    earlier = _Earlier(draft.coupling)
    for node in draft.coupling.spec.nodes:
        slicing = node.layer.role(Slicing)
        if slicing is not None:
            earlier.take(node, slicing)
    return draft if len(earlier.nodes) == len(draft.spec.nodes) else draft.rewritten(earlier.nodes.values())


class Positions(NamedTuple):
    """Positions along one axis, as a layer has them: their letter, and the axis in each input that has them."""

    letter: str
    axes: tuple[int | None, ...]


def positions(coupling: Coupling, node: Node, axis: int) -> Positions | None:
    """The positions along an axis of a node's value in what it consumes, if its layer treats each of them alone.

    Of attention, ``B h Q e, B h T e, B h T v -> B h Q v``, axis 2 has the letter ``Q``: the queries are treated each
    alone, and lie along the axes ``(2, None, None)`` of the inputs.
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
    return None if axes.count(None) == len(axes) else Positions(letter, tuple(axes))


class _Earlier:
    """The nodes of a network as they are after the slices until now."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling, self.nodes = coupling, dict(coupling.spec.by_name)

    def take(self, node: Node, slicing: Slicing) -> None:
        """Take a slice as early as it can be, if that spares matrix products."""
        (source,), bounds, count = node.inputs, self.coupling.bounds, slicing.stop - slicing.start
        if count == bounds[source].shape[slicing.dim] or is_example(bounds[source].output[slicing.dim]):
            return
        smaller = dict(self._smaller(source, slicing.dim))
        if not any(self.nodes[x].layer.multiplies for x in smaller):
            return
        self.nodes[node.name] = replace(node, layer=Sliced())
        taken: dict[tuple[str, int], str] = {}
        for name, (letter, axes) in smaller.items():
            node, bound = self.nodes[name], bounds[name]
            inputs = list(node.inputs)
            for slot, (x, axis) in enumerate(zip(node.inputs, axes, strict=True)):
                if axis is not None and x not in smaller:
                    inputs[slot] = taken[x, axis] = taken.get((x, axis)) or unused(f"{x}.only", self.nodes)
                    self.nodes[inputs[slot]] = Node(inputs[slot], Only(axis, slicing.start, slicing.stop), (x,))
            resized = node.layer.resize({**bound.sizes, letter: count}, *bound.inputs)
            self.nodes[name] = replace(node, layer=resized, inputs=tuple(inputs))

    def _smaller(self, name: str, axis: int) -> Iterator[tuple[str, Positions]]:
        """The layers of whose positions along an axis only some are used, from the value ``name`` back."""
        asked: dict[str, list[int]] = {}  # for every value, the axes along which its consumers need some positions
        waiting = [(name, axis)]
        while waiting:
            name, axis = waiting.pop()
            axes = asked.setdefault(name, [])
            axes.append(axis)
            node = self.nodes[name]
            sliced = isinstance(node.layer, (Only, Sliced)) or node.layer.role(Slicing) is not None
            if sliced or axes != [axis] * self.coupling.spec.uses[name]:  # some consumer needs all, or has not asked
                continue
            along = positions(self.coupling, node, axis)
            if along is not None:
                yield name, along
                waiting += [(x, k) for x, k in zip(node.inputs, along.axes, strict=True) if k is not None]
