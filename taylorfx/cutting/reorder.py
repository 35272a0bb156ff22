"""Balance: every group drops its own least, and the same number of them everywhere.

Groups (of a convolution, of a `GroupNorm`, the heads of attention) must stay equally large, so that what leaves is a
position: the same one in each group. But a network does not change when the channels of one group trade places, and
those of another group do so in another way. `balance` puts every group's channels in the order of their scores;
position by position the plans that follow then take from each group what *it* needs least, in dense tensors.

The order is found from the units alone. Positions are balanced where, in every tensor that a layer takes or gives, they
come with the groups they belong to, and no layer treats the groups of a position alike: a `GroupNorm` says so by its
inexact letter, a sum over the groups by giving out positions without groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taylorfx.coupling.couple import couple
from taylorfx.coupling.units import Coupling, Place
from taylorfx.cutting.cut import fits
from taylorfx.functions import name_of
from taylorfx.layers import axes as language
from taylorfx.network.labels import STATE, Labels
from taylorfx.network.spec import Node, Spec
from taylorfx.scoring.batches import Batches, each_batch
from taylorfx.scoring.criteria import fisher
from taylorfx.scoring.criterion import Score, as_criterion
from taylorfx.scoring.measure import measure
from taylorfx.scoring.measurement import Measurement
from taylorfx.tree import Params, map_paths

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from taylorfx.scoring.measurement import MeasurementOptions

__all__ = ["Order", "balance", "reorder"]

Group = frozenset[int]
"""The units that every position of a group comes with."""


@dataclass(frozen=True)
class _Family:
    """Positions, the units of one scope, and the groups in which they may be put in different orders."""

    scope: str
    positions: tuple[int, ...]
    groups: tuple[Group, ...]

    @cached_property
    def marks(self) -> Group:
        """All units by which groups are told apart."""
        return Group().union(*self.groups)

    @property
    def alone(self) -> _Family:
        """The positions, wherever they are the same for all groups."""
        return replace(self, groups=(Group(),))

    def table(self, axis: Labels) -> Labels | None:
        """``(groups, positions, times)``: where along an axis they are; none if they do not lie there as a product."""
        at: dict[tuple[Group, int], list[int]] = {}
        own = {*self.positions}
        for index in np.flatnonzero(np.isin(axis, self.positions).any(0)).tolist():
            units = Group(axis[:, index].tolist())
            for position in units & own:
                at.setdefault((units & self.marks, position), []).append(index)
        rows = [[at.pop((group, position), []) for position in self.positions] for group in self.groups]
        times = {len(row) for group in rows for row in group}
        if at or len(times) > 1 or times == {0}:
            return None
        return np.array(rows, np.int64)

    def meets(self, axis: Labels, units: Iterable[int]) -> bool:
        """Some of these units are on the axis."""
        return bool(np.isin(axis, [*units]).any())


@dataclass(frozen=True, eq=False, repr=False)
class Order:
    """Which position each group's channels go to; a value, nothing has moved yet.

    Attributes:
        coupling: the units of the network, before and after: `reorder` keeps all of them.
        ranks: by the scope of the positions, ``(groups, positions)``: the position that each place is filled from.
    """

    coupling: Coupling
    ranks: Mapping[str, Labels]

    @cached_property
    def indices(self) -> Mapping[str, Sequence[tuple[int, Tensor]]]:
        """For every parameter that changes: axes, and the indices to take along them, ready to broadcast."""
        indices: dict[str, list[tuple[int, Tensor]]] = {}
        for family in _ordered(_families(self.coupling)):
            if family.scope in self.ranks:
                for path, numbers in self.coupling.parameters.items():
                    axes = [self.coupling.axes[number] for number in numbers]
                    for axis, units in enumerate(axes):
                        if family.meets(units, family.positions):
                            index = _index(family, self.ranks[family.scope], axes, axis)
                            indices.setdefault(path, []).append((axis, torch.from_numpy(index)))
        return indices

    def __str__(self) -> str:
        lines = [f"{name}: {table.shape[1]} positions in {len(table)} groups" for name, table in self.ranks.items()]
        return "\n".join(lines) or "nothing to balance"


def balance(
    params: Params,
    spec: Spec,
    batches: Batches,
    *,
    criterion: Score = fisher,
    measurement: Measurement | None = None,
    **options: Unpack[MeasurementOptions],
) -> Order:
    """Find the order in which every group has its channels by falling scores.

    ::

        params = tfx.reorder(params, tfx.balance(params, spec, batches))  # the same network
        small, small_spec = tfx.prune(params, spec, batches, budget=tfx.Flops(0.5))

    Args:
        criterion: a function of ``(statistics, coupling)``, here of each channel of each group. What it needs is
            measured.
        measurement, options: how, as in `measure`.

    Channels are scored where they are read, as units are. Where groups and positions are separate axes at a read (the
    keys and queries of attention), they are scored where they are made. Scopes whose positions cannot be put into
    different orders in different groups are left as they are: ``print(order)`` shows the others.

    Raises:
        ValueError: for a criterion of anything else than statistics, and as `taylorfx.measure` does.
    """
    scoring = as_criterion(criterion)
    if scoring.of != "statistics":
        raise ValueError(
            f"Channels are balanced by a criterion of statistics; received {name_of(criterion)}, one of {scoring.of}."
        )
    how = scoring.measured(Measurement.of(measurement, options))
    coupling = couple(params, spec)
    families = _families(coupling)
    batches = [*each_batch(batches)]
    ranks: dict[str, Labels] = {}
    for at_writes in (False, True):
        chosen = [f for f in families if f.scope not in ranks and _fine(coupling, [f], at_writes=at_writes)]
        channels = _fine(coupling, chosen, at_writes=at_writes)
        if channels is not None:
            stats = measure(params, spec, batches, channels, measurement=replace(how, at_writes=at_writes))
            scores = criterion(stats, channels)
            shapes = [(len(f.groups), len(f.positions)) for f in chosen]
            parts = torch.split(scores, [groups * positions for groups, positions in shapes])
            for family, part, shape in zip(chosen, parts, shapes, strict=True):
                order = part.reshape(shape).argsort(dim=1, descending=True, stable=True)
                ranks[family.scope] = order.cpu().numpy()
    return Order(coupling, ranks)


def reorder(tree: Params, order: Order) -> Params:
    """Put the channels of a tree in order: of the parameters, which then make up the same network, or of momentum.

    Raises:
        PlanError: listing every leaf that is not one of the network's parameters.
    """
    fits(tree, order.coupling.spec.shapes, "An order moves the channels of")

    def move(path: str, leaf: Tensor) -> Tensor:
        for axis, index in order.indices.get(path, ()):
            leaf = torch.take_along_dim(leaf, index.to(leaf.device), axis)
        return leaf

    return map_paths(move, tree)


def _index(family: _Family, ranks: Labels, axes: Sequence[Labels], axis: int) -> Labels:
    """What to take along an axis of a parameter: ``(1, ..., size, ..., 1)``, or so for every index of other axes."""
    table = family.table(axes[axis])
    if table is not None:  # the groups are on the axis
        index = np.arange(axes[axis].shape[1])
        index[table] = np.take_along_axis(table, ranks[:, :, None], 1)
        return index.reshape([-1 if k == axis else 1 for k in range(len(axes))])
    alone = family.alone.table(axes[axis])
    assert alone is not None
    own = np.arange(axes[axis].shape[1])[None].repeat(len(family.groups), 0)
    own[:, alone[0]] = alone[0][ranks]
    marks = [units if k != axis and family.meets(units, family.marks) else None for k, units in enumerate(axes)]
    shape = [1 if units is None else units.shape[1] for units in marks]
    index = np.empty((*shape, own.shape[1]), np.int64)
    numbers = {group: number for number, group in enumerate(family.groups)}
    for place in np.ndindex(*shape):
        present = Group(
            u for k, units in zip(place, marks, strict=True) if units is not None for u in units[:, k].tolist()
        )
        index[place] = own[numbers[present & family.marks]]
    return np.moveaxis(index.squeeze(axis), -1, axis)


def _families(coupling: Coupling) -> list[_Family]:
    """The scopes whose positions can be put into another order in every group."""
    homes: dict[int, set[int]] = {}  # by scope, the axes that its units are on
    for number, axis in enumerate(coupling.axes):
        for scope in np.unique(coupling.scope[axis[axis >= 0]]).tolist():
            homes.setdefault(scope, set()).add(number)
    families: list[_Family] = []
    for scope, home in sorted(homes.items()):
        family = _grouped(coupling, scope, [coupling.axes[number] for number in sorted(home)])
        met = [node for node in coupling.spec if not home.isdisjoint(coupling.letters[node.name].values())]
        if family and all(_follows(coupling, node, family) for node in met):
            try:
                _ordered([*families, family])
            except CycleError:  # positions and groups of each other: the first to come are the positions
                continue
            families.append(family)
    return families


def _ordered(families: Sequence[_Family]) -> list[_Family]:
    """Those first whose groups are told apart by what others move."""
    before = {f: [g for g in families if g.marks & {*f.positions}] for f in families}
    return [*TopologicalSorter(before).static_order()]


def _grouped(coupling: Coupling, scope: int, axes: Sequence[Labels]) -> _Family | None:
    """A scope's units as positions in the coarsest groups in which they lie, wherever they do; none if nowhere."""
    positions = np.flatnonzero(coupling.scope == scope)
    marks: Group | None = None
    groups: set[Group] = set()
    for axis in axes:
        held = np.isin(axis, positions)
        columns = axis[:, held.any(0)]
        if beside := Group(columns[~held[:, held.any(0)]].tolist()) - {-1}:
            marks = beside if marks is None else marks & beside
            groups = {Group(column) & marks for column in np.unique(columns, axis=1).T.tolist()}
    if len(groups) < 2:
        return None
    return _Family(coupling.scopes[scope], (*positions.tolist(),), (*sorted(groups, key=sorted),))


def _follows(coupling: Coupling, node: Node, family: _Family) -> bool:
    """The layer gives the same out, in the new order, when every group's positions are put in an order of their own."""
    letters = {x: coupling.axes[number] for x, number in coupling.letters[node.name].items()}
    telling = {x for x, axis in letters.items() if family.meets(axis, family.marks)}
    for tensor in _tensors(coupling, node):
        for letter in tensor & letters.keys():
            axis = letters[letter]
            if not family.meets(axis, family.positions):
                continue
            apart = letter not in telling  # the groups are on other axes, if anywhere
            if apart and (not telling <= tensor or telling & {*node.layer.inexact}):
                return False
            if (family.alone if apart else family).table(axis) is None:
                return False
    return True


def _tensors(coupling: Coupling, node: Node) -> list[set[str]]:
    """The letters of every tensor that a node takes, has or gives."""
    signature = coupling.signature(node)
    if signature is None:
        return []
    return [{*language.letters(p)} for p in (*signature.inputs, *signature.parameters.values(), signature.output)]


def _fine(coupling: Coupling, families: Sequence[_Family], *, at_writes: bool = False) -> Coupling | None:
    """The coupling whose units are the channels of each group, read or made; none where they are not told apart."""
    first = np.cumsum([0, *(len(f.groups) * len(f.positions) for f in families)])
    places: list[Place] = []
    for place in coupling.writes if at_writes else coupling.reads:
        met = [k for k, family in enumerate(families) if family.meets(place.units, family.positions)]
        rows = [np.full(place.units.shape[1], -1) for _ in met]
        for k, row in zip(met, rows, strict=True):
            table = families[k].table(_units(coupling, place))
            if table is None:
                return None
            groups, positions, _ = table.shape
            row[table] = (first[k] + np.arange(groups * positions)).reshape(groups, positions, 1)
        if rows:
            places.append(replace(place, units=np.stack(rows)))
    if not places:
        return None
    sizes = np.diff(first)
    coupling = replace(coupling, writes=tuple(places)) if at_writes else replace(coupling, reads=tuple(places))
    return replace(
        coupling,
        scopes=tuple(f.scope for f in families),
        scope=np.repeat(np.arange(len(families)), sizes),
        index=np.concatenate([np.arange(size) for size in sizes]),
        exact=np.ones(int(first[-1]), bool),
    )


def _units(coupling: Coupling, place: Place) -> NDArray[np.int64]:
    """All units of the axis of a place, also those that are not mixed or made there."""
    signature = coupling.signature(coupling.spec[place.node])
    assert signature is not None, "what is read or made there is read off it"
    if place.slot == STATE:
        axis: language.Axis = tuple((letter,) for letter in coupling.spec[place.node].layer.recurrent)
    else:
        axis = (signature.output if place.slot < 0 else signature.inputs[place.slot])[place.axis]
    pieces: list[Labels] = []
    for product in axis:
        sizes = [coupling.bounds[place.node].sizes[x] for x in product]
        rows = [np.full((1, int(np.prod(sizes))), -1)]
        for k, letter in enumerate(product):
            number = coupling.letters[place.node].get(letter)
            if number is not None:
                inner, outer = int(np.prod(sizes[k + 1 :])), int(np.prod(sizes[:k]))
                rows.append(np.tile(np.repeat(coupling.axes[number], inner, 1), (1, outer)))
        pieces.append(np.concatenate(rows))
    depth = max(map(len, pieces))
    return np.concatenate([np.pad(p, ((0, depth - len(p)), (0, 0)), constant_values=-1) for p in pieces], 1)
