"""Networks with inputs that may be left out: one network for every way to call it.

An `Input` says in which calls it is there, and a `Choose` which of its inputs is the value in a call. For a call, what
it does not need is left out, so that what remains is a network like any other::

    inputs x, mask                     with x and mask          with x alone

    x ---------------+                 x                        x
    |                |                 |                        |
    scaled <- mask   |                 scaled <- mask           |
    |                |                 |                        |
    +--> choose <----+                 choose                   choose
            |                          |                        |
          output                     output                   output
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from taylorfx.layers import Choose, Input, ShapeError
from taylorfx.network.interface import Argument, Interface

if TYPE_CHECKING:
    from taylorfx.network.spec import Node, Spec

__all__ = ["Called", "calls", "chosen"]


class Called(NamedTuple):
    """The network of one way to call another one.

    Attributes:
        places: for each of its parameters the place among those of the other one.
    """

    spec: Spec
    places: tuple[int, ...]


def calls(spec: Spec) -> dict[tuple[str, ...], Called]:
    """The networks of all calls, by the names of the inputs that are there; empty if every input always is.

    Raises:
        ShapeError: if nodes disagree about how many calls there are, or two calls have the same inputs.
    """
    counts = {node.name: len(_calls(node)) for node in spec.inputs if _calls(node)}
    if not counts:
        return {}
    counts |= {node.name: len(node.layer.of) for node in spec.nodes if isinstance(node.layer, Choose)}
    if len({*counts.values()}) > 1:
        listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
        raise ShapeError(f"Nodes agree about how many calls a network has; received {listed}.")
    networks = {}
    for k in range(next(iter(counts.values()))):
        names = tuple(node.name for node in spec.inputs if not _calls(node) or _calls(node)[k])
        if names in networks:
            raise ShapeError(f"Calls differ in their inputs; received two with {', '.join(names)}.")
        networks[names] = _call(spec, k, names)
    return networks


def chosen(networks: Mapping[tuple[str, ...], Called], names: Iterable[str]) -> Called:
    """The network of the call with these inputs.

    Raises:
        ShapeError: if there is no such call.
    """
    there = {*names}
    for inputs, call in networks.items():
        if there == {*inputs}:
            return call
    listed = "\n  ".join(", ".join(inputs) for inputs in networks)
    raise ShapeError(
        f"A network is called with the inputs with which it was captured; received {', '.join(sorted(there))}. "
        f"Its calls are:\n  {listed}"
    )


def _calls(node: Node) -> Sequence[bool]:
    return node.layer.calls if isinstance(node.layer, Input) else ()


def _call(spec: Spec, number: int, names: Sequence[str]) -> Called:
    """The network of the call of this number, whose inputs are these."""
    nodes = {}
    for node in spec.nodes:
        if isinstance(node.layer, Input):
            if node.name in names:
                nodes[node.name] = replace(node, layer=replace(node.layer, calls=()))
        elif isinstance(node.layer, Choose):
            nodes[node.name] = replace(node, layer=Choose((0,)), inputs=(node.inputs[node.layer.of[number]],))
        else:
            nodes[node.name] = node
    needed = {*names, *spec.outputs}
    for name in reversed(nodes):
        if name in needed:
            needed.update(nodes[name].inputs)
    interface = _without(spec.interface, names) if spec.interface else None
    part = replace(spec, nodes=tuple(node for name, node in nodes.items() if name in needed), interface=interface)
    place = {path: k for k, path in enumerate(spec.layout.paths)}
    return Called(part, tuple(place[path] for path in part.layout.paths))


def _without(interface: Interface, names: Sequence[str]) -> Interface:
    """The interface of the call with these inputs: where the others would be is what was captured in their place."""

    def of(argument: Argument) -> Argument:
        inputs = tuple((place, node) for place, node in argument.inputs if node in names)
        taken = {place for place, _ in inputs}
        return replace(argument, inputs=inputs, fixed=tuple(x for x in argument.fixed if x[0] not in taken))

    return replace(interface, arguments=tuple(map(of, interface.arguments)))
