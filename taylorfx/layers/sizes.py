"""Sizes that follow from the shapes of a network's inputs: whole numbers that remember their formula.

A captured network holds the numbers of its example, and beside those that another input would change, what they follow
from. A formula is plain data, an operator before its operands, and an axis of an input by the input's name and the
axis' number:

    value   formula                      in words
    16      ("//", "x.2", 2)             half of the height of x, an image of 32 rows
    512     ("*", "x.2", 16)             the positions of a map

A `Size` is an ``int`` like any other, so that a layer, a coupling or a cost sees the numbers of the example. Sums,
products, quotients and remainders of it keep their formula. `at` gives a layer for inputs of other shapes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar

import torch

__all__ = [
    "Axes",
    "Formula",
    "Ratio",
    "Size",
    "at",
    "axes_of",
    "fault",
    "has_sizes",
    "held",
    "numbers",
    "operands",
    "rescaled",
    "shown",
    "value",
]

Formula = int | float | str | tuple[Any, ...]
"""A number, an axis such as ``"x.2"``, or an operator before its operands."""

Axes = Mapping[str, Any]
"""The sizes of axes by name: whole numbers, or torch's symbols while a network is compiled or exported."""

T = TypeVar("T")


def _truncated(a: Any) -> Any:
    return math.trunc(a)


def _either(condition: Any, one: Any, other: Any) -> Any:
    return one if condition else other


OPERATORS: dict[str, Callable[..., Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod,
    "/": operator.truediv, "**": operator.pow, "max": torch.sym_max, "min": torch.sym_min, "float": torch.sym_float,
    "floor": math.floor, "ceil": math.ceil, "trunc": _truncated, "round": round, "abs": abs, "if": _either,
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "and": lambda *terms: all(terms), "or": lambda *terms: any(terms), "not": operator.not_,
}  # fmt: skip
"""The operators of formulas, a closed list; sums and products have two operands or more."""

INFIX = ("+", "-", "*", "//", "%", "/", "**", "==", "!=", "<", "<=", ">", ">=", "and", "or")


def operands(formula: Formula) -> tuple[Formula, ...]:
    """What the operator of a formula works on; nothing where the formula is a number or an axis."""
    return formula[1:] if isinstance(formula, tuple) else ()


def value(formula: Formula, axes: Axes) -> Any:
    """The number that a formula stands for.

    >>> value(("+", ("//", "x.2", 2), 1), {"x.2": 9})
    5

    Raises:
        KeyError: for an axis without a size.
    """
    if isinstance(formula, tuple):
        name, *terms = formula
        function = OPERATORS[name]
        result, *rest = [value(term, axes) for term in terms]
        if len(rest) < 2 or name in ("if", "and", "or"):
            return function(result, *rest)
        for term in rest:
            result = function(result, term)
        return result
    return axes[formula] if isinstance(formula, str) else formula


def axes_of(formula: Formula) -> set[str]:
    """The axes that a formula names.

    >>> sorted(axes_of(("+", ("//", "x.2", 2), "y.1")))
    ['x.2', 'y.1']
    """
    if isinstance(formula, tuple):
        return set().union(*map(axes_of, operands(formula)))
    return {formula} if isinstance(formula, str) else set()


def shown(formula: Formula) -> str:
    """A formula as it is written.

    >>> shown(("+", ("//", ("-", "x.2", 1), 2), 1))
    '(x.2 - 1) // 2 + 1'
    >>> shown(("*", ("+", "x.2", "x.3"), 2))
    '(x.2 + x.3) * 2'
    """
    if not isinstance(formula, tuple):
        return str(formula)
    name, terms = str(formula[0]), formula[1:]
    if name not in INFIX:
        return f"{name}({', '.join(map(shown, terms))})"
    tight = ("*", "//", "%", "/", "**")

    def part(k: int, term: Formula) -> str:
        inner = str(term[0]) if isinstance(term, tuple) else ""
        bare = not inner or inner not in INFIX or (name in ("==", "!=", "<", "<=", ">", ">="))
        bare = bare or (name in ("+", "-") and inner in (*tight, *("+",) * (k == 0 or name == "+")))
        bare = (
            bare
            or (name in ("and", "or") and inner not in ("and", "or"))
            or (name in ("*", "//") and inner == "*" and k == 0)
        )
        return shown(term) if bare else f"({shown(term)})"

    return f" {name} ".join(part(k, term) for k, term in enumerate(terms))


class _Remembering:
    """Arithmetic that keeps the formula."""

    formula: Formula

    def __add__(self, other: Any) -> Any:
        return _result("+", self, other)

    def __radd__(self, other: Any) -> Any:
        return _result("+", other, self)

    def __sub__(self, other: Any) -> Any:
        return _result("-", self, other)

    def __rsub__(self, other: Any) -> Any:
        return _result("-", other, self)

    def __mul__(self, other: Any) -> Any:
        return _result("*", self, other)

    def __rmul__(self, other: Any) -> Any:
        return _result("*", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return _result("//", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _result("//", other, self)

    def __mod__(self, other: Any) -> Any:
        return _result("%", self, other)

    def __rmod__(self, other: Any) -> Any:
        return _result("%", other, self)

    def __truediv__(self, other: Any) -> Any:
        return _result("/", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _result("/", other, self)

    def __neg__(self) -> Any:
        return _result("-", 0, self)


class Size(_Remembering, int):
    """A whole number that follows from the shapes of the inputs.

    >>> height = Size(32, "x.2")
    >>> half = height // 2 + 1
    >>> half, shown(half.formula)
    (17, 'x.2 // 2 + 1')
    """

    def __new__(cls, number: int, formula: Formula) -> Size:
        size = super().__new__(cls, number)
        size.formula = formula
        return size

    def __reduce__(self) -> tuple[object, ...]:
        return Size, (int(self), self.formula)


class Ratio(_Remembering, float):
    """A floating-point number that follows from the shapes of the inputs, such as one divided by an area."""

    def __new__(cls, number: float, formula: Formula) -> Ratio:
        ratio = super().__new__(cls, number)
        ratio.formula = formula
        return ratio

    def __reduce__(self) -> tuple[object, ...]:
        return Ratio, (float(self), self.formula)


def _result(name: str, one: Any, other: Any) -> Any:
    """The result of an operator, with its formula."""
    pair = [x.formula if isinstance(x, _Remembering) else x for x in (one, other)]
    plain = [_plain(x) for x in (one, other)]
    if not all(isinstance(x, (int, float)) for x in plain):
        return NotImplemented
    return _remembered(OPERATORS[name](*plain), (name, *pair))


def _remembered(number: Any, formula: Formula) -> Any:
    """A number that remembers its formula."""
    return Ratio(number, formula) if isinstance(number, float) else Size(number, formula)


def _plain(number: Any) -> Any:
    """The number alone."""
    return int(number) if isinstance(number, Size) else float(number) if isinstance(number, Ratio) else number


def has_sizes(field: object) -> bool:
    """Whether a field of a layer holds a number with a formula.

    >>> has_sizes((3, ("examples", Size(4, "x.1")))), has_sizes((3, 4))
    (True, False)
    """
    if is_dataclass(field):  # a layer that stands in for another
        return has_sizes(tuple(vars(field).values()))
    return any(map(has_sizes, field)) if isinstance(field, tuple) else isinstance(field, _Remembering)


def held(layer: object) -> Iterator[Size | Ratio]:
    """The numbers with a formula that a layer holds."""

    def below(field: object) -> Iterator[Size | Ratio]:
        if isinstance(field, (Size, Ratio)):
            yield field
        for item in field if isinstance(field, tuple) else vars(field).values() if is_dataclass(field) else ():
            yield from below(item)

    yield from below(layer)


def numbers(field: Any) -> Any:
    """A field's numbers without their formulas.

    >>> numbers((3, Size(4, "x.1")))
    (3, 4)
    """
    return tuple(map(numbers, field)) if isinstance(field, tuple) else _plain(field)


def fault(formula: object) -> str:
    """Why this is no formula; empty if it is one.

    >>> fault(("/", "x.1", "y")), fault(("+", "x.1", 2))
    ("an axis is named after an input and by its number, 'x.1'; received 'y'", '')
    """
    if isinstance(formula, tuple) and formula:
        name, *terms = formula
        few, many = _ARITIES.get(name, (2, 64)) if isinstance(name, str) and name in OPERATORS else (0, 0)
        if not few <= len(terms) <= many or not many:
            return f"a formula has one of {', '.join(OPERATORS)} before its operands; received {formula!r:.80}"
        if name == "**" and not (isinstance(terms[1], (int, float)) and abs(terms[1]) <= _POWER):
            return f"powers are numbers of at most {_POWER}; received {terms[1]!r:.80}"
        return next(filter(None, map(fault, terms)), "")
    if isinstance(formula, str):
        name, _, axis = formula.rpartition(".")
        return (
            ""
            if name and axis.isdecimal()
            else f"an axis is named after an input and by its number, 'x.1'; received {formula!r:.80}"
        )
    plain = isinstance(formula, (int, float)) and not isinstance(formula, bool)
    return (
        "" if plain else f"a formula is a number, an axis, or an operator before its operands; received {formula!r:.80}"
    )


_ARITIES = {"if": (3, 3), "float": (1, 1), "floor": (1, 1), "ceil": (1, 1), "trunc": (1, 1), "round": (1, 2),
    "abs": (1, 1), "not": (1, 1), "-": (2, 2), "//": (2, 2), "%": (2, 2), "/": (2, 2), "**": (2, 2),
}  # fmt: skip
"""The least and the most operands of an operator, where it is not two or more."""

_POWER = 16


def at(layer: T, axes: Axes, *, plain: bool = False) -> T:
    """A layer whose numbers are those for inputs of these shapes.

    Nothing is checked again: what follows from the shapes may be a symbol of torch's.

    Args:
        plain: hold the numbers alone, without their formulas.
    """

    def fitted(field: Any) -> Any:
        if isinstance(field, tuple):
            return tuple([fitted(item) for item in field])
        if is_dataclass(field):
            return at(field, axes, plain=plain)
        if not isinstance(field, _Remembering):
            return field
        number = value(field.formula, axes)
        return number if plain else _remembered(number, field.formula)

    new = object.__new__(type(layer))
    new.__dict__.update({name: fitted(field) for name, field in layer.__dict__.items()})
    return new


def rescaled(old: int, new: int) -> int:
    """The size of an axis after positions have left that do not depend on the inputs: its formula in proportion.

    >>> size = Size(512, ("*", 32, "x.2"))
    >>> rescaled(size, 384).formula
    ('//', ('*', ('*', 32, 'x.2'), 384), 512)
    >>> rescaled(size, 512) is size
    True
    """
    if new == old or not isinstance(old, Size):
        return old if new == old else new
    formula, whole = old.formula, int(old)
    match formula:
        case ("//", ("*", inner, int() as times), int() as parts) if times == whole:
            formula, whole = inner, parts  # a size that was in proportion before still is
    return Size(new, ("//", ("*", formula, int(new)), whole))
