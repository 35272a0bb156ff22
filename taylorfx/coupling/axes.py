"""The different axes of a network, laid end to end, so that one lookup tells the classes of every position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np

from taylorfx.coupling.expand import Factors
from taylorfx.coupling.labeling import Labeling
from taylorfx.network.labels import EXAMPLE, Labeled, Labels, length

__all__ = ["Axes", "lay_out"]


@dataclass(frozen=True)
class Axes:
    """The different axes of a network.

    An axis of several labeled factors has a *run* of classes for each. All runs are laid end to end; here axis 0 has
    two positions, axis 1 has four, which are the product of two factors:

        position    0  1 | 0  1  2  3 | 0  1  2  3
        class       7  8 | 4  4  5  5 | 6  9  6  9
        starts      0      2            6               where each run begins
        owners      0      1            1               the axis of each run

    Attributes:
        axes: the different axes. The axes of parameters and of the letters of signatures come first.
        shown: how many these are; the others are only read or written.
        numbers: the number of an axis, by its identity.
        classes: ``(factors, all positions)``, the classes of every position and their factors, then -1.
        starts, owners: ``(runs,)``.
    """

    axes: tuple[Labeled, ...]
    shown: int
    numbers: Mapping[int, int]
    classes: Labels
    starts: Labels
    owners: Labels

    def alone(self) -> Labels:
        """The classes that have a whole run of one of the shown axes to themselves."""
        lowest, highest = (end.reduceat(self.classes, self.starts, 1) for end in (np.minimum, np.maximum))
        return np.unique(lowest[(lowest == highest) & (lowest >= 0) & (self.owners < self.shown)])

    def rows(self, number: Labels) -> dict[int, Labels]:
        """The units of every axis that has any, ``(factors, size)``, without rows of nothing but -1.

        Args:
            number: ``(classes + 1,)``, the unit of every class; -1 for none, and at the end.
        """
        units = number[self.classes]
        any_unit = np.logical_or.reduceat(units >= 0, self.starts, 1)  # (factors, runs)
        run, factor = np.nonzero(any_unit.T)
        starts, owners = self.starts[run].tolist(), self.owners[run].tolist()
        rows: dict[int, list[Labels]] = {}
        for k, row, start in zip(owners, factor.tolist(), starts, strict=True):
            rows.setdefault(k, []).append(units[row : row + 1, start : start + length(self.axes[k])])
        return {k: several[0] if len(several) == 1 else np.concatenate(several) for k, several in rows.items()}


def lay_out(labeling: Labeling, factors: Factors) -> Axes:
    """Lay the different axes of a network end to end.

    Raises:
        ShapeError: if there is no room for so many positions.
    """
    ties, bounds = labeling.ties, labeling.bounds.values()
    different = _Different()
    numbers = different.add(chain(*ties.parameters.values(), *(bound.letters.values() for bound in bounds)), labeling)
    shown = len(different.axes)
    numbers |= different.add((site.labels for site in chain(labeling.reads, labeling.writes)), labeling)
    runs: list[Labels] = [np.zeros(0, np.int64)]
    owners: list[int] = []
    for k, axis in enumerate(different.axes):
        for run in _runs(axis):
            runs.append(run)
            owners.append(k)
    starts = np.cumsum([0, *map(len, runs[1:])], dtype=np.int64)[:-1]
    classes = factors.table[:, factors.column[np.concatenate(runs)]]
    return Axes(tuple(different.axes), shown, numbers, classes, starts, np.array(owners, np.int64))


class _Different:
    """Axes with the same factors are the same one, in however many tuples these lie."""

    def __init__(self) -> None:
        self.axes: list[Labeled] = []
        self.places: dict[tuple[int, ...], int] = {}

    def add(self, axes: Iterable[Labeled], labeling: Labeling) -> dict[int, int]:
        """The number of each axis among the different ones, by its identity."""
        numbers: dict[int, int] = {}
        for identity, axis in {id(axis): axis for axis in axes}.items():
            key = tuple([value for f in axis for value in (f.size, id(f.labels))])
            numbers[identity] = number = self.places.setdefault(key, len(self.axes))
            if number == len(self.axes):
                labeling.ties.room.take(sum(length(axis) for f in axis if f.labels is not None))
                self.axes.append(axis)
        return numbers


def _runs(axis: Labeled) -> Iterator[Labels]:
    """The labels of each labeled factor, at every position of an axis. The last factor varies fastest:

    >>> from taylorfx.network.labels import Factor
    >>> for run in _runs((Factor(2, np.array([4, 5])), Factor(3, np.array([6, 7, 8])))):
    ...     print(run)
    [4 4 4 5 5 5]
    [6 7 8 6 7 8]
    """
    size = inner = length(axis)
    for factor in axis if size else ():
        inner //= factor.size
        if factor.labels is not None and factor.labels is not EXAMPLE:
            labels = factor.labels if inner == 1 else np.repeat(factor.labels, inner)
            yield labels if len(labels) == size else np.tile(labels, size // len(labels))
