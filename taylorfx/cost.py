"""What a network costs: parameters and FLOPs in closed form in what is kept, peak memory, measured latency.

The closed forms are sums of products of axis lengths, read from the axis signatures: a parameter's size is the product
of its axes, a layer's FLOPs are two per multiply-add, as ``torch.utils.flop_counter`` counts (matrix products,
convolutions). Peak memory follows from the shapes and the order of evaluation. Latency is measured layer by layer on a
coarse grid of widths and interpolated in between.
"""

from __future__ import annotations

import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taylorfx import axes as language
from taylorfx.coupling import Coupling
from taylorfx.labels import Labeled, Labels, Ties, is_example, shape_of
from taylorfx.layers import Input, Layer, Shape, ShapeError
from taylorfx.spec import Node, Spec, propagate

__all__ = ["ORDER", "Cost", "Timings", "flops", "memory", "parameters"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Cost(ABC):
    """What a network costs, by the lengths of its coupling's axes.

    Call it with the mask of kept units, ``(units,)``.
    """

    coupling: Coupling

    def __call__(self, keep: Mask) -> float:
        return self.of(self.coupling.counts(keep))

    @property
    def total(self) -> float:
        """The cost of the whole network."""
        return self(np.ones(len(self.coupling), bool))

    def marginal(self, keep: Mask | None = None) -> Tensor:
        """What leaves with each unit, to first order: ``(units,)``, in float64.

        A score divided by it is worth per cost: ``taylor(stats, coupling) / flops(coupling).marginal()``.

        Args:
            keep: the units that the network still has, ``(units,)``; by default all. Of the others it is what would
                come back with them.
        """
        coupling = self.coupling
        kept = np.append(np.ones(len(coupling), bool) if keep is None else keep, True)
        saved = np.zeros(len(coupling) + 1)
        for axis, slope in zip(coupling.axes, self.slopes(coupling.counts(kept[:-1])), strict=False):
            for k, row in enumerate(axis):
                others = kept[np.delete(axis, k, 0)].all(0)  # an index of several factors is there if all of them are
                saved += slope * np.bincount(row[others] % len(saved), minlength=len(saved))
        return torch.from_numpy(saved[:-1])

    @abstractmethod
    def of(self, lengths: Labels) -> float:
        """The cost at these lengths of the coupling's axes, ``(axes,)``."""

    @abstractmethod
    def slopes(self, lengths: Labels) -> NDArray[np.float64]:
        """How it grows with each of them, ``(axes,)`` or one more."""


@dataclass(frozen=True, eq=False)
class _Sum(Cost):
    """A sum of monomials; it never grows when a unit leaves.

    Attributes:
        factors: ``(terms,)``: what does not change.
        axes: ``(terms, degree)``: the axes whose lengths multiply, by number; the number of axes stands for length 1.
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
        spans: ``(2, values)``, the first moment of each and the first without it.
    """

    sizes: _Sum
    values: Labels
    spans: Labels

    def of(self, lengths: Labels) -> int:
        return int(self.alive(lengths).max(initial=0))

    def alive(self, lengths: Labels) -> NDArray[np.float64]:
        """How many elements are alive at every moment."""
        sizes = np.bincount(self.values, self.sizes.terms(lengths), self.spans.shape[1])
        born, died = (np.bincount(moments, sizes, len(sizes) + 2) for moments in self.spans)
        alive: NDArray[np.float64] = np.cumsum(born - died)
        return alive

    def slopes(self, lengths: Labels) -> NDArray[np.float64]:
        full = (self.alive(lengths) / max(1, self.of(lengths))) ** ORDER
        until = np.append(0, np.cumsum(full / full.sum()))
        weights: NDArray[np.float64] = np.subtract(*until[self.spans[::-1]])
        return self.sizes.slopes(lengths, weights[self.values])


ORDER = 16
"""Of the norm that stands for the largest: of the moments of peak memory, of several budgets."""


@dataclass(frozen=True, eq=False)
class _Time(Cost):
    """The sum of what the nodes take, each as a function of the lengths of some axes."""

    nodes: Sequence[tuple[Sequence[int], Callable[[Labels], float]]]

    def of(self, lengths: Labels) -> float:
        return sum(takes(lengths) for _, takes in self.nodes)

    def slopes(self, lengths: Labels) -> NDArray[np.float64]:
        slopes = np.zeros(len(lengths))
        for axes, takes in self.nodes:
            for axis in axes:
                shorter = lengths.copy()
                shorter[axis] = max(1, lengths[axis] - 1)
                slopes[axis] += max(0.0, takes(lengths) - takes(shorter))
        return slopes


def parameters(coupling: Coupling) -> Cost:
    """The number of trained parameters (shared ones once; running statistics not counted)."""
    buffers = {node.path(leaf) for node in coupling.spec for leaf in node.layer.buffers}
    terms = [(1, axes) for path, axes in coupling.parameters.items() if path not in buffers]
    return _cost(coupling, terms)


def flops(coupling: Coupling) -> Cost:
    """Floating-point operations for one example: two per multiply-add of every convolution and matrix product.

    Layers without a signature, kept as they were captured, count nothing.
    """
    terms: list[tuple[int, Sequence[int]]] = []
    for node in coupling.spec:
        bound, numbers = coupling.bounds[node.name], coupling.letters[node.name]
        for text in node.layer.multiplies:
            known = language.letters(language.pattern(text))
            names = [x for x in bound.sizes if x in known or (x[0] == "_" and "..." in known)]
            rigid = math.prod(bound.sizes[x] for x in names if x not in numbers)
            terms.append((2 * rigid, [numbers[x] for x in names if x in numbers]))
    return _cost(coupling, terms)


def _cost(coupling: Coupling, terms: Sequence[tuple[int, Sequence[int]]]) -> _Sum:
    degree, one = max((len(axes) for _, axes in terms), default=0), len(coupling.axes)
    table = [[*axes, *[one] * (degree - len(axes))] for _, axes in terms]
    return _Sum(
        coupling,
        np.array([factor for factor, _ in terms], np.int64),
        np.array(table, np.int64).reshape(len(terms), degree),
    )


def memory(coupling: Coupling) -> Cost:
    """The peak of the activations: the most elements that are alive at once while one example is evaluated.

    A value lives from the node that makes it until the last one that hears it; inputs live from the start, and what the
    network gives out until the end. Each counts by its size, views like copies; free-standing parameters are not
    activations. What a layer needs within itself (the scores of an attention) is not seen.
    """
    terms: list[tuple[int, Sequence[int]]] = []
    values: list[int] = []
    for k, node in enumerate(coupling.spec):
        found = [] if node.layer.leaf else _size(coupling, node)
        terms += found
        values += [k] * len(found)
    return _Peak(coupling, _cost(coupling, terms), np.array(values, np.int64), _spans(coupling.spec))


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


def _spans(spec: Spec) -> Labels:
    """The first moment of every node's value and the first without it, ``(2, nodes)``; the inputs are there at 0."""
    place = {node.name: k for k, node in enumerate(spec.nodes)}
    first = [0 if isinstance(node.layer, Input) else k + 1 for k, node in enumerate(spec.nodes)]
    after = [len(first) + 1] * len(first)
    for k, (_, _, done) in enumerate(spec._steps):  # type: ignore[attr-defined]
        for name in done:
            after[place[name]] = k + 2
    return np.array([first, after], np.int64)


@dataclass(frozen=True, eq=False)
class Timings:
    """How long layers take on this machine, in microseconds of inference: a table that fills as it is asked.

    Every layer is timed alone on random tensors, once for each of its shapes, so that networks and plans share what
    was measured. ``timings(spec)`` is the sum over a network. A budget asks for thousands of widths: `over` measures
    on a coarse grid of widths and interpolates. What surrounds the layers, and what a compiler would fuse, is not
    seen; for such a number give `Measured` a function of your own.

    Attributes:
        batch: the number of examples.
        points: how many widths of an axis are on the grid of `over`, from the narrowest to the whole one.
        repeats: the median of so many runs counts, after one that does not.
        device, dtype: of the tensors.
        table: microseconds by layer and input shapes. It is filled in place.
    """

    batch: int = 1
    points: int = 5
    repeats: int = 5
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    table: dict[tuple[Layer, tuple[Shape, ...]], float] = field(default_factory=dict)

    def __call__(self, spec: Spec) -> float:
        """The sum over the layers of a network, each measured at its own shapes (once).

        Raises:
            ShapeError: if the shape of an input is not declared (``spec.at(shape)``).
        """
        bounds = propagate(spec, Ties(labeled=False))
        nodes = [node for node in spec if not isinstance(node.layer, Input)]
        return sum(self.look_up(n.layer, [self._shape(bounds[x].output) for x in n.inputs]) for n in nodes)

    def look_up(self, layer: Layer, shapes: Sequence[Shape]) -> float:
        """Microseconds of one layer on inputs of these shapes (of a whole batch), measured if nobody asked before."""
        key = layer, tuple(shapes)
        if key not in self.table:
            self.table[key] = self.measure(layer, shapes)
        return self.table[key]

    def measure(self, layer: Layer, shapes: Sequence[Shape]) -> float:
        """Run a layer on random tensors: the median in microseconds. Override it to measure in another way."""
        generator = torch.Generator().manual_seed(0)
        leaves = {leaf: self._to(tensor) for leaf, tensor in layer.init(generator).items()}
        with torch.no_grad():
            inputs = self._inputs(layer, leaves, shapes, generator)
            seconds: list[float] = []
            for _ in range(self.repeats):
                self._wait()
                start = time.perf_counter()
                layer.apply(leaves, *inputs)
                self._wait()
                seconds.append(time.perf_counter() - start)
        return 1e6 * float(np.median(seconds))

    def over(self, coupling: Coupling) -> Cost:
        """The latency of what a mask of units keeps, interpolated over the widths of every layer.

        It is ``timings(plan.spec)`` wherever all widths are on the grid. In between it is linear on the simplices of
        the grid (Kuhn 1960), which takes one corner more than a layer has axes, and never falls with a width if the
        measurements do not.
        """
        nodes = [self._node(coupling, node) for node in coupling.spec if not isinstance(node.layer, Input)]
        return _Time(coupling, nodes)

    def _node(self, coupling: Coupling, node: Node) -> tuple[list[int], Callable[[Labels], float]]:
        """The axes that a node's latency depends on, and it as a function of the lengths of all."""
        bound = coupling.bounds[node.name]
        moving = {x: k for x, k in coupling.letters[node.name].items() if (coupling.axes[k] >= 0).any()}
        numbers = sorted(set(moving.values()))
        grids = [self.grid(coupling.axes[k]) for k in numbers]
        full = [self._shape(coupling.bounds[x].output) for x in node.inputs]

        @cache
        def at(widths: tuple[int, ...]) -> float:
            if not numbers:
                return self.look_up(node.layer, full)
            lengths = dict(zip(numbers, widths, strict=True))
            sizes = {**bound.sizes, **{x: lengths[k] for x, k in moving.items()}}
            signature = coupling.signature(node)
            patterns = signature.inputs if signature else ()
            shapes = [
                tuple(
                    language.size(axis, sizes) * (n // one) for axis, one, n in zip(pattern, given, whole, strict=True)
                )
                for pattern, given, whole in zip(patterns, bound.inputs, full, strict=False)
            ]
            return self.look_up(node.layer.resize(sizes, *bound.inputs), shapes)

        return numbers, lambda lengths: _interpolate(at, grids, lengths[numbers])

    def grid(self, axis: Labels) -> Labels:
        """The widths at which an axis of a coupling, ``(factors, size)``, is measured."""
        least = max(1, int((axis < 0).all(0).sum()))
        return np.unique(np.linspace(least, axis.shape[1], self.points).round().astype(np.int64))

    def _shape(self, axes: Sequence[Labeled]) -> Shape:
        """The shape of a tensor for the whole batch."""
        examples = [is_example(axis) for axis in axes]
        return tuple(n * (self.batch if many else 1) for n, many in zip(shape_of(axes), examples, strict=True))

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def _inputs(
        self, layer: Layer, leaves: dict[str, Tensor], shapes: Sequence[Shape], generator: torch.Generator
    ) -> list[Tensor]:
        """Random numbers; where the layer does not take those, zeros that count or true masks. It has run with them."""
        choices = [
            [
                self._to(torch.randn(shape, generator=generator)),
                torch.zeros(shape, dtype=torch.int64, device=self.device),
                torch.ones(shape, dtype=torch.bool, device=self.device),
            ]
            for shape in shapes
        ]
        problem: Exception | None = None
        for inputs in itertools.product(*choices):
            try:
                layer.apply(leaves, *inputs)
                return list(inputs)
            except (RuntimeError, IndexError, TypeError) as error:
                problem = problem or error
        raise ShapeError(
            f"A layer is timed on random numbers, zeros that count, or true masks; {layer} runs on none of them, of "
            f"shape {', '.join(map(str, shapes))}. Put its time into the table, or override `measure`."
        ) from problem

    def _wait(self) -> None:
        """Until the device has done what it was given."""
        if torch.device(self.device).type != "cpu":
            torch.accelerator.synchronize()


def _interpolate(value: Callable[[tuple[int, ...]], float], grids: Sequence[Labels], point: Labels) -> float:
    """From the grid's corner below the point, one axis after the other up, that with the largest fraction first."""
    corner = [max(int(np.searchsorted(grid, x, "right")) - 1, 0) for grid, x in zip(grids, point, strict=True)]
    fractions = [
        (x - grid[k]) / (grid[k + 1] - grid[k]) if k + 1 < len(grid) else 0.0
        for grid, k, x in zip(grids, corner, point.tolist(), strict=True)
    ]

    def here() -> float:
        return value(tuple(int(grid[k]) for grid, k in zip(grids, corner, strict=True)))

    total = last = here()
    for axis in sorted(range(len(grids)), key=fractions.__getitem__, reverse=True):
        if fractions[axis] > 0:
            corner[axis] += 1
            total, last = total + fractions[axis] * (here() - last), here()
    return total
