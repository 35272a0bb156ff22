"""Presence: what of a network is still there when branches leave.

A branch is one operand of a sum of two; without it the sum is its other operand, the skip. A node is there as long as
something uses its value, so it may depend on several branches, and a branch may lie in another one::

    x ---> norm ---> attention ---> + ---> ...        norm, attention      branch 7
     \\-----------------------------/
    cos ---> attention of layers 0 and 1              cos                  branch 7 or branch 8

A *condition* says this as a set of ways: all branches of one of them have to stay. What is always there has the way
without any branch, and no condition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from taylorfx.network.spec import Node, Spec

__all__ = ["Branch", "Presence", "Ways", "ways", "without"]


class Branch(NamedTuple):
    """One operand of a sum of two.

    Attributes:
        unit: its number among the units.
        node: the sum.
        slot: the number of the operand; the other one is the skip.
    """

    unit: int
    node: str
    slot: int


Ways = frozenset[frozenset[int]]
"""What is there if all branches of one of these sets stay; none of them contains another one."""

ALWAYS: Ways = frozenset([frozenset()])


def ways(spec: Spec, branches: Iterable[Branch]) -> dict[str, Ways]:
    """For every node when its value is used. The inputs, and what nothing uses in the whole network, always stay.

    >>> from taylorfx import layers as L
    >>> nodes = Node("x", L.Input((3,))), Node("up", L.Linear(3, 3), "x"), Node("sum", L.Add(), ("up", "x"))
    >>> {name: [sorted(way) for way in when] for name, when in ways(Spec(nodes), [Branch(7, "sum", 0)]).items()}
    {'sum': [[]], 'up': [[7]], 'x': [[]]}
    """
    gated = {branch.node: branch for branch in branches}
    used: dict[str, set[frozenset[int]]] = {name: set() for name in spec.by_name}
    when: dict[str, Ways] = {}
    for node in reversed(spec.nodes):
        always = node.name in spec.outputs or node.name in spec.input_layers or not spec.uses[node.name]
        when[node.name] = ALWAYS if always else _least(used[node.name])
        branch = gated.get(node.name)
        for slot, x in enumerate(node.inputs):
            own = {branch.unit} if branch is not None and branch.slot == slot else set[int]()
            used[x].update(way | own for way in when[node.name])
    return when


def _least(several: Iterable[frozenset[int]]) -> Ways:
    """The ways that contain no other one."""
    least: list[frozenset[int]] = []
    for way in sorted({*several}, key=len):
        if not any(other <= way for other in least):
            least.append(way)
    return frozenset(least)


def without(spec: Spec, gone: frozenset[str], branches: Sequence[Branch]) -> Spec:
    """The network without some nodes; what consumed the sum of a branch that is gone consumes the skip.

    Args:
        gone: the names of all nodes that are not there, the sums among them.
    """
    moved: dict[str, str] = {}
    slots = {branch.node: branch.slot for branch in branches if branch.node in gone}
    nodes: list[Node] = []
    for node in spec.nodes:
        inputs = tuple([moved.get(x, x) for x in node.inputs])
        if node.name in slots:
            moved[node.name] = inputs[1 - slots[node.name]]
        elif node.name not in gone:
            nodes.append(node if inputs == node.inputs else replace(node, inputs=inputs))
    return replace(spec, nodes=tuple(nodes), outputs=tuple([moved.get(x, x) for x in spec.outputs]))


@dataclass(frozen=True, eq=False)
class Presence:
    """When nodes and parameters are there, by the numbers of conditions; what is not named always is.

    Attributes:
        conditions: the different ones, except that of what is always there.
        nodes: of the nodes; a sum is a node as long as its branch stays.
        first: the same in ``spec.first``, the network of the first way to call this one.
        parameters: of the parameters, by path: as long as one of the nodes that share it is there.
        sums: of the sums of branches, as long as their value is used, which is that of the skip without the branch.
    """

    branches: tuple[Branch, ...]
    conditions: tuple[Ways, ...]
    nodes: Mapping[str, int]
    first: Mapping[str, int]
    parameters: Mapping[str, int]
    sums: Mapping[str, int]

    @staticmethod
    def of(spec: Spec, branches: tuple[Branch, ...]) -> Presence:
        """That of a network with these branches."""
        numbers: dict[Ways, int] = {}

        def numbered(when: Mapping[str, Ways]) -> dict[str, int]:
            return {x: numbers.setdefault(one, len(numbers)) for x, one in when.items() if one != ALWAYS}

        values, first = ways(spec, branches), spec.first
        here = [branch for branch in branches if branch.node in first.by_name]
        nodes = _of_nodes(values, branches)
        shared = {path: [way for node in owners for way in nodes[node.name]] for path, owners in spec.owners.items()}
        return Presence(
            branches,
            nodes=numbered(nodes),
            first=numbered(_of_nodes(ways(first, here), here)),
            parameters=numbered({path: _least(several) for path, several in shared.items()}),
            sums=numbered({branch.node: values[branch.node] for branch in branches}),
            conditions=tuple(numbers),
        )

    def holds(self, gone: frozenset[int]) -> list[bool]:
        """For every condition whether it holds without these branches."""
        return [any(way.isdisjoint(gone) for way in one) for one in self.conditions]

    def needing(self, numbers: Mapping[str, int], unit: int) -> list[str]:
        """What leaves with a branch alone; ``numbers`` as for `there`."""
        return [name for name, number in numbers.items() if all(unit in way for way in self.conditions[number])]

    def there(self, numbers: Mapping[str, int], names: Iterable[str], gone: frozenset[int]) -> list[str]:
        """Those of some names that are there without these branches.

        Args:
            numbers: of conditions, by name: ``nodes``, ``first``, ``parameters`` or ``sums``.
        """
        holds = self.holds(gone)
        return [name for name in names if name not in numbers or holds[numbers[name]]]


def _of_nodes(values: Mapping[str, Ways], branches: Iterable[Branch]) -> dict[str, Ways]:
    """When there are nodes, of when their values are used."""
    return {**values, **{b.node: frozenset([way | {b.unit} for way in values[b.node]]) for b in branches}}
