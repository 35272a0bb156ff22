"""Measured latency: layers timed alone on a coarse grid of widths, interpolated in between; networks timed whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from glob import escape

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taylorfx.cost.algebra import Cost
from taylorfx.cost.runners import Pace, Runner, eager, race
from taylorfx.coupling.units import Coupling
from taylorfx.layers import Input, Layer, Shape, ShapeError
from taylorfx.layers import axes as language
from taylorfx.layers.roles import Mixing
from taylorfx.network.bind import propagate
from taylorfx.network.labels import Labeled, Labels, Ties, is_example, shape_of
from taylorfx.network.parameters import init
from taylorfx.network.spec import Node, Spec
from taylorfx.progress import LOG, bar

__all__ = ["Timings"]

Kind = tuple[object, ...]
"""What tells one kind of layer from another, and one of its axes."""


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
    """How long layers and networks take on this machine, in microseconds of inference: tables that fill as asked.

    Every layer is timed alone on random tensors, once for each of its shapes, so that networks and plans share what
    was measured. ``timings(spec)`` is the sum over a network. A budget asks for thousands of widths: `over` measures
    on a coarse grid of widths and interpolates. What surrounds the layers, and what a compiler fuses, is in `share`
    alone: there networks run whole, as the runner runs them. `Latency` chooses by the former and is held to the latter.

    Attributes:
        batch: the number of examples.
        points: how many widths of an axis are on the grid of `over`, from the narrowest to the whole one; fewer where a
            layer has three or more.
        repeats: the median of so many runs of a layer counts, after one that does not.
        device, dtype: of the tensors.
        table: microseconds by layer and input shapes. It is filled in place.
        progress: draw a bar over the layers of a network, by rich.
        runner: runs networks whole: `taylorfx.cost.eager`, `taylorfx.cost.compiled`, `taylorfx.interop.onnx_runtime`,
            or a function of your own of ``(params, spec, inputs)`` that gives a function of nothing. None: nothing but
            layers is timed.
        pace: the clock, and how precisely networks are timed.
        shares: what `share` and `whole` measured. It is filled in place.
        kinds: what `multiple` measured. It is filled in place.
    """

    batch: int = 1
    points: int = 5
    repeats: int = 5
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    table: dict[tuple[Layer, tuple[Shape, ...]], float] = field(default_factory=dict)
    progress: bool = False
    runner: Runner | None = eager
    pace: Pace = field(default_factory=Pace)
    shares: dict[tuple[Spec, Spec | None], float] = field(default_factory=dict)
    kinds: dict[Kind, NDArray[np.float64]] = field(default_factory=dict)

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
                start = self.pace.clock()
                layer.apply(leaves, *inputs)
                self._wait()
                seconds.append(self.pace.clock() - start)
        return 1e6 * float(np.median(seconds))

    def share(self, spec: Spec, whole: Spec) -> float:
        """The time of a network as a share of another one's: both run whole, by turns, measured if nobody asked before.

        Parameters and inputs are random, tokens are 0 and masks are true; a runner may replace them by its own.
        """
        if spec == whole:
            return 1.0
        if (spec, whole) not in self.shares:
            seconds = race([self.ready(spec), self.ready(whole)], self.pace, self._wait)
            self.shares[spec, whole] = float(np.median(seconds[:, 0] / seconds[:, 1]))
            LOG.info("timings: %.3f of the whole network, %d rounds", self.shares[spec, whole], len(seconds))
        return self.shares[spec, whole]

    def whole(self, spec: Spec) -> float:
        """Microseconds of a network, run whole, measured if nobody asked before."""
        if (spec, None) not in self.shares:
            self.shares[spec, None] = 1e6 * float(np.median(race([self.ready(spec)], self.pace, self._wait)))
        return self.shares[spec, None]

    def ready(self, spec: Spec) -> Callable[[], object]:
        """The network on random parameters and inputs, ready to run."""
        if self.runner is None:
            raise ValueError("Networks are timed whole by a runner; received runner=None. Give one, or time layers.")
        spec, generator = spec.first, torch.Generator().manual_seed(0)
        inputs: list[Tensor] = []
        for node in spec.inputs:
            layer = node.layer
            shape = getattr(layer, "shape", None)
            if shape is None:
                raise ShapeError(f"A network is timed on inputs of known shapes; {node.name} declares none: spec.at().")
            sizes = self.batch, *((shape,) if isinstance(shape, int) else shape)
            kind = getattr(torch, layer.dtype) if isinstance(layer, Input) and layer.dtype else self.dtype
            random = torch.randn(sizes, generator=generator) if kind.is_floating_point else torch.zeros(sizes)
            inputs.append((torch.ones(sizes) if kind is torch.bool else random).to(self.device, kind))
        return self.runner(init(spec, generator, dtype=self.dtype, device=self.device), spec, tuple(inputs))

    def over(self, coupling: Coupling) -> Cost:
        """The latency of what a mask of units keeps, interpolated over the widths of every layer.

        What is measured on the grid is smoothed, so that it never falls with a width (`rising`); it is
        ``timings(plan.spec)`` wherever all widths are on the grid and no wider layer was faster. In between it is
        linear on the simplices of the grid (Kuhn 1960). It is a cost function: ``tfx.cost.CostFunction(timings.over)``
        can be multiplied and added.
        """
        nodes = [node for node in coupling.spec.first if not isinstance(node.layer, Input)]
        conditions = coupling.presence.first
        there = [len(coupling.axes) + conditions[node.name] if node.name in conditions else -1 for node in nodes]
        return _Time(coupling, [self._node(coupling, node) for node in nodes], there)

    def _node(self, coupling: Coupling, node: Node) -> tuple[list[int], Callable[[Labels], float]]:
        """The axes that a node's latency depends on, and it as a function of the lengths of all."""
        numbers = sorted({*_moving(coupling, node).values()})
        points = self.points if len(numbers) < 3 else max(2, round(self.points ** (2 / len(numbers))))
        grids = [self.grid(coupling.axes[k], points) for k in numbers]

        @cache
        def table() -> NDArray[np.float64]:
            times = [self.look_up(*self._at(coupling, node, widths)) for widths in itertools.product(*grids)]
            return rising(np.array(times).reshape([len(grid) for grid in grids]))

        return numbers, lambda lengths: _interpolate(table(), grids, lengths[numbers])

    def _at(self, coupling: Coupling, node: Node, widths: Sequence[int]) -> tuple[Layer, list[Shape]]:
        """A node's layer and the shapes of its inputs, where the axes that move have these widths, in their order."""
        full = [self._shape(coupling.bounds[x].output) for x in node.inputs]
        moving, bound = _moving(coupling, node), coupling.bounds[node.name]
        if not moving:
            return node.layer, full
        lengths = dict(zip(sorted({*moving.values()}), map(int, widths), strict=True))
        sizes = {**bound.sizes, **{x: lengths[k] for x, k in moving.items()}}
        signature = coupling.signature(node)
        patterns = signature.inputs if signature else ()
        shapes = [
            tuple(language.size(axis, sizes) * (n // one) for axis, one, n in zip(pattern, example, whole, strict=True))
            for pattern, example, whole in zip(patterns, bound.inputs, full, strict=False)
        ]
        return node.layer.resize(sizes, *bound.inputs), shapes

    def grid(self, axis: Labels, points: int | None = None) -> Labels:
        """The widths at which an axis of a coupling, ``(factors, size)``, is measured: multiples of 8 where it is long.

        Other widths may take longer than wider ones, so that they say little of what is between them.
        """
        least, size = max(1, int((axis < 0).all(0).sum())), axis.shape[1]
        widths = np.linspace(least, size, points or self.points)
        step = 8 if size - least >= 16 * (len(widths) - 1) else 1
        widths[1:-1] = (widths[1:-1] / step).round() * step
        return np.unique(widths.round().astype(np.int64))

    def multiple(self, coupling: Coupling) -> dict[str, int]:
        """By scope, multiples of how many units are free on this machine; ``multiple=`` of `select` takes them.

        Kernels work on channels in blocks, so that a width between two multiples may take as long as the wider one. It
        is measured for every kind of layer that mixes channels, along each of its axes, just below a round width. Of
        16, 8 and 4 a scope gets the largest of which a half less saves less than half of what it would if time were
        proportional to the width, in all of its layers together. Scopes without any are left out: narrow ones, and
        heads and their dimensions.
        """
        times: dict[int, list[tuple[float, NDArray[np.float64], int]]] = {}
        kinds = self._kinds(coupling)
        for node, letter, base, kind in self._mixing(coupling):
            number = coupling.letters[node.name][letter]
            widths = [coupling.axes[k].shape[1] for k in sorted({*_moving(coupling, node).values()})]
            takes = self.look_up(*self._at(coupling, node, widths))
            times.setdefault(number, []).append((takes, kinds[kind], base))
        found: dict[str, int] = {}
        for number, layers in times.items():
            units, counts = np.unique(coupling.axes[number], return_counts=True)
            scope = int(coupling.scope[units[-1]])
            free = next((m for m in (16, 8, 4) if 4 * m <= coupling.axes[number].shape[1] and _free(layers, m)), 1)
            each = free // math.gcd(free, int(counts[-1]))  # where a unit has several indices, fewer units will do
            name = escape(coupling.scopes[scope])
            found[name] = max(found.get(name, 1), each)
        return {name: n for name, n in found.items() if n > 1}

    def _mixing(self, coupling: Coupling) -> Iterator[tuple[Node, str, int, Kind]]:
        """The nodes that mix channels with each letter along which they may shrink, a round width there, and the kind.

        Layers are of one kind if they are the same but for places when all that may shrink has such a width.
        """
        for node in coupling.spec.first:
            moving = _moving(coupling, node)
            if node.layer.role(Mixing) is None or not moving:
                continue
            base = {k: _round(coupling.axes[k].shape[1]) for k in sorted({*moving.values()})}
            layer, _ = self._at(coupling, node, [*base.values()])
            kind = type(layer).__name__, *sorted(layer.shapes().items())
            for letter, k in moving.items():
                plain = (
                    len(coupling.axes[k]) == 1 and len({*coupling.scope[coupling.axes[k][coupling.axes[k] >= 0]]}) == 1
                )
                if plain and base[k] >= 16:
                    yield node, letter, base[k], (letter, kind)

    def _kinds(self, coupling: Coupling) -> dict[Kind, NDArray[np.float64]]:
        """How long a layer of each kind takes just below a round width, `BELOW`, as a share of the time there.

        It is measured by turns, on the layer of the kind that is just long enough to be timed well.
        """
        at: dict[Kind, list[list[tuple[Layer, list[Shape]]]]] = {}
        for node, letter, _, kind in self._mixing(coupling):
            moving = _moving(coupling, node)
            numbers = sorted({*moving.values()})
            whole = [_round(coupling.axes[k].shape[1]) for k in numbers]
            narrow = [[n - b if k == moving[letter] else n for k, n in zip(numbers, whole, strict=True)] for b in BELOW]
            at.setdefault(kind, []).append([self._at(coupling, node, widths) for widths in (whole, *narrow)])
        shares: dict[Kind, NDArray[np.float64]] = {}
        for kind, layers in at.items():
            if kind not in self.kinds:
                layers = sorted(layers, key=lambda widths: self.look_up(*widths[0]))
                one = next((widths for widths in layers if self.look_up(*widths[0]) > LONG), layers[-1])
                times = np.array([[self.measure(*layer) for layer in one] for _ in range(ROUNDS)])
                self.kinds[kind] = np.median(times[:, 1:] / times[:, :1], 0)
            shares[kind] = self.kinds[kind]
        return shares

    def _shape(self, axes: Sequence[Labeled]) -> Shape:
        """The shape of a tensor for the whole batch."""
        examples = [is_example(axis) for axis in axes]
        return tuple(n * (self.batch if many else 1) for n, many in zip(shape_of(axes), examples, strict=True))

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def _inputs(
        self, layer: Layer, leaves: dict[str, Tensor], shapes: Sequence[Shape], generator: torch.Generator
    ) -> list[Tensor]:
        """Random numbers; where the layer does not take those, zeros that count, true masks, or complex zeros.

        It has run with them.
        """
        choices = [
            [
                self._to(torch.randn(shape, generator=generator)),
                torch.zeros(shape, dtype=torch.int64, device=self.device),
                torch.ones(shape, dtype=torch.bool, device=self.device),
                torch.zeros(shape, dtype=torch.complex64, device=self.device),
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
            f"A layer is timed on random numbers, zeros that count, true masks, or complex zeros; {layer} runs on "
            f"none of them, of shape {', '.join(map(str, shapes))}. Put its time into the table, or override `measure`."
        ) from problem

    def _wait(self) -> None:
        """Wait until the device has finished its work."""
        if torch.device(self.device).type != "cpu":
            torch.accelerator.synchronize()


def _moving(coupling: Coupling, node: Node) -> dict[str, int]:
    """The letters of a node's axes that may shrink, and the numbers of these axes."""
    return {x: k for x, k in coupling.letters[node.name].items() if (coupling.axes[k] >= 0).any()}


def _round(size: int) -> int:
    """A multiple of 16 below a width, at most 96, where a few channels count; 16 and less stay."""
    return size if size <= 16 else min(96, (size - 1) // 16 * 16)


def _free(layers: Sequence[tuple[float, NDArray[np.float64], int]], multiple: int) -> bool:
    """Whether layers that lose half of a multiple save less than half of what they would in proportion."""
    lost = multiple // 2
    saved = sum(weight * (1 - shares[BELOW.index(lost)]) for weight, shares, _ in layers)
    return bool(saved < 0.5 * sum(weight * lost / base for weight, _, base in layers))


BELOW = (2, 4, 8)
"""How far below a round width layers are measured."""

ROUNDS, LONG = 7, 1000.0
"""How often each of these widths is measured by turns; on how long a layer, in microseconds."""


def rising(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest array, in least squares, that falls along no axis (isotonic regression): noise does not choose.

    Of several axes by Dykstra's projections (Boyle & Dykstra 1986, doi 10.1007/978-1-4613-9940-7_3), onto each axis by
    turns. What rises along all axes stays as it is.

    >>> rising(np.array([1.0, 4.0, 2.0, 5.0]))
    array([1., 3., 3., 5.])
    """
    if all((np.diff(values, axis=axis) >= 0).all() for axis in range(values.ndim)):
        return values
    from scipy.optimize import isotonic_regression  # slow to import

    result, added = values, [np.zeros_like(values) for _ in values.shape]
    for _ in range(PROJECTIONS):
        before = result
        for axis, shift in enumerate(added):
            moved = result + shift
            result = np.apply_along_axis(lambda line: isotonic_regression(line).x, axis, moved)
            added[axis] = moved - result
        if np.allclose(result, before, rtol=1e-4, atol=0):
            break
    for axis in range(values.ndim):  # what the last few projections would still change
        result = np.maximum.accumulate(result, axis)
    return result


PROJECTIONS = 100
"""How often values are projected onto each axis at most."""


def _interpolate(values: NDArray[np.float64], grids: Sequence[Labels], point: Labels) -> float:
    """From the grid's corner below the point, one axis after the other up, that with the largest fraction first."""
    corner = [max(int(np.searchsorted(grid, x, "right")) - 1, 0) for grid, x in zip(grids, point, strict=True)]
    fractions = [
        (x - grid[k]) / (grid[k + 1] - grid[k]) if k + 1 < len(grid) else 0.0
        for grid, k, x in zip(grids, corner, point.tolist(), strict=True)
    ]
    total = last = float(values[tuple(corner)])
    for axis in sorted(range(len(grids)), key=fractions.__getitem__, reverse=True):
        if fractions[axis] > 0:
            corner[axis] += 1
            here = float(values[tuple(corner)])
            total, last = total + fractions[axis] * (here - last), here
    return total
