"""Presence: what of a network is still there when branches leave.

A branch is one operand of a sum of two; without it the sum is its other operand, the skip. A node is there as long as
something uses its value, so it may depend on several branches, and a branch may lie in another one::

    x ---> norm ---> attention ---> + ---> ...        norm, attention      branch 7
     \\-----------------------------/
    cos ---> attention of layers 0 and 1              cos                  branch 7 or branch 8

Of a sum within a sum both operands are branches: without one of them the inner sum is the other one, and without both
it is nothing, so that its own sum is the skip::

    x ---> norm ---> attention ---> + ---> + ---> ...    attention         branch 7
     \\        \\----> mlp --------/     /                mlp               branch 8
      \\-------------------------------/                 norm, the outer +  branch 7 or branch 8
                                                         the inner +       branch 7 and branch 8

A *condition* says this as a set of ways: all branches of one of them have to stay. What is always there has the way
without any branch, and no condition.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from taylorfx.layers.roles import Noise, Sum
from taylorfx.network.spec import Node, Spec

__all__ = ["Branch", "Operand", "Presence", "Ways"]


Operand = tuple[str, int]
"""An operand of a sum: the name of the sum, and the number of the operand."""


class Branch(NamedTuple):
    """One operand of a sum of two.

    Attributes:
        unit: its number among the units.
        node: the sum.
        slot: the number of the operand; the other one is the skip, or a branch as well where the sum is part of another
            one.
    """

    unit: int
    node: str
    slot: int

    @property
    def operand(self) -> Operand:
        """Sum and slot."""
        return self.node, self.slot


Ways = frozenset[frozenset[int]]
"""What is there if all branches of one of these sets stay; none of them contains another one."""

ALWAYS: Ways = frozenset([frozenset()])


class _Operands(NamedTuple):
    """What the operands of sums have to do with branches.

    Attributes:
        ways: when the value of an operand is not zero by gates, for those of which it may be.
        outer: for every sum of branches alone the operand of another sum that it is.
    """

    ways: Mapping[Operand, Ways]
    outer: Mapping[str, Operand]


def _operands(spec: Spec, branches: Iterable[Branch]) -> _Operands:
    """Those of a network, in the order of its nodes.

    A sum of which both operands may be zero may be zero itself, and what noise makes of it.
    """
    gated = {branch.operand: frozenset([frozenset([branch.unit])]) for branch in branches}
    operands, outer = dict[Operand, Ways](), dict[str, Operand]()
    sums: dict[str, tuple[str, Ways]] = {}  # by value, of what sum it is, and when it is not zero
    for node in spec.nodes:
        if node.layer.role(Noise) is not None and node.inputs[0] in sums:
            sums[node.name] = sums[node.inputs[0]]
        if node.layer.role(Sum) is None:
            continue
        for slot, x in enumerate(node.inputs):
            operand = node.name, slot
            if operand in gated:
                operands[operand] = gated[operand]
            elif x in sums:
                outer[sums[x][0]], operands[operand] = operand, sums[x][1]
        several = [operands.get((node.name, slot), ALWAYS) for slot in range(len(node.inputs))]
        if ALWAYS not in several:
            sums[node.name] = node.name, _least(way for one in several for way in one)
    return _Operands(operands, outer)


def _used(spec: Spec, operands: Mapping[Operand, Ways]) -> dict[str, Ways]:
    """For every node when its value is used. The inputs, and what nothing uses in the whole network, always stay.

    Args:
        operands: when those of sums are not zero, which may be.
    """
    used: dict[str, list[Ways]] = {name: [] for name in spec.by_name}
    when: dict[str, Ways] = {}
    for node in reversed(spec.nodes):
        always = node.name in spec.outputs or node.name in spec.input_layers or not spec.uses[node.name]
        when[node.name] = ALWAYS if always else _least(way for one in used[node.name] for way in one)
        for slot, x in enumerate(node.inputs):
            used[x].append(_both(when[node.name], operands.get((node.name, slot), ALWAYS)))
    return when


def _least(several: Iterable[frozenset[int]]) -> Ways:
    """The ways that contain no other one."""
    least: list[frozenset[int]] = []
    for way in sorted({*several}, key=len):
        if not any(other <= way for other in least):
            least.append(way)
    return frozenset(least)


def _both(one: Ways, other: Ways) -> Ways:
    """When both conditions hold."""
    return _least(way | more for way in one for more in other)


@dataclass(frozen=True, eq=False)
class Presence:
    """When nodes and parameters are there, by the numbers of conditions; what is not named always is.

    Attributes:
        conditions: the different ones, except that of what is always there.
        nodes: of the nodes; a sum is a node as long as both of its operands stay.
        first: the same in ``spec.first``, the network of the first way to call this one.
        parameters: of the parameters, by path: as long as one of the nodes that share it is there.
        operands: of operands of sums: as long as a branch stays that is the operand or part of it.
        sums: of the sums of branches, as long as the value is used of the outermost sum of which each is part.
        outer: for every sum of branches alone the operand of another sum that it is.
    """

    branches: tuple[Branch, ...]
    conditions: tuple[Ways, ...]
    nodes: Mapping[str, int]
    first: Mapping[str, int]
    parameters: Mapping[str, int]
    operands: Mapping[Operand, int]
    sums: Mapping[str, int]
    outer: Mapping[str, Operand]

    @staticmethod
    def of(spec: Spec, branches: tuple[Branch, ...]) -> Presence:
        """That of a network with these branches.

        >>> from taylorfx import layers as L
        >>> nodes = Node("x", L.Input((3,))), Node("up", L.Linear(3, 3), "x"), Node("sum", L.Add(), ("up", "x"))
        >>> presence = Presence.of(Spec(nodes), (Branch(7, "sum", 0),))
        >>> {name: [sorted(way) for way in presence.conditions[number]] for name, number in presence.nodes.items()}
        {'sum': [[7]], 'up': [[7]]}
        """
        numbers: dict[Ways, int] = {}

        def numbered(when: Mapping[_Key, Ways]) -> dict[_Key, int]:
            return {x: numbers.setdefault(one, len(numbers)) for x, one in when.items() if one != ALWAYS}

        def outermost(name: str) -> str:
            return outermost(outer[name][0]) if name in outer else name

        (operands, outer), first = _operands(spec, branches), spec.first
        values = _used(spec, operands)
        nodes = _of_nodes(values, operands)
        here = _operands(first, [branch for branch in branches if branch.node in first.by_name]).ways
        shared = {path: [way for node in owners for way in nodes[node.name]] for path, owners in spec.owners.items()}
        return Presence(
            branches,
            nodes=numbered(nodes),
            first=numbered(_of_nodes(_used(first, here), here)),
            parameters=numbered({path: _least(several) for path, several in shared.items()}),
            operands=numbered(operands),
            sums=numbered({branch.node: values[outermost(branch.node)] for branch in branches}),
            outer=outer,
            conditions=tuple(numbers),
        )

    def holds(self, gone: frozenset[int]) -> list[bool]:
        """For every condition whether it holds without these branches."""
        return [any(way.isdisjoint(gone) for way in one) for one in self.conditions]

    def needing(self, numbers: Mapping[str, int], unit: int) -> list[str]:
        """What leaves with a branch alone; ``numbers`` as for `there`."""
        return [name for name, number in numbers.items() if all(unit in way for way in self.conditions[number])]

    def there(self, numbers: Mapping[_Key, int], names: Iterable[_Key], holds: Sequence[bool]) -> list[_Key]:
        """Those of some names that are there where these conditions hold.

        Args:
            numbers: of conditions, by name: ``nodes``, ``first``, ``parameters``, ``operands`` or ``sums``.
        """
        return [name for name in names if name not in numbers or holds[numbers[name]]]

    def left(self, spec: Spec, numbers: Mapping[str, int], holds: Sequence[bool]) -> Spec:
        """What is left of a network: what consumed a sum of which one operand stays consumes that one.

        Args:
            spec: the network, or that of its first call.
            numbers: of conditions, by node: ``nodes`` or ``first``.
        """
        moved: dict[str, str] = {}
        nodes: list[Node] = []
        for node in spec.nodes:
            inputs = tuple([moved.get(x, x) for x in node.inputs])
            if self.there(numbers, [node.name], holds):
                nodes.append(node if inputs == node.inputs else replace(node, inputs=inputs))
                continue
            stay = self.there(self.operands, [(node.name, slot) for slot in range(len(inputs))], holds)
            if len(stay) == 1 < len(inputs):
                moved[node.name] = inputs[stay[0][1]]
        return replace(spec, nodes=tuple(nodes), outputs=tuple([moved.get(x, x) for x in spec.outputs]))

    def operands_of(self, branch: Branch, holds: Sequence[bool]) -> Iterator[Operand]:
        """The operands of what is `left` of the network that a branch is that stays, and those that it is part of."""
        operand: Operand | None = branch.operand
        while operand is not None:
            if self.there(self.nodes, operand[:1], holds):
                yield operand
            operand = self.outer.get(operand[0])


_Key = TypeVar("_Key", bound=Hashable)


def _of_nodes(values: Mapping[str, Ways], operands: Mapping[Operand, Ways]) -> dict[str, Ways]:
    """When there are nodes, of when their values are used, and when the operands of sums are there."""
    nodes = dict(values)
    for (name, _), one in operands.items():
        nodes[name] = _both(nodes[name], one)
    return nodes
