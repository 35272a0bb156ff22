"""Sizes of a captured graph: its symbols become the example's numbers, each with the formula that it follows from.

The export leaves every size open that the module leaves open. The graph's symbols are those of the inputs' axes, and
whatever else has a size is an expression of them:

    x: (N, 3, h, w)          the symbols of an input's axes, with the sizes of the example
    h > 16, h % 8 == 0       what the module itself asked about them while it ran (guards)
    view(x, N, 3, h * w)     a size among an operator's arguments

While the graph is read, a size is an `Open`: the example's number that equals another one only if both are the same
expression. So no rule is chosen by what two numbers happen to be. In the network it is a `taylorfx.layers.sizes.Size`,
whose formula names axes of inputs. Which sizes the network takes follows from the guards, and is proven: the shapes of
all values are what the graph says, tried at other sizes.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import sympy
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import Argument
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from taylorfx.interop.capture.formulas import Unwritten, floor_div, formula_of
from taylorfx.interop.capture.guards import in_steps, lines_of, of_values, predicate
from taylorfx.interop.capture.symbols import SYMBOLIC, Open, OpenRatio, Symbolic, opened
from taylorfx.interop.capture.symbols import expression as size_expression
from taylorfx.layers import Layer, Shape
from taylorfx.layers.sizes import Formula, Ratio, Size

__all__ = ["Range", "Sizes"]

Range = tuple[int, int | None, int]
"""The sizes of an axis: the least, the greatest (none: no bound), and the step between them."""

Shapes = Callable[[Mapping[str, Shape]], Mapping[str, Shape]]
"""The shapes that a network gives the values of a graph, for inputs of these shapes."""

L = TypeVar("L", bound=Layer)

_SCANNED = 1024
"""Up to which size an axis' guards are tried one by one."""

_TRIES = 64
"""How many other sizes are considered for a proof; two are tried."""

_PROVEN = 60
"""The longest guard that is proven to say the same at all sizes, in operations; longer ones are kept."""


class Sizes:
    """The symbols of a graph's sizes. Made before the graph is read, it settles the graph: numbers for symbols.

    Every value of the graph then has its ``shape`` for one example and the ``axis`` of the examples in its ``meta``.
    """

    def __init__(self, program: ExportedProgram, inputs: Sequence[fx.Node]) -> None:
        values = [node.meta["val"] for node in inputs]
        self.axes = {node.name: [size_expression(n) for n in node.meta["val"].shape[1:]] for node in inputs}
        self.examples = {s for x in values for s in _symbols(x.shape[:1])}
        self.shapes: dict[str, tuple[sympy.Expr, ...]] = {}
        """For every value of the graph, its shape in symbols."""
        self.fixed: set[sympy.Symbol] = set()
        """Symbols of which the network holds the number."""
        self.numbers: dict[sympy.Symbol, sympy.Integer] = {}
        envs = (n.node.shape_env for x in values for n in x.shape if isinstance(n, torch.SymInt))
        env = next(envs, None)
        self.env = ShapeEnv() if env is None else env
        if env is not None:
            known = getattr(self.env, "backed_var_to_val", None) or self.env.var_to_val
            self.numbers = {s: sympy.Integer(int(n)) for s, n in known.items() if s not in self.examples}
        self.named = self._named()
        self._settle(program)

    def _named(self) -> dict[sympy.Symbol, tuple[str, int, sympy.Expr]]:
        """For every symbol the input's axis that says its size: ``(name, axis, the symbol's value in that size)``.

        Where an axis has the size ``2 s + 1``, the symbol is half of one less than its size.
        """
        named: dict[sympy.Symbol, tuple[str, int, sympy.Expr]] = {}
        for whole in (True, False):  # an axis that is the symbol itself says it best
            for name, expressions in self.axes.items():
                for k, expression in enumerate(expressions, 1):
                    symbols = expression.free_symbols
                    if len(symbols) != 1 or (expression in symbols) != whole:
                        continue
                    (symbol,) = symbols
                    size = sympy.Symbol("size")
                    factor, rest = expression.coeff(symbol, 1), expression.coeff(symbol, 0)
                    if sympy.expand(factor * symbol + rest - expression) == 0 and factor.is_Integer:
                        inverse = size if whole else floor_div(size - rest, factor)
                        named.setdefault(symbol, (name, k, inverse))
        return named

    def formula(self, expression: sympy.Expr, names: Mapping[str, str]) -> Formula:
        """An expression as a formula of the inputs' axes; ``names`` are those of the nodes of the inputs.

        Raises:
            Unwritten: if it cannot be one.
        """
        symbols: dict[sympy.Symbol, Formula] = {}
        for symbol, (name, axis, inverse) in self.named.items():
            symbols[symbol] = formula_of(inverse, {sympy.Symbol("size"): f"{names[name]}.{axis}"})
        return formula_of(expression, symbols)

    def _settle(self, program: ExportedProgram) -> None:
        """Write the example's numbers into the graph; only the number of examples stays a symbol."""
        nodes = list(program.graph.nodes)
        for node in nodes:
            held = node.meta.get("val")
            if isinstance(held, Tensor):
                self.shapes[node.name] = tuple(map(size_expression, held.shape))
            if node.op == "call_function" and isinstance(held, (Tensor, tuple, list)):
                node.args, node.kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._argument)
        for node in nodes:
            if "val" in node.meta:
                node.meta["measured"] = self._measured(node.meta["val"])
                node.meta["val"] = self._settled(node.meta["val"])

    def _measured(self, held: object) -> object:
        """The shape of a tensor for one example and the axis of the examples; of several tensors a list of them.

        A size is measured as the tensor of one axis of this size.

        ``(4 * s0, 3)`` has the shape ``(4, 3)`` and axis 0 where ``s0`` is the number of examples. It is None where the
        examples cannot be told from other positions.
        """
        if isinstance(held, (list, tuple)):
            return list(map(self._measured, held))
        if not isinstance(held, (Tensor, torch.SymInt)):
            return None
        shape: list[int] = []
        axis = -1
        for k, size in enumerate(held.shape if isinstance(held, Tensor) else [held]):
            expression = size_expression(size)
            if symbols := expression.free_symbols & self.examples:
                expression = _quotient(expression, symbols)
                if axis >= 0 or expression.free_symbols & self.examples:
                    return None
                axis = k
            number = self._at_example(expression)
            if number is None:
                return None
            shape.append(number)
        return tuple(shape), axis

    def _at_example(self, expression: sympy.Expr) -> int | None:
        """A size in the example's numbers."""
        number = expression.xreplace(self.numbers)
        return opened(int(number), expression) if number.is_Integer else None

    def _argument(self, node: fx.Node) -> Argument:
        """The number in the place of a size."""
        size = node.meta.get("val")
        if not isinstance(size, SYMBOLIC):
            return node
        number = self._number(size)
        if isinstance(number, SYMBOLIC):
            return node
        expression = size_expression(size)
        if not expression.free_symbols:
            return number
        if isinstance(number, bool) or not self._is_named(expression):
            self.fixed |= expression.free_symbols - self.examples
            return number
        return Open(number, expression) if isinstance(number, int) else OpenRatio(number, expression)

    def _is_named(self, expression: sympy.Expr) -> bool:
        """Whether an expression has a formula."""
        try:
            self.formula(expression, {name: name for name in self.axes})
        except Unwritten:
            return False
        return True

    def _settled(self, held: object) -> object:
        """A value of the graph with the example's numbers for symbols; tuples and lists entry by entry."""
        if isinstance(held, SYMBOLIC):
            return self._number(held)
        if isinstance(held, Tensor):
            shape = list(held.shape)
            sizes = [self._number(n) if isinstance(n, torch.SymInt) else n for n in shape]
            return held if all(a is b for a, b in zip(sizes, shape, strict=True)) else held.new_empty(sizes)
        return type(held)(map(self._settled, held)) if isinstance(held, (list, tuple)) else held

    def _number(self, size: Symbolic) -> Symbolic | int | float | bool:
        """A size in numbers, unless the number of examples is a factor of it: ``4 * s0``."""
        expression = size_expression(size).xreplace(self.numbers)
        if not expression.free_symbols:
            number: int | float | bool = size.node.pytype(expression)
            return number
        if expression == size_expression(size):
            return size
        return self.env.create_symintnode(expression, hint=size.node.hint)

    def layer(self, layer: L, names: Mapping[str, str]) -> L:
        """A layer that was read, with sizes of the network in place of those of the graph."""

        def held(field: Any) -> Any:
            if isinstance(field, tuple):
                return tuple([held(item) for item in field])
            if not isinstance(field, (Open, OpenRatio)):
                return field
            try:
                formula = self.formula(field.expr, names)
            except Unwritten:
                self.fixed |= field.expr.free_symbols
                return int(field) if isinstance(field, Open) else float(field)
            return Size(int(field), formula) if isinstance(field, Open) else Ratio(float(field), formula)

        fields = {name: held(field) for name, field in vars(layer).items()}
        if all(fields[name] is field for name, field in vars(layer).items()):
            return layer
        new = object.__new__(type(layer))
        new.__dict__.update(fields)
        return new

    def taken(
        self, shapes: Shapes, names: Mapping[str, str]
    ) -> tuple[dict[str, tuple[Range, ...]], tuple[Formula, ...]]:
        """The sizes that every axis of every input takes, but for axis 0, and the conditions on several of them.

        Args:
            shapes: the shapes that the network gives the graph's values, for inputs of these shapes.
            names: those of the nodes of the inputs.
        """
        axes = list(itertools.chain(*self.axes.values()))
        chosen = {s for s in self.named if s in self.numbers} - self.fixed
        for expression in axes:  # an axis of several symbols: the parts cannot be told from its size
            if len(expression.free_symbols) > 1:
                chosen -= expression.free_symbols
        guards = [self._replaced(guard.expr) for guard in self.env.guards if of_values(guard)] if chosen else []
        free: dict[sympy.Symbol, Range] = {}
        kept: list[sympy.Basic] = []
        for s in chosen:
            free[s], more = self._range(s, [g for g in dict.fromkeys(guards) if g.free_symbols == {s}])
            kept += more
        for guard in dict.fromkeys(guards):
            if guard in kept or self._proven(guard, free):
                continue
            if not self._is_named(guard):
                free = {s: sizes for s, sizes in free.items() if s not in guard.free_symbols}
            else:
                kept.append(guard)
        for alone in ({s} for s in tuple(free)):
            if not self._fits(shapes, alone, free, kept):
                free = {s: sizes for s, sizes in free.items() if s not in alone}
        if not self._fits(shapes, set(free), free, kept):
            free = {}
        ranges = {name: tuple(self._axis(x, free) for x in found) for name, found in self.axes.items()}
        formulas = [self.formula(guard, names) for guard in kept if guard.free_symbols & free.keys()]
        return ranges, (*self._shared(free, names), *formulas)

    def causes(self) -> dict[str, tuple[str, ...]]:
        """For every axis of every input, but for axis 0, the line that holds it at one size, where torch knows it."""
        lines = lines_of(self.env)
        held: dict[tuple[str, int], str] = {}
        for symbol, sources in self.env.var_to_sources.items():
            for source in sources if symbol in lines else ():
                if axis := _AXIS.fullmatch(source.name):
                    held[axis["name"], int(axis["axis"])] = lines[symbol]
        return {
            name: tuple(held.get((name, k), "") for k in range(1, len(found) + 1)) for name, found in self.axes.items()
        }

    def _replaced(self, guard: sympy.Basic) -> sympy.Basic:
        """A guard in the symbols that are left, without the number of examples, as far as it says the same for all.

        Of ``s0 a == s0 b`` the number of examples s0 is no part. In other guards, ``1 < s0 a``, it is the least.
        """
        while (new := guard.xreplace(self.env.replacements)) != guard:
            guard = new
        for symbol in guard.free_symbols & self.examples:
            if isinstance(guard, sympy.core.relational.Relational):
                sides = [sympy.cancel(side / symbol) for side in guard.args]
                if not any(side.has(symbol) for side in sides):
                    guard = guard.func(*sides)
            guard = guard.xreplace({symbol: sympy.Integer(int(self.env.var_to_range[symbol].lower))})
        return guard

    def _axis(self, expression: sympy.Expr, free: Mapping[sympy.Symbol, Range]) -> Range:
        """The sizes of an axis of this expression."""
        here = int(expression.xreplace(self.numbers))
        (symbol, *more) = expression.free_symbols or [None]
        if more or symbol not in free:
            return here, here, 1
        least, most, step = free[symbol]

        def at(size: int) -> int:
            return int(expression.xreplace({symbol: sympy.Integer(size)}))

        return at(least), None if most is None else at(most), at(least + step) - at(least)

    def _shared(self, free: Mapping[sympy.Symbol, Range], names: Mapping[str, str]) -> list[Formula]:
        """The conditions that axes of one symbol are as long as that symbol says."""
        conditions: list[Formula] = []
        for name, expressions in self.axes.items():
            for k, expression in enumerate(expressions, 1):
                if expression.free_symbols & free.keys():
                    axis, formula = f"{names[name]}.{k}", self.formula(expression, names)
                    if formula != axis and not self._says(name, k):
                        conditions.append(("==", axis, formula))
        return conditions

    def _says(self, name: str, axis: int) -> bool:
        """Whether a symbol's size is read from this axis."""
        return any((name, axis) == place[:2] for place in self.named.values())

    def _range(self, symbol: sympy.Symbol, guards: Sequence[sympy.Basic]) -> tuple[Range, list[sympy.Basic]]:
        """The sizes that guards on one symbol leave, in equal steps, and the guards that no such range says.

        h > 16 and h % 8 == 0       24 or more in steps of 8
        h != 30                     no range: a single size is left out
        """
        bounds, here = self.env.var_to_range[symbol], int(self.numbers[symbol])
        least = max(int(bounds.lower), 2, here - _SCANNED)
        most = None if bounds.upper in (int_oo, sympy.oo) else int(bounds.upper)
        tried = range(least, min(here + _SCANNED, most or here + _SCANNED) + 1)
        taken, said, kept = [*tried], list[Callable[[int], bool]](), list[sympy.Basic]()
        for guard in guards:
            holds = predicate(symbol, guard)
            left = [n for n in taken if holds(n)]
            if in_steps(left):
                taken = left
                said.append(holds)
            else:
                kept.append(guard)
        step = taken[1] - taken[0] if len(taken) > 1 else 1
        open_ended = most is None and taken[-1] + step > tried[-1]
        far = [here + step * 2**k for k in range(10, 24)]
        if open_ended and not all(holds(n) for holds in said for n in far):
            open_ended = False
        return (taken[0], None if open_ended else taken[-1], step), kept

    def _proven(self, guard: sympy.Basic, free: Mapping[sympy.Symbol, Range]) -> bool:
        """A guard on several sizes says the same at all that they may be."""
        several = guard.free_symbols & free.keys()
        if guard.count_ops() > _PROVEN:
            return not several
        if not several or (guard.free_symbols == several and len(several) == 1):
            return True
        ranges = {s: ValueRanges(a, int_oo if b is None else b) for s, (a, b, _) in free.items()}
        ranges |= {s: ValueRanges(n, n) for s, n in self.numbers.items() if s not in free}
        if isinstance(guard, sympy.Ne):  # a b != a: no factor of the difference is zero
            factors = sympy.factor_list(guard.lhs - guard.rhs)[1]
            return all(0 not in bound_sympy(factor, ranges) for factor, _ in factors)
        truth = bound_sympy(guard, ranges)
        return bool(truth.is_singleton() and truth.lower == sympy.true)

    def _fits(
        self, shapes: Shapes, chosen: set[sympy.Symbol], free: Mapping[sympy.Symbol, Range], guards: list[sympy.Basic]
    ) -> bool:
        """At other sizes, the network's shapes are the graph's."""
        tried = 0
        for rank, apart in itertools.product(range(1, _TRIES), (False, True)) if chosen else ():
            sizes = {**self.numbers, **dict.fromkeys(self.examples, sympy.Integer(1))}
            for k, s in enumerate(sorted(chosen, key=str)):
                least, most, step = free[s]
                # 65 and 66, 66 and 67, ...; and, of sizes that have to be multiples of 16, 80 and 96
                other = self.numbers[s] + step * (rank * (k + 1) if apart else rank + k)
                sizes[s] = sympy.Integer(
                    other if most is None or other <= most else max(least, most - step * (rank - 1))
                )
            if not all(guard.xreplace(sizes) == sympy.true for guard in guards):
                continue
            wanted = {name: tuple(int(n.xreplace(sizes)) for n in shape) for name, shape in self.shapes.items()}
            try:
                inferred = shapes({name: wanted[name][1:] for name in self.axes})
            except ValueError:
                return False
            if any(inferred.get(name, shape) != shape for name, shape in wanted.items()):
                return False
            tried += 1
            if tried == 2:
                break
        return tried > 0 or not chosen


_AXIS = re.compile(r"L\['(?P<name>\w+)'\]\.size\(\)\[(?P<axis>\d+)\]")
"""What torch calls an axis of an argument."""


def _quotient(expression: sympy.Expr, symbols: Iterable[sympy.Symbol]) -> sympy.Expr:
    """What a size is for one example, where the number of examples is a factor of it."""
    divisor = math.prod(symbols)
    quotient = expression / divisor
    return sympy.simplify(quotient) if quotient.free_symbols & divisor.free_symbols else quotient


def _symbols(values: Iterable[object]) -> set[sympy.Symbol]:
    return {s for value in values for s in size_expression(value).free_symbols}
