"""Measured latency: every layer timed alone on a coarse grid of widths, interpolated in between."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taylorfx.cost.algebra import Cost
from taylorfx.coupling.units import Coupling
from taylorfx.layers import Input, Layer, Shape, ShapeError
from taylorfx.layers import axes as language
from taylorfx.network.bind import propagate
from taylorfx.network.labels import Labeled, Labels, Ties, is_example, shape_of
from taylorfx.network.spec import Node, Spec
from taylorfx.progress import LOG, bar

__all__ = ["Timings"]


@dataclass(frozen=True, eq=False)
class _Time(Cost):
    """The sum of what the nodes take, each as a function of the lengths of some axes.

    Attributes:
        there: by node, the place of the condition under which it is there among the lengths; -1 if it always is.
    """

    nodes: Sequence[tuple[Sequence[int], Callable[[Labels], float]]]
    there: Sequence[int]

    def of(self, lengths: Labels) -> float:
        return sum(
            takes(lengths)
            for (_, takes), number in zip(self.nodes, self.there, strict=True)
            if number < 0 or lengths[number]
        )

    def slopes(self, lengths: Labels) -> NDArray[np.float64]:
        slopes = np.zeros(len(lengths))
        for (axes, takes), number in zip(self.nodes, self.there, strict=True):
            if number >= 0:
                slopes[number] += takes(lengths)
            for axis in axes if number < 0 or lengths[number] else ():
                shorter = lengths.copy()
                shorter[axis] = max(1, lengths[axis] - 1)
                slopes[axis] += max(0.0, takes(lengths) - takes(shorter))
        return slopes


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
        progress: draw a bar over the layers of a network, by rich.
    """

    batch: int = 1
    points: int = 5
    repeats: int = 5
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    table: dict[tuple[Layer, tuple[Shape, ...]], float] = field(default_factory=dict)
    progress: bool = False

    def __call__(self, spec: Spec) -> float:
        """The sum over the layers of a network, each measured at its own shapes (once).

        Raises:
            ShapeError: if the shape of an input is not declared (``spec.at(shape)``).
        """
        spec = spec.first
        bounds = propagate(spec, Ties(labeled=False))
        nodes = [node for node in spec if not isinstance(node.layer, Input)]
        total = 0.0
        with bar(self.progress, "timings", len(nodes)) as advance:
            for node in nodes:
                total += self.look_up(node.layer, [self._shape(bounds[x].output) for x in node.inputs])
                advance(1)
        return total

    def look_up(self, layer: Layer, shapes: Sequence[Shape]) -> float:
        """Microseconds of one layer on inputs of these shapes (of a whole batch), measured if nobody asked before."""
        key = layer, tuple(shapes)
        if key not in self.table:
            self.table[key] = self.measure(layer, shapes)
            LOG.info("timings: %s of %s in %.1f us", layer, ", ".join(map(str, shapes)), self.table[key])
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
        measurements do not. It is a cost function: ``tfx.cost.CostFunction(timings.over)`` can be multiplied and added.
        """
        nodes = [node for node in coupling.spec.first if not isinstance(node.layer, Input)]
        conditions = coupling.presence.first
        there = [len(coupling.axes) + conditions[node.name] if node.name in conditions else -1 for node in nodes]
        return _Time(coupling, [self._node(coupling, node) for node in nodes], there)

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
                    language.size(axis, sizes) * (n // one)
                    for axis, one, n in zip(pattern, example, whole, strict=True)
                )
                for pattern, example, whole in zip(patterns, bound.inputs, full, strict=False)
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
        """Wait until the device has finished its work."""
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
