"""Expand: the factors of every class, with products of products written out.

A class that is no product is its own and only factor. A product has the factors of its two factors, each once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from taylorfx.coupling.join import Classes
from taylorfx.network.labels import EXAMPLE, Labeled, Labels

__all__ = ["Factors", "expand"]


@dataclass(frozen=True)
class Factors:
    """The factors of every class. A class leaves if any of its factors does.

    Attributes:
        classes: the classes.
        table: ``(factors, classes + 1)``, a class' factors in its column, then -1. The last column is that of what
            has no class, so that -1 finds it as an index.
        column: ``(labels + 1,)``, the column of every label; the last is that of label -1, for what has to stay.
    """

    classes: Classes
    table: Labels
    column: Labels

    @cached_property
    def single(self) -> NDArray[np.bool_]:
        """``(classes,)``: the class is no product, so that it is its own first factor."""
        return np.equal(self.table[0, :-1], np.arange(self.table.shape[1] - 1))

    def behind(self, labels: Labels) -> Labels:
        """All columns behind some labels: those of their classes, and of the factors of these. Others may be -1."""
        columns = self.column[labels]
        return np.append(columns, self.table[:, columns])

    def along(self, axis: Labeled) -> Labels:
        """All columns behind the labels of an axis."""
        labels = [f.labels for f in axis if f.labels is not None and f.labels is not EXAMPLE]
        return np.concatenate([np.zeros(0, np.int64), *map(self.behind, labels)])


def expand(classes: Classes) -> Factors:
    """Write out the factors of every class. Here ``2 = 0 * 1``, and ``4 = 2 * 3``:

    >>> from taylorfx.coupling.join import Products
    >>> products = Products(np.array([2, 4]), np.array([0, 2]), np.array([1, 3]))
    >>> expand(Classes(np.arange(5), products)).table
    array([[ 0,  1,  0,  3,  0, -1],
           [-1, -1,  1, -1,  1, -1],
           [-1, -1, -1, -1,  3, -1]])

    Products are expanded in rounds. In each are those whose two factors are done: first 2, then 4.
    """
    count, products = classes.count, classes.products
    slow, fast = np.full((2, count + 1), -1)  # by class
    slow[products.whole], fast[products.whole] = products.slow, products.fast
    table = np.append(np.arange(count), -1)[None]
    done = slow < 0
    waiting = np.flatnonzero(~done)
    while len(waiting):
        ready = done[slow[waiting]] & done[fast[waiting]]
        now, waiting = waiting[ready], waiting[~ready]
        rows = _compact(np.concatenate([table[:, slow[now]], table[:, fast[now]]]))
        table = np.concatenate([table, np.full((max(0, len(rows) - len(table)), count + 1), -1)])
        table[: len(rows), now] = rows
        done[now] = True
    return Factors(classes, table, np.append(classes.of, count))


def _compact(rows: Labels) -> Labels:
    """The different entries of every column in their order, then -1; without rows of nothing but -1.

    >>> _compact(np.array([[4, 4, -1], [-1, 4, 6], [5, 7, 6]]))
    array([[ 4,  4,  6],
           [ 5,  7, -1]])
    """
    rows = rows[(rows >= 0).any(1)]
    for k in range(1, len(rows)):
        rows[k, (rows[:k] == rows[k]).any(0)] = -1
    kept = rows >= 0
    if kept.all():
        return rows
    place = kept.cumsum(0) - 1  # every entry moves up to the row of its place in its column
    compact = np.full((int(place[-1:].max(initial=-1)) + 1, rows.shape[1]), -1)
    _, columns = np.nonzero(kept)
    compact[place[kept], columns] = rows[kept]
    return compact
