"""Couple: find what lives and dies together.

Every axis of every tensor carries labels (`taylorfx.labels`). The layers tie labels and split axes into products; one
connected-components call joins what is tied, and products are followed until nothing changes:

    x[i, j] = a[i] * b[j]  means that position (i, j) leaves if a[i] leaves or b[j] leaves.

What remains, and is not held by the network's inputs, outputs or a rigid layer, are the **units**. An index of an axis
leaves if any of its units does; usually it has one, and one per factor where an axis is a product (attention heads and
the dimensions within them).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from taylorfx.coupling.units import Coupling, Place
from taylorfx.coupling.weights import of_weights
from taylorfx.network.labels import EXAMPLE, Bound, Labeled, Labels, Site, Ties, length
from taylorfx.network.spec import Spec

__all__ = ["Solver"]


class Solver:
    """Ties and products in, units out."""

    def __init__(self, spec: Spec, bounds: dict[str, Bound], ties: Ties) -> None:
        self.spec, self.bounds, self.ties = spec, bounds, ties
        self.table: dict[tuple[int, ...], int] = {}
        self.columns: list[Labeled] = []
        self._components()
        self._expand()

    def _components(self) -> None:
        """Join what is tied, until products that meet agree factor by factor."""
        ties = self.ties
        self.classes = _connect(ties.count, ties.equal)
        x, a, b = (np.concatenate([np.zeros(0, np.int64), *column]) for column in _columns(ties.products, 3))
        batch = np.repeat(np.arange(len(ties.products)), [len(x) for x, _, _ in ties.products])
        while True:
            # A class with two products: their factors are tied. A class that is its own factor: all one.
            cx, ca, cb = self.classes[x], self.classes[a], self.classes[b]
            order = np.argsort(cx, kind="stable")
            one, other = order[1:], order[:-1]
            same = (cx[one] == cx[other]) & ((ca[one] != ca[other]) | (cb[one] != cb[other]))
            loop = (ca == cx) | (cb == cx)
            new = [(cx[loop], ca[loop]), (cx[loop], cb[loop]), *_matched(ca, cb, batch, one[same], other[same])]
            new = [(p[p != q], q[p != q]) for p, q in new]
            if not any(len(p) for p, _ in new):
                # Factors may still lead back to their product over several steps: tie such a cycle, too.
                new = self._cycles(cx, ca, cb)
                if not new:
                    break
            self.classes = _connect(int(self.classes.max(initial=-1)) + 1, new)[self.classes]
        proper = cx != ca
        self.products = cx[proper], ca[proper], cb[proper]

    def _cycles(self, x: Labels, a: Labels, b: Labels) -> list[tuple[Labels, Labels]]:
        if not len(x):
            return []
        count = int(max(x.max(), a.max(), b.max())) + 1
        proper = (x != a) | (x != b)
        rows, cols = np.concatenate([x[proper], x[proper]]), np.concatenate([a[proper], b[proper]])
        while len(rows):  # what leads to no product lies on no cycle
            product = np.zeros(count, bool)
            product[rows] = True
            inside = product[cols]
            if inside.all():
                break
            rows, cols = rows[inside], cols[inside]
        else:
            return []
        graph = coo_matrix((np.ones(len(rows), np.int8), (rows, cols)), (count, count))
        strong = connected_components(graph, directed=True, connection="strong")[1]
        inside = strong[rows] == strong[cols]
        differ = inside & (rows != cols)
        return [(rows[differ], cols[differ])] if differ.any() else []

    def _expand(self) -> None:
        """The units of every class: itself, or those of its factors."""
        count = int(self.classes.max(initial=-1)) + 1
        x, a, b = self.products
        one, other = np.full((2, count + 1), -1)  # the two factors of every class; the last is that of label -1
        one[x], other[x] = a, b
        self.factors = np.append(np.arange(count), -1)[None]
        done = one < 0
        waiting = np.flatnonzero(~done)
        while len(waiting):
            ready = done[one[waiting]] & done[other[waiting]]
            now, waiting = waiting[ready], waiting[~ready]
            rows = _compact(np.concatenate([self.factors[:, one[now]], self.factors[:, other[now]]]))
            more = np.full((max(0, len(rows) - len(self.factors)), count + 1), -1)
            self.factors = np.concatenate([self.factors, more])
            self.factors[: len(rows), now] = rows
            done[now] = True
        self.label_class = np.append(self.classes, count)

    def coupling(self) -> Coupling:
        ties, bounds = self.ties, self.bounds.values()
        shown = self._numbers(itertools.chain(*ties.parameters.values(), *(b.letters.values() for b in bounds)))
        axes = len(self.columns)
        sites = self._numbers(site.labels for bound in bounds for site in (*bound.reads, *bound.writes))
        self._spread()
        count = self.factors.shape[1]
        origin, scopes = self._origins(count)
        held, reasons = self._frozen(count, origin, scopes, axes)
        plain = self.factors[0, :-1] == np.arange(count - 1)
        units = np.flatnonzero(plain & ~held[:-1] & (origin[:-1] >= 0))
        units = units[np.argsort(origin[units], kind="stable")]
        number = np.full(count, -1)
        number[units] = np.arange(len(units))
        inexact = np.zeros(count, bool)
        for labels in ties.inexact:
            inexact[self._classes_of(labels)] = True
        starts = np.array([start for start, _ in ties.origins] or [0])
        family = np.searchsorted(starts, origin[units], "right") - 1
        present, first = np.unique(family, return_index=True)
        names: dict[str, int] = {}
        renumber = np.zeros(len(starts), np.int64)
        for f in present[np.argsort(first)].tolist():
            renumber[f] = names.setdefault(scopes[f], len(names))
        units_of = self._units(number)
        weights = of_weights(self.spec, self.bounds, lambda axis: self._units_along(axis, number))
        exact = ~inexact[units]
        exact[list(set[int]().union(*weights.values()))] = False
        found = [
            units_of[k] if k in units_of else np.broadcast_to(np.int64(-1), (1, length(axis)))
            for k, axis in enumerate(self.columns[:axes])
        ]
        # Other labels may be the same units; an axis without any is told by its length.
        keys = [(len(axis), axis.tobytes() if k in units_of else axis.size) for k, axis in enumerate(found)]
        different = dict(zip(keys, found, strict=True))
        place = {key: k for k, key in enumerate(different)}
        axis_of = {axis: place[keys[k]] for axis, k in shown.items()}
        return Coupling(
            spec=self.spec,
            scopes=tuple(names),
            scope=renumber[family],
            index=origin[units] - starts[family],
            exact=exact,
            frozen=reasons,
            axes=tuple(different.values()),
            parameters={path: tuple([axis_of[id(x)] for x in found]) for path, found in ties.parameters.items()},
            letters={
                name: {x: axis_of[id(axis)] for x, axis in bound.letters.items()} for name, bound in self.bounds.items()
            },
            bounds=self.bounds,
            reads=self._places((site for x in bounds for site in x.reads if id(site) not in weights), sites, units_of),
            writes=self._places((site for bound in bounds for site in bound.writes), sites, units_of),
            mixing=tuple(ties.mixing),
        )

    def _units_along(self, axis: Labeled, number: Labels) -> set[int]:
        """The units of an axis."""
        return {u for u in number[self._classes_along(axis)].tolist() if u >= 0}

    def _classes_along(self, axis: Labeled) -> Labels:
        """All classes that stand behind the labels of an axis."""
        labels = [f.labels for f in axis if f.labels is not None and f.labels is not EXAMPLE]
        return np.concatenate([np.zeros(0, np.int64), *map(self._classes_of, labels)])

    def _numbers(self, axes: Iterable[Labeled]) -> dict[int, int]:
        """The number of each axis among the different ones, by its identity."""
        numbers: dict[int, int] = {}
        for identity, axis in {id(axis): axis for axis in axes}.items():
            key = tuple([value for f in axis for value in (f.size, id(f.labels))])
            numbers[identity] = number = self.table.setdefault(key, len(self.columns))
            if number == len(self.columns):
                self.ties.room.take(sum(length(axis) for f in axis if f.labels is not None))
                self.columns.append(axis)
        return numbers

    def _classes_of(self, labels: Labels) -> Labels:
        """All classes that stand behind some labels: their own, their factors, and theirs."""
        own = self.label_class[labels]
        return np.append(own, self.factors[:, own])

    def _origins(self, count: int) -> tuple[Labels, list[str]]:
        """The first label of every class, and the scope names by the order of origins."""
        origin = np.full(count, -1)
        origin[self.classes[::-1]] = np.arange(len(self.classes))[::-1]
        return origin, [scope for _, scope in self.ties.origins]

    def _frozen(
        self, count: int, origin: Labels, scopes: list[str], axes: int
    ) -> tuple[NDArray[np.bool_], dict[str, str]]:
        held = np.zeros(count + 1, bool)
        held[-1] = True
        reasons: dict[str, str] = {}
        starts = np.array([start for start, _ in self.ties.origins] or [0])

        def hold(classes: Labels, reason: str) -> None:
            classes = classes[(classes >= 0) & (classes < count - 1)]
            first = origin[classes]
            for family in np.unique(np.searchsorted(starts, first[first >= 0], "right") - 1):
                reasons.setdefault(scopes[family], reason)
            held[classes] = True

        for labels, reason in self.ties.frozen:
            hold(self._classes_of(labels), reason)
        read = np.zeros(count + 1, bool)
        for site in (site for bound in self.bounds.values() for site in bound.reads):
            read[self._classes_along(site.labels)] = True
        hold(np.flatnonzero(~(read | held)[:-1]), "no layer consumes it")
        lowest, highest = (end.reduceat(self.spread, self.starts, 1) for end in (np.minimum, np.maximum))
        alone = (lowest == highest) & (lowest >= 0) & (self.owners < axes)
        for one in np.unique(lowest[alone]):
            if not held[one]:
                hold(one[None], "the whole axis would leave at once")
        return held[:-1], reasons

    def _spread(self) -> None:
        """Lay every factor out along its axis, all end to end, and look up the classes of every index."""
        rows: list[Labels] = [np.zeros(0, np.int64)]
        owners: list[int] = []
        for column, axis in enumerate(self.columns):
            size = inner = length(axis)
            for factor in axis if size else ():
                inner //= factor.size
                if factor.labels is not None and factor.labels is not EXAMPLE:
                    labels = factor.labels if inner == 1 else np.repeat(factor.labels, inner)
                    rows.append(labels if len(labels) == size else np.tile(labels, size // len(labels)))
                    owners.append(column)
        self.spread = self.factors[:, self.label_class[np.concatenate(rows)]]  # (factors, all positions)
        self.starts = np.cumsum([0, *map(len, rows[1:])], dtype=np.int64)[:-1]
        self.owners = np.array(owners, np.int64)

    def _units(self, number: Labels) -> dict[int, Labels]:
        """The units of every axis that has some, one row per factor, those without any left out."""
        units = number[self.spread]
        used = np.logical_or.reduceat(units >= 0, self.starts, 1)  # by row
        row, factor = np.nonzero(used.T)
        start, owner = self.starts[row].tolist(), self.owners[row].tolist()
        found: dict[int, list[Labels]] = {}
        for k, f, low in zip(owner, factor.tolist(), start, strict=True):
            found.setdefault(k, []).append(units[f : f + 1, low : low + length(self.columns[k])])
        return {k: rows[0] if len(rows) == 1 else np.concatenate(rows) for k, rows in found.items()}

    def _places(
        self, sites: Iterable[Site], numbers: Mapping[int, int], units: Mapping[int, Labels]
    ) -> tuple[Place, ...]:
        places: list[Place] = []
        for site in sites:
            found = units.get(numbers[id(site.labels)])
            if found is not None:
                bound = self.bounds[site.node]
                shape = bound.inputs[site.slot] if site.slot >= 0 else bound.shape
                places.append(Place(site.node, site.slot, site.axis, shape, found, site.example))
        return tuple(places)


def _compact(rows: Labels) -> Labels:
    """The different entries of every column, in their order, and then -1."""
    rows = rows[(rows >= 0).any(1)]
    for k in range(1, len(rows)):
        rows[k, (rows[:k] == rows[k]).any(0)] = -1
    held = rows >= 0
    if held.all():
        return rows
    place = held.cumsum(0) - 1
    compact = np.full((int(place[-1:].max(initial=-1)) + 1, rows.shape[1]), -1)
    _, columns = np.nonzero(held)
    compact[place[held], columns] = rows[held]
    return compact


def _matched(a: Labels, b: Labels, batch: Labels, one: Labels, other: Labels) -> list[tuple[Labels, Labels]]:
    """Ties between the factors of products that are the same: in their order or crosswise, what joins fewer of them.

    A channel shuffle lays out groups and channels in the other order. All products of a layer go the same way.
    """
    ties: list[tuple[Labels, Labels]] = []
    _, group = np.unique(batch[one] * (batch.max(initial=0) + 1) + batch[other], return_inverse=True)
    for g in range(group.max(initial=-1) + 1):
        i, j = one[group == g], other[group == g]
        straight, crosswise = [(a[i], a[j]), (b[i], b[j])], [(a[i], b[j]), (b[i], a[j])]
        ties += straight if _parts(straight) >= _parts(crosswise) else crosswise
    return ties


def _parts(pairs: Sequence[tuple[Labels, Labels]]) -> int:
    """Into how many parts the labels of some ties fall."""
    labels = np.unique(np.concatenate([column for pair in pairs for column in pair]))
    local = [(np.searchsorted(labels, p), np.searchsorted(labels, q)) for p, q in pairs]
    return int(_connect(len(labels), local).max()) + 1


def _connect(count: int, pairs: Sequence[tuple[Labels, Labels]]) -> Labels:
    """The connected component of every label."""
    rows, cols = (np.concatenate([np.zeros(0, np.int64), *column]) for column in _columns(pairs, 2))
    graph = coo_matrix((np.ones(len(rows), np.int8), (rows, cols)), (count, count))
    classes: Labels = connected_components(graph, directed=False)[1].astype(np.int64)
    return classes


def _columns(rows: Sequence[tuple[Labels, ...]], width: int) -> list[list[Labels]]:
    return [[row[k] for row in rows] for k in range(width)]
