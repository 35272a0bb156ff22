"""Sizes of a captured graph: its own symbols become the example's numbers, and which other sizes it takes is proven.

The export leaves every size open that the module leaves open. The network that is made of the graph holds numbers,
those of the example, and the graph's symbols say where another size would change them:

    x: (N, 3, h, w)      the symbols of an input's axes, with the sizes of the example
    h > 16, h % 8 == 0   what the module itself asked about them while it ran (guards)
    x / (h * w)          a size among an operator's arguments: the network holds its number, so that h and w are fixed

What no argument holds may differ if the shapes of all values are what the graph says, tried at other sizes.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

import sympy
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import Argument
from torch.overrides import TorchFunctionMode
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from taylorfx.layers import Shape

__all__ = ["Plain", "Range", "Sizes"]

Range = tuple[int, int | None, int]
"""The sizes of an axis: the least, the greatest (none: no bound), and the step between them."""

Shapes = Callable[[Mapping[str, Shape]], Mapping[str, Shape]]
"""The shapes that a network gives the values of a graph, for inputs of these shapes."""

_OPERATIONS = 10
"""The longest size that is followed, in operations."""

_SCANNED = 1024
"""Up to which size an axis' guards are tried one by one."""


class Plain(TorchFunctionMode):
    """Ends an export in which sizes become long expressions: torch then reasons for minutes about each of them.

    Raises:
        OverflowError: within the export.
    """

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = function(*args, **(kwargs or {}))
        for n in result.shape if isinstance(result, Tensor) else ():
            if isinstance(n, torch.SymInt) and n.node.expr.count_ops() > _OPERATIONS:
                raise OverflowError(f"a size of {n}")
        return result


class Sizes:
    """The symbols of a graph's sizes. Made before the graph is read, it settles the graph: numbers for symbols."""

    def __init__(self, program: ExportedProgram, inputs: Sequence[fx.Node]) -> None:
        values = [node.meta["val"] for node in inputs]
        self.axes = {node.name: [_expression(n) for n in node.meta["val"].shape[1:]] for node in inputs}
        self.examples = {s for x in values for s in _symbols(x.shape[:1])}
        self.shapes: dict[str, tuple[sympy.Expr, ...]] = {}
        """For every value of the graph, its shape in symbols."""
        self.fixed: set[sympy.Symbol] = set()
        """Symbols that an argument holds the number of."""
        self.numbers: dict[sympy.Symbol, sympy.Integer] = {}
        envs = (n.node.shape_env for x in values for n in x.shape if isinstance(n, torch.SymInt))
        env = next(envs, None)
        self.env = ShapeEnv() if env is None else env
        if env is not None:
            known = getattr(self.env, "backed_var_to_val", None) or self.env.var_to_val
            self.numbers = {s: sympy.Integer(int(n)) for s, n in known.items() if s not in self.examples}
            self._settle(program)

    def _settle(self, program: ExportedProgram) -> None:
        """Write the example's numbers into the graph; only the number of examples stays a symbol."""
        nodes = list(program.graph.nodes)
        for node in nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                self.shapes[node.name] = tuple(map(_expression, value.shape))
            if node.op == "call_function" and isinstance(value, (Tensor, tuple, list)):
                node.args, node.kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._argument)
        for node in nodes:
            if "val" in node.meta:
                node.meta["val"] = self._settled(node.meta["val"])

    def _argument(self, node: fx.Node) -> Argument:
        """The number in the place of a size, whose symbols are then fixed."""
        size = node.meta.get("val")
        if not isinstance(size, _SYMBOLIC):
            return node
        self.fixed |= _symbols([size]) - self.examples
        number = self._number(size)
        return node if isinstance(number, _SYMBOLIC) else number

    def _settled(self, value: object) -> object:
        """A value of the graph with the example's numbers for symbols; tuples and lists entry by entry."""
        if isinstance(value, _SYMBOLIC):
            return self._number(value)
        if isinstance(value, Tensor):
            shape = list(value.shape)
            sizes = [self._number(n) if isinstance(n, torch.SymInt) else n for n in shape]
            return value if all(map(operator.is_, sizes, shape)) else value.new_empty(sizes)
        return type(value)(map(self._settled, value)) if isinstance(value, (list, tuple)) else value

    def _number(self, size: _Symbolic) -> _Symbolic | int | float | bool:
        """A size in numbers, unless it is written with the symbol of the number of examples alone: ``4 * s0``."""
        symbols = _symbols([size])
        if symbols and symbols <= self.examples:
            return size
        expression = _expression(size).xreplace(self.numbers)
        if expression.free_symbols:
            return self.env.create_symintnode(expression, hint=size.node.hint)
        number: int | float | bool = size.node.pytype(expression)
        return number

    def ranges(self, shapes: Shapes) -> dict[str, tuple[Range, ...]]:
        """The sizes that every axis of every input takes, but for axis 0.

        Args:
            shapes: the shapes that the network gives the graph's values, for inputs of these shapes.
        """
        axes = list(itertools.chain(*self.axes.values()))
        # An axis whose symbol stands in no other; others are equal, or parts of each other.
        single = {x for x in axes if x in self.numbers and axes.count(x) == 1}
        single -= self.fixed | {s for x in axes if x not in self.numbers for s in _symbols([x])}
        guards = [guard.expr.xreplace(self.env.replacements) for guard in self.env.guards] if single else []
        free = {s: self._range(s, [g for g in guards if g.free_symbols == {s}]) for s in single}
        for guard in guards:
            if not self._proven(guard, free):
                free = {s: sizes for s, sizes in free.items() if s not in guard.free_symbols}
        for chosen in ({s} for s in tuple(free)):
            if not self._fits(shapes, chosen, free):
                free = {s: sizes for s, sizes in free.items() if s not in chosen}
        if not self._fits(shapes, set(free), free):
            free = {}
        held = {x: (n, n, 1) for x in axes for n in [int(x.xreplace(self.numbers))]}
        return {name: tuple({**held, **free}[x] for x in expressions) for name, expressions in self.axes.items()}

    def _range(self, symbol: sympy.Symbol, guards: Sequence[sympy.Basic]) -> Range:
        """All sizes around the example's, in equal steps, of which the guards say what they say of the example's."""
        bounds, here = self.env.var_to_range[symbol], int(self.numbers[symbol])
        source = " and ".join(f"({PythonPrinter().doprint(guard)})" for guard in guards) or "True"
        told = eval(f"lambda {symbol}: {source}", {"math": math, "torch": torch})
        least = max(int(bounds.lower), here - _SCANNED)
        most = None if bounds.upper in (int_oo, sympy.oo) else int(bounds.upper)
        last = here + _SCANNED if most is None else min(most, here + _SCANNED)
        step = next((d for d in range(1, _SCANNED) if here + d <= last and told(here + d)), 0)
        step = step or next((d for d in range(1, _SCANNED) if here - d >= least and told(here - d)), 0)
        if not step:
            return here, here, 1
        down = sum(1 for _ in itertools.takewhile(told, range(here - step, least - 1, -step)))
        up = sum(1 for _ in itertools.takewhile(told, range(here + step, last + 1, step)))
        beyond = most is None and here + (up + 1) * step > last
        if beyond and not all(told(here + step * 2**k) for k in range(10, 24)):
            beyond = False
        return here - down * step, None if beyond else here + up * step, step

    def _proven(self, guard: sympy.Basic, free: Mapping[sympy.Symbol, Range]) -> bool:
        """A guard on several sizes says the same at all that they may be."""
        several = guard.free_symbols & free.keys()
        if not several or (guard.free_symbols == several and len(several) == 1):
            return True
        ranges = {s: ValueRanges(a, int_oo if b is None else b) for s, (a, b, _) in free.items()}
        ranges |= {s: ValueRanges(n, n) for s, n in self.numbers.items() if s not in free}
        ranges |= {s: self.env.var_to_range[s] for s in self.examples}
        truth = bound_sympy(guard, ranges)
        return bool(truth.is_singleton() and truth.lower == sympy.true)

    def _fits(self, shapes: Shapes, chosen: set[sympy.Symbol], free: Mapping[sympy.Symbol, Range]) -> bool:
        """At other sizes, the network's shapes are the graph's."""
        if not chosen:
            return True
        for rank in (1, 3):
            sizes = dict(self.numbers)
            for k, s in enumerate(sorted(chosen, key=str)):
                least, most, step = free[s]
                other = sizes[s] + step * (rank + k)
                sizes[s] = sympy.Integer(other) if most is None or other <= most else sympy.Integer(least)
            sizes |= dict.fromkeys(self.examples, sympy.Integer(1))
            wanted = {name: tuple(int(n.xreplace(sizes)) for n in shape) for name, shape in self.shapes.items()}
            try:
                inferred = shapes({name: wanted[name][1:] for name in self.axes})
            except ValueError:
                return False
            if any(inferred.get(name, shape) != shape for name, shape in wanted.items()):
                return False
        return True


_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_Symbolic = torch.SymInt | torch.SymFloat | torch.SymBool


def _expression(value: object) -> sympy.Expr:
    """A size in sympy."""
    return value.node.expr if isinstance(value, _SYMBOLIC) else sympy.sympify(value)


def _symbols(values: Iterable[object]) -> set[sympy.Symbol]:
    return {s for value in values for s in _expression(value).free_symbols}
