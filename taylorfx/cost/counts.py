"""What a network costs: parameters and FLOPs in closed form in what is kept, peak memory, measured latency.

The closed forms are sums of products of axis lengths, read from the axis signatures: a parameter's size is the product
of its axes, a layer's FLOPs are two per multiply-add, as ``torch.utils.flop_counter`` counts (matrix products,
convolutions). Peak memory follows from the shapes and the order of evaluation. Latency is measured layer by layer on a
coarse grid of widths and interpolated in between.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from taylorfx.cost.algebra import Cost, CostFunction
from taylorfx.coupling.units import Coupling
from taylorfx.layers import Input
from taylorfx.layers import axes as language
from taylorfx.network.labels import Labels
from taylorfx.network.spec import Node

__all__ = ["ORDER", "flops", "memory", "parameters"]


@dataclass(frozen=True, eq=False)
class _Sum(Cost):
    """A sum of monomials; it never grows when a unit leaves.

    Attributes:
        factors: ``(terms,)``: what does not change.
        axes: ``(terms, degree)``: the axes whose lengths multiply, by number, and then the conditions, which count as 1
            or 0; one past the last stands for length 1.
    """

    factors: Labels
    axes: Labels

    def of(self, lengths: Labels) -> int:
        return int(self.terms(lengths).sum())

    def terms(self, lengths: Labels) -> Labels:
        """What each of them is, ``(terms,)``."""
        value: Labels = self.factors * np.append(lengths, 1)[self.axes].prod(1)
        return value

    def slopes(self, lengths: Labels, weights: NDArray[np.float64] | float = 1.0) -> NDArray[np.float64]:
        lengths = np.append(lengths, 1).astype(np.float64)
        slopes = np.zeros(len(lengths))
        for column in range(self.axes.shape[1]):
            rest = np.delete(self.axes, column, 1)
            np.add.at(slopes, self.axes[:, column], weights * self.factors * lengths[rest].prod(1))
        return slopes


@dataclass(frozen=True, eq=False)
class _Peak(Cost):
    """The most elements that are alive at once.

    Its slopes are those of a norm of high order over the moments instead of the largest one: what leaves at one moment
    alone saves nothing as long as another is as full, but both have to get emptier.

    Attributes:
        sizes: terms that add up to the elements of each value.
        values: ``(terms,)``, the value that each is of.
        spans: of the conditions that hold, ``(2, values)``: the first moment of each value and the first without it.
    """

    sizes: _Sum
    values: Labels
    spans: Callable[[tuple[bool, ...]], Labels]

    def of(self, lengths: Labels) -> int:
        return int(self.alive(lengths).max(initial=0))

    def alive(self, lengths: Labels) -> NDArray[np.float64]:
        """How many elements are alive at every moment."""
        spans = self._spans(lengths)
        sizes = np.bincount(self.values, self.sizes.terms(lengths), spans.shape[1])
        born, died = (np.bincount(moments, sizes, len(sizes) + 2) for moments in spans)
        alive: NDArray[np.float64] = np.cumsum(born - died)
        return alive

    def slopes(self, lengths: Labels) -> NDArray[np.float64]:
        full = (self.alive(lengths) / max(1, self.of(lengths))) ** ORDER
        until = np.append(0, np.cumsum(full / full.sum()))
        weights: NDArray[np.float64] = np.subtract(*until[self._spans(lengths)[::-1]])
        return self.sizes.slopes(lengths, weights[self.values])

    def _spans(self, lengths: Labels) -> Labels:
        return self.spans(tuple((lengths[len(self.coupling.axes) :] > 0).tolist()))


ORDER = 16
"""Of the norm that stands for the largest: of the moments of peak memory, of several budgets."""


@CostFunction
def parameters(coupling: Coupling) -> Cost:
    """The number of trained parameters (shared ones once; running statistics not counted)."""
    buffers = {node.path(leaf) for node in coupling.spec for leaf in node.layer.buffers}
    when = _conditions(coupling, coupling.presence.parameters)
    terms = [(1, [*axes, *when(path)]) for path, axes in coupling.parameters.items() if path not in buffers]
    return _cost(coupling, terms)


@CostFunction
def flops(coupling: Coupling) -> Cost:
    """Floating-point operations for one example: two per multiply-add of every convolution and matrix product.

    Layers without a signature, kept as they were captured, count nothing.
    """
    terms: list[tuple[int, Sequence[int]]] = []
    when = _conditions(coupling, coupling.presence.first)
    for node in coupling.spec.first:
        bound, numbers = coupling.bounds[node.name], coupling.letters[node.name]
        for text in node.layer.multiplies:
            known = language.letters(language.pattern(text))
            names = [x for x in bound.sizes if x in known or (x[0] == "_" and "..." in known)]
            rigid = math.prod(bound.sizes[x] for x in names if x not in numbers)
            terms.append((2 * rigid, [*(numbers[x] for x in names if x in numbers), *when(node.name)]))
    return _cost(coupling, terms)


def _conditions(coupling: Coupling, numbers: Mapping[str, int]) -> Callable[[str], list[int]]:
    """By name, the condition under which something is there, as one more length that multiplies what it costs."""
    return lambda name: [len(coupling.axes) + numbers[name]] if name in numbers else []


def _cost(coupling: Coupling, terms: Sequence[tuple[int, Sequence[int]]]) -> _Sum:
    degree = max((len(axes) for _, axes in terms), default=0)
    one = len(coupling.axes) + len(coupling.presence.conditions)
    table = [[*axes, *[one] * (degree - len(axes))] for _, axes in terms]
    return _Sum(
        coupling,
        np.array([factor for factor, _ in terms], np.int64),
        np.array(table, np.int64).reshape(len(terms), degree),
    )


@CostFunction
def memory(coupling: Coupling) -> Cost:
    """The peak of the activations: the most elements that are alive at once while one example is evaluated.

    A value lives from the node that makes it until the last one that consumes it; inputs live from the start, and what
    the network gives out until the end. Each counts by its size, views like copies; free-standing parameters are not
    activations. What a layer needs within itself (the scores of an attention) is not seen.
    """
    terms: list[tuple[int, Sequence[int]]] = []
    values: list[int] = []
    when = _conditions(coupling, coupling.presence.first)
    for k, node in enumerate(coupling.spec.first):
        sizes = [] if node.layer.leaf else _size(coupling, node)
        terms += [(factor, [*axes, *when(node.name)]) for factor, axes in sizes]
        values += [k] * len(sizes)
    return _Peak(coupling, _cost(coupling, terms), np.array(values, np.int64), cache(partial(_spans, coupling)))


def _size(coupling: Coupling, node: Node) -> list[tuple[int, Sequence[int]]]:
    """The terms of the size of what a node gives out."""
    bound, numbers = coupling.bounds[node.name], coupling.letters[node.name]
    signature = None if isinstance(node.layer, Input) else coupling.signature(node)
    if signature is None:
        return [(math.prod(bound.shape), ())]
    products = [[x for product in each for x in product] for each in itertools.product(*signature.output)]
    return [
        (math.prod(bound.sizes[x] for x in names if x not in numbers), [numbers[x] for x in names if x in numbers])
        for names in products
    ]


def _spans(coupling: Coupling, holds: tuple[bool, ...]) -> Labels:
    """The first moment of every node's value and the first without it, ``(2, nodes)``; the inputs are there at 0.

    Of a node that is not there the size is zero, and its moment is not fuller than that before it.
    """
    spec, presence = coupling.spec.first, coupling.presence
    place = {node.name: k for k, node in enumerate(spec.nodes)}
    first = [0 if isinstance(node.layer, Input) else k + 1 for k, node in enumerate(spec.nodes)]
    after = [len(first) + 1] * len(first)
    for node, _, done in (spec if all(holds) else presence.left(spec, presence.first, holds)).steps:
        for name in done:
            after[place[name]] = place[node.name] + 2
    return np.array([first, after], np.int64)
