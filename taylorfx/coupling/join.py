"""Join: labels that leave together become one class.

Layers tie labels in pairs, and lay labels out as products of others. Here is an axis of four channels that one layer
splits into two groups of two, with labels ``4 5`` for the groups and ``6 7`` for the channels within a group:

    channels   0  1  2  3
    groups     4  4  5  5       channel 2 leaves if group 5 leaves or channel 6 of every group leaves
    within     6  7  6  7

A residual addition ties the labels of its two branches, position by position. Connected components of all ties are the
classes. Two products of one class have the same factors, so these are tied, too, which may join further products:
joining is repeated until nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from taylorfx.network.labels import Labels, Ties

__all__ = ["Classes", "Products", "join"]

Pairs = tuple[Labels, Labels]
"""Two vectors of one length: the first entries are tied, the second ones are, and so on."""


class Products(NamedTuple):
    """Equations between classes or labels: ``whole[k]`` leaves if ``slow[k]`` leaves or ``fast[k]`` leaves."""

    whole: Labels
    slow: Labels
    fast: Labels

    def at(self, chosen: Labels) -> Products:
        """Some of the equations, by a mask or by their numbers."""
        return Products(*(column[chosen] for column in self))


@dataclass(frozen=True)
class Classes:
    """Labels that leave together.

    Attributes:
        of: ``(labels,)``, the class of every label. Every class has a label.
        products: the classes that are products of others. No class leads back to itself.
    """

    of: Labels
    products: Products

    @cached_property
    def count(self) -> int:
        """The number of classes."""
        return int(self.of.max(initial=-1)) + 1

    @cached_property
    def first(self) -> Labels:
        """``(classes,)``: the first label of every class.

        >>> none = np.zeros(0, np.int64)
        >>> Classes(np.array([0, 1, 0, 1, 2]), Products(none, none, none)).first
        array([0, 1, 4])
        """
        first = np.zeros(self.count, np.int64)
        first[self.of[::-1]] = np.arange(len(self.of))[::-1]  # of several that are written, the last one stays
        return first


def join(ties: Ties) -> Classes:
    """Join what is tied until products of one class agree factor by factor.

    Here labels 0 and 3 are tied, ``0 = 1 * 2`` and ``3 = 4 * 5``; so 1 is tied to 4, and 2 to 5:

    >>> def labels(*numbers):
    ...     return np.array(numbers)
    >>> classes = join(Ties(count=6, equal=[(labels(0), labels(3))],
    ...                     products=[(labels(0, 3), labels(1, 4), labels(2, 5))]))
    >>> classes.of
    array([0, 1, 2, 0, 1, 2])
    """
    of = _connect(ties.count, ties.equal)
    equations = Products(*_end_to_end(ties.products, 3))
    layer = np.repeat(np.arange(len(ties.products)), [len(whole) for whole, _, _ in ties.products])
    while True:
        products = Products(*(of[labels] for labels in equations))
        pairs = _implied(products, layer) or _cycles(products)
        if not pairs:
            # A class that is its own factor is no product: all three are one.
            return Classes(of, products.at(products.whole != products.slow))
        of = _connect(int(of.max(initial=-1)) + 1, pairs)[of]


def _implied(products: Products, layer: Labels) -> list[Pairs]:
    """The ties that products imply.

        x = a * b  and  x = c * d      tie the factors: a to c and b to d, or crosswise
        x = x * b  or   x = a * x      tie all three

    Products of one class are neighbors once they are sorted by it:

        whole     7 5 7 6     order 1 3 0 2
        sorted    5 6 7 7     neighbors of one class: products 2 and 0

    Args:
        layer: ``(products,)``, the number of the operation that laid each product out.
    """
    whole, slow, fast = products
    order = np.argsort(whole, kind="stable")
    one, other = order[1:], order[:-1]
    same = (whole[one] == whole[other]) & ((slow[one] != slow[other]) | (fast[one] != fast[other]))
    loop = (slow == whole) | (fast == whole)
    pairs = [(whole[loop], slow[loop]), (whole[loop], fast[loop])]
    pairs += _matched(products, layer, one[same], other[same])
    differing = [(p[p != q], q[p != q]) for p, q in pairs]
    return [pair for pair in differing if len(pair[0])]


def _matched(products: Products, layer: Labels, one: Labels, other: Labels) -> list[Pairs]:
    """Ties between the factors of products of one class: in their order, or crosswise where that joins fewer classes.

    A channel shuffle lays out 4 channels as 2 groups of 2, and again with groups and channels exchanged. All products
    that two layers lay out are matched alike, since a single position does not show which of the two it is:

        first    0 = g0 * c0    1 = g0 * c1    2 = g1 * c0    3 = g1 * c1
        second   0 = c0 * g0    1 = c1 * g0    2 = c0 * g1    3 = c1 * g1

    Args:
        one, other: the numbers of products that are pairwise of one class.
    """
    _, slow, fast = products
    ties: list[Pairs] = []
    _, group = np.unique(layer[one] * (layer.max(initial=0) + 1) + layer[other], return_inverse=True)
    for g in range(group.max(initial=-1) + 1):
        i, j = one[group == g], other[group == g]
        straight, crosswise = [(slow[i], slow[j]), (fast[i], fast[j])], [(slow[i], fast[j]), (fast[i], slow[j])]
        ties += straight if _parts(straight) >= _parts(crosswise) else crosswise
    return ties


def _cycles(products: Products) -> list[Pairs]:
    """Ties for factors that lead back to their own product over several steps: these are all one class.

    Of ``0 = 1 * 2`` and ``1 = 0 * 3`` the first two classes are tied:

    >>> columns = [[0, 1], [1, 0], [2, 3]]
    >>> _cycles(Products(*map(np.array, columns)))
    [(array([0, 1]), array([1, 0]))]
    """
    whole, slow, fast = products
    if not len(whole):
        return []
    count = int(np.max(products)) + 1
    proper = (whole != slow) | (whole != fast)
    product, factor = np.tile(whole[proper], 2), np.concatenate([slow[proper], fast[proper]])
    while True:  # a factor that is no product itself lies on no cycle
        divisible = np.zeros(count, bool)
        divisible[product] = True
        inside = divisible[factor]
        if inside.all():
            break
        product, factor = product[inside], factor[inside]
    if not len(product):
        return []
    graph = coo_matrix((np.ones(len(product), np.int8), (product, factor)), (count, count))
    strong = connected_components(graph, directed=True, connection="strong")[1]
    back = (strong[product] == strong[factor]) & (product != factor)
    return [(product[back], factor[back])] if back.any() else []


def _parts(pairs: Sequence[Pairs]) -> int:
    """Into how many parts ties divide the labels that they tie.

    >>> _parts([(np.array([3, 5]), np.array([5, 9])), (np.array([4]), np.array([8]))])
    2
    """
    labels = np.unique(np.concatenate([column for pair in pairs for column in pair]))
    local = [(np.searchsorted(labels, p), np.searchsorted(labels, q)) for p, q in pairs]
    return int(_connect(len(labels), local).max()) + 1


def _connect(count: int, pairs: Sequence[Pairs]) -> Labels:
    """The connected component of every label.

    >>> _connect(5, [(np.array([0, 1]), np.array([3, 4]))])
    array([0, 1, 2, 0, 1])
    """
    rows, cols = _end_to_end(pairs, 2)
    graph = coo_matrix((np.ones(len(rows), np.int8), (rows, cols)), (count, count))
    components: Labels = connected_components(graph, directed=False)[1].astype(np.int64)
    return components


def _end_to_end(rows: Sequence[tuple[Labels, ...]], width: int) -> list[Labels]:
    """The columns of tuples of vectors, each as one vector."""
    return [np.concatenate([np.zeros(0, np.int64), *(row[k] for row in rows)]) for k in range(width)]
