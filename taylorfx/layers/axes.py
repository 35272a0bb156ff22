"""The axis-signature language: a layer states its axes once.

A signature names the axes of a layer's inputs, parameters and output, in the spirit of einops::

    B (g i) H W, weight: (g o) i K L, bias: (g o) -> B (g o) P Q

- a name in lower case is an axis that may shrink; one in upper case is rigid;
- ``(g i)`` is one axis laid out as the product of two, the last one running fastest;
- ``a + b`` is one axis laid out as one piece after the other;
- ``...`` stands for any number of axes that pass through, the same ones wherever it appears in one signature;
- ``1`` is an axis of size one.

A lower-case axis of an input that the output does not have is *contracted*: the layer mixes along it, and activations
are *read* there. A lower-case axis of the output that no input has is *written*.

Shapes, coupling, cutting, resizing and counting all follow from signatures, so that they cannot disagree.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

__all__ = ["Axis", "Pattern", "Signature", "SignatureError", "expand", "letters", "parse", "products", "size", "solve"]

Product = tuple[str, ...]
"""The letters of one product, slowest first; ``("g", "i")`` for ``(g i)``, ``("c",)`` for ``c``, ``()`` for ``1``."""

Axis = tuple[Product, ...]
"""One axis: the products that are laid end to end (nearly always a single one)."""


class Pattern(tuple[Axis, ...]):
    """The axes of one tensor, as `pattern` reads them."""

    @cached_property
    def singles(self) -> tuple[str | None, ...]:
        """For every axis its letter, none where it is not a single one.

        >>> pattern("B (c H) a + b 1").singles
        ('B', None, None, None)
        """
        return tuple(axis[0][0] if len(axis) == 1 == len(axis[0]) else None for axis in self)


Place = tuple[int, int, Product]
"""Where a product of letters stands: the number of the input (-1 for the output), the axis, and the product."""

ELLIPSIS: Axis = (("...",),)

_TOKEN = re.compile(r"\.\.\.|[A-Za-z_][A-Za-z_0-9]*|[()+1]")


class SignatureError(ValueError):
    """Text that is not a signature, or a signature that does not fit the sizes or the inputs of a layer."""


@dataclass(frozen=True)
class Signature:
    """A parsed signature: the patterns of the inputs, of the parameters by their names, and of the output."""

    inputs: tuple[Pattern, ...]
    parameters: Mapping[str, Pattern]
    output: Pattern

    @cached_property
    def reads(self) -> tuple[tuple[str, ...], ...]:
        """For every input the letters along which it is read: the output does not have them, nor does an earlier input.

        Of two inputs that are contracted with each other the first is read:

        >>> parse("B i k, B k j -> B i j").reads
        (('k',), ())
        """
        seen = {*letters(self.output)}
        reads: list[tuple[str, ...]] = []
        for pattern in self.inputs:
            # A piece of a joined axis that the output lacks is dropped, not mixed.
            whole = Pattern(axis for axis in pattern if len(axis) == 1)
            reads.append(tuple(dict.fromkeys(x for x in letters(whole) if x.islower() and x not in seen)))
            seen.update(letters(pattern))
        return tuple(reads)

    @cached_property
    def written(self) -> tuple[str, ...]:
        """The letters of the output that no input has: the layer creates these axes.

        >>> parse("B ... i, weight: o i -> B ... o").written
        ('o',)
        """
        inputs = {letter for pattern in self.inputs for letter in letters(pattern)}
        return tuple(dict.fromkeys(x for x in letters(self.output) if x.islower() and x not in inputs))

    @cached_property
    def read_places(self) -> tuple[Place, ...]:
        """Where the letters stand along which inputs are read.

        >>> parse("B (g i) H W, weight: (g o) i K L -> B (g o) P Q").read_places
        ((0, 1, ('g', 'i')),)
        """
        places = (
            _places(k, pattern, read) for k, (pattern, read) in enumerate(zip(self.inputs, self.reads, strict=True))
        )
        return tuple(itertools.chain.from_iterable(places))

    @cached_property
    def written_places(self) -> tuple[Place, ...]:
        """Where the letters stand that are written."""
        return tuple(_places(-1, self.output, self.written))


def _places(slot: int, axes: Pattern, wanted: Sequence[str]) -> Iterator[Place]:
    """The places in one pattern that have a wanted letter. An axis of several pieces is no place."""
    for k, axis in enumerate(axes):
        if len(axis) == 1 and not {*wanted}.isdisjoint(axis[0]):
            yield slot, k, axis[0]


@lru_cache(maxsize=4096)
def parse(text: str) -> Signature:
    """Read a signature.

    >>> parse("B ... i, weight: o i -> B ... o").reads
    (('i',),)
    >>> parse("B (g c) H W -> B (c g) H W").output[1]
    (('c', 'g'),)

    Raises:
        SignatureError: if the text is not a signature.
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise SignatureError(f"A signature has the form 'inputs, name: parameter -> output'; received {text!r}.")
    inputs: list[Pattern] = []
    parameters: dict[str, Pattern] = {}
    for part in left.split(",") if left.strip() else []:
        name, colon, axes = part.partition(":")
        if colon:
            parameters[name.strip()] = pattern(axes)
        else:
            inputs.append(pattern(part))
    return Signature(tuple(inputs), parameters, pattern(right))


@lru_cache(maxsize=4096)
def pattern(text: str) -> Pattern:
    """Read the axes of one tensor.

    >>> pattern("B (c H) a + b 1")
    ((('B',),), (('c', 'H'),), (('a',), ('b',)), ((),))
    """
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != "".join(text.split()):
        raise SignatureError(f"Axes are names, '(a b)', 'a + b', '1' and '...'; received {text!r}.")
    axes: list[Axis] = []
    stream = iter(tokens)
    joined = False
    for token in stream:
        if token == "+":
            joined = True
            continue
        product = _group(stream, text) if token == "(" else () if token == "1" else (token,)
        if joined:
            axes[-1] = (*axes[-1], product)
        else:
            axes.append((product,))
        joined = False
    return Pattern(axes)


def _group(stream: Iterator[str], text: str) -> Product:
    """The names up to the parenthesis that closes a product."""
    names: list[str] = []
    for token in stream:
        if token == ")":
            return tuple(names)
        if token in "(+":
            raise SignatureError(f"A product holds names only; received {text!r}.")
        if token != "1":
            names.append(token)
    raise SignatureError(f"A parenthesis is not closed in {text!r}.")


def letters(axes: Pattern) -> tuple[str, ...]:
    """Every name in a pattern, in order, each as often as it stands there.

    >>> letters(pattern("B (c H) c + d"))
    ('B', 'c', 'H', 'c', 'd')
    """
    return tuple(name for axis in axes for product in axis for name in product)


@lru_cache(maxsize=4096)
def expand(signature: Signature | str, ranks: tuple[int, ...]) -> Signature:
    """Replace ``...`` by as many names as the inputs' ranks leave for it.

    >>> expand("B c ... -> B (c ...)", (4,)).output
    ((('B',),), (('c', '_0', '_1'),))

    Raises:
        SignatureError: if the inputs are too many, too few, or of a rank that the signature does not allow.
    """
    if isinstance(signature, str):
        signature = parse(signature)
    if not signature.inputs and ranks == (0,):  # a scalar has no axis to name
        signature = replace(signature, inputs=(Pattern(),))
    if len(ranks) != len(signature.inputs):
        raise SignatureError(f"takes {len(signature.inputs)} inputs; received {len(ranks)}")
    width: int | None = None
    for axes, rank in zip(signature.inputs, ranks, strict=True):
        spare = rank - len(axes) + (ELLIPSIS in axes)
        if spare < 0 or (ELLIPSIS not in axes and spare):
            raise SignatureError(f"takes an input with the axes '{show(axes)}'; received one of {rank} axes")
        if ELLIPSIS in axes:
            width = spare if width is None else width
            if width != spare:
                raise SignatureError("takes inputs whose '...' agree; received different numbers of axes")
    names = tuple(f"_{k}" for k in range(width or 0))

    def named(axes: Pattern) -> Pattern:
        result: list[Axis] = []
        for axis in axes:
            if axis == ELLIPSIS:
                result.extend(((name,),) for name in names)
            else:
                result.append(
                    tuple(tuple(n for x in product for n in (names if x == "..." else (x,))) for product in axis)
                )
        return Pattern(result)

    return Signature(
        tuple(map(named, signature.inputs)),
        {name: named(axes) for name, axes in signature.parameters.items()},
        named(signature.output),
    )


def size(axis: Axis, sizes: Mapping[str, int]) -> int:
    """The length of an axis, from the sizes of its letters.

    >>> size((("g", "i"), ("o",)), {"g": 2, "i": 3, "o": 4})
    10
    """
    if len(axis) == 1 == len(axis[0]):
        return sizes[axis[0][0]]
    total = 0
    for product in axis:
        length = 1
        for name in product:
            length *= sizes[name]
        total += length
    return total


def solve(fields: Mapping[str, str], values: Mapping[str, int | Sequence[int]]) -> Mapping[str, int]:
    """The sizes of the letters, from the values of a layer's fields.

    A field holds the length of an axis (``{"in_channels": "(g i)", "groups": "g"}``), a field that is a tuple those of
    several axes. Single letters are solved first, then products with one unknown letter.

    >>> solve({"in_channels": "(g i)", "groups": "g"}, {"in_channels": 12, "groups": 4})
    {'g': 4, 'i': 3}

    Raises:
        SignatureError: if a length is no multiple of the known sizes, or a size is less than one.
    """
    numbers = tuple([value if isinstance(value, int) else tuple(value) for value in map(values.__getitem__, fields)])
    return _solve(tuple(fields.items()), numbers)


@lru_cache(maxsize=4096)
def _solve(fields: tuple[tuple[str, str], ...], values: tuple[int | tuple[int, ...], ...]) -> Mapping[str, int]:
    pending: list[tuple[str, Product, int]] = []
    sizes: dict[str, int] = {}
    for (field, text), value in zip(fields, values, strict=True):
        for axis, number in zip(pattern(text), (value,) if isinstance(value, int) else value, strict=True):
            if number < 1:
                raise SignatureError(f"needs {field} to be at least 1, not {number}")
            if len(axis[0]) != 1 or sizes.setdefault(axis[0][0], number) != number:
                pending.append((field, axis[0], number))
    pending.sort(key=lambda item: len(item[1]))
    for field, product, number in pending:
        unknown = [name for name in product if name not in sizes]
        known = 1
        for name in product:
            known *= sizes.get(name, 1)
        if len(unknown) > 1 or known == 0 or number % known or (not unknown and known != number):
            raise SignatureError(f"needs {field} = {number} to be a multiple of {known}")
        if unknown:
            sizes[unknown[0]] = number // known
    return sizes


def products(texts: Sequence[str], sizes: Mapping[str, int]) -> int:
    """The multiply-adds of matrix products. Each is a text of letters, whose sizes multiply to its own.

    >>> products(("o i",), {"o": 4, "i": 3, "B": 7})
    12

    ``...`` stands for the letters that `expand` replaced it by.
    """
    total = 0
    for text in texts:
        names = letters(pattern(text))
        total += math.prod(n for x, n in sizes.items() if x in names or (x[0] == "_" and "..." in names))
    return total


def show(axes: Pattern) -> str:
    """A pattern as text again.

    >>> show(pattern("B (c H) a + b 1"))
    'B (c H) a + b 1'
    """
    return " ".join(
        " + ".join(
            product[0] if len(product) == 1 else f"({' '.join(product)})" if product else "1" for product in axis
        )
        for axis in axes
    )
