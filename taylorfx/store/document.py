"""JSON documents from anywhere: their text, their size, and whether a value fits the type of a field."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import TypeAlias, cast

from taylorfx.layers.sizes import Formula, Ratio, Size, fault, numbers
from taylorfx.network.spec import SpecError

__all__ = [
    "NAME", "FileError", "Json", "Value", "describe", "listed", "misfit", "parse", "quote", "to_field", "to_tuples",
    "unfit", "written",
]  # fmt: skip

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
"""A value of a JSON document."""

Value: TypeAlias = "bool | int | float | str | tuple[Value, ...] | dict[str, Value] | None"
"""A value of JSON with tuples for lists, as layers hold it in their fields."""

DEPTH, NAME, AXES, SHOWN = 64, 512, 64, 100
"""The most lists and objects within each other, characters of a name, axes of a tensor, and errors in a message."""

CHARACTERS = 100_000_000
"""The most characters of a document: those of the largest header of a safetensors file."""

TYPES = {
    int: "an integer", float: "a number", bool: "a boolean", str: "a string", type(None): "null", dict: "an object",
    list: "a list",
}  # fmt: skip
"""What errors call the types of JSON's values."""


class FileError(SpecError):
    """A file or document that describes no network; the message lists every error with its place in the document."""


def parse(text: str) -> Json:
    """Read JSON of bounded length in which no object has a name twice.

    >>> parse('{"nodes": [1, null]}')
    {'nodes': [1, None]}

    Raises:
        FileError: if the text is too long, nested too deeply, or not JSON.
    """
    if len(text) > CHARACTERS:
        raise FileError(f"A document has at most {CHARACTERS:,} characters; received {len(text):,}.")

    def unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"one object has the name {quote(next(n for n in names if names.count(n) > 1))} twice")
        return entries

    try:
        value: Json = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise FileError(f"A document nests lists and objects at most {DEPTH} deep; this one nests more.") from None
    except ValueError as error:
        raise FileError(f"A network's document is JSON; this text is not: {error}") from None
    return value


def unfit(value: Json) -> str:
    """Why a value is too deep for a document, or which of its integers no tensor can hold; empty if it is neither.

    The levels are visited one after the other, without recursion, so that no document exhausts the stack.

    >>> unfit({"shape": [3, 2**70]})
    'integers have 64 bits, received 1180591620717411303424'
    """
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH:
            return f"lists and objects are nested at most {DEPTH} deep"
        below: list[Json] = []
        for outer in level:
            if isinstance(outer, dict):
                below.extend(outer.values())
            elif isinstance(outer, list):
                below.extend(outer)
        large = next((x for x in below if isinstance(x, int) and not -(2**63) <= x < 2**63), None)
        if large is not None:
            return f"integers have 64 bits, received {quote(large)}"
        level = [inner for inner in below if isinstance(inner, (dict, list))]
    return ""


def to_tuples(value: Json) -> Value:
    """A value with tuples for lists, as layers hold it.

    >>> to_tuples([1, [2, "a"]])
    (1, (2, 'a'))
    """
    if isinstance(value, list):
        return tuple(map(to_tuples, value))
    return {key: to_tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def written(value: object) -> object:
    """A value of a field as a document holds it: lists for tuples, an object for a size with its formula.

    >>> written((3, Size(4, ("//", "x.1", 2))))
    [3, {'number': 4, 'formula': ['//', 'x.1', 2]}]
    """
    if isinstance(value, (Size, Ratio)):
        return {"number": numbers(value), "formula": written(value.formula)}
    return list(map(written, value)) if isinstance(value, tuple) else value


def to_field(value: Json) -> object:
    """The value of a field that `written` wrote.

    >>> to_field([3, {"number": 4, "formula": ["//", "x.1", 2]}])
    (3, 4)

    Raises:
        FileError: for an object that is no size with its formula.
    """
    if isinstance(value, list):
        return tuple(map(to_field, value))
    if not isinstance(value, dict):
        return value
    number, formula = value.get("number"), to_tuples(value.get("formula"))
    if value.keys() != {"number", "formula"} or type(number) not in (int, float):
        raise FileError(f'expected values, or sizes as {{"number": 4, "formula": "x.1"}}; received {quote(value)}')
    if problem := fault(formula):
        raise FileError(problem)
    assert isinstance(number, (int, float))
    found = cast("Formula", formula)
    return Ratio(number, found) if isinstance(number, float) else Size(number, found)


# Errors.


def describe(value: object) -> str:
    """What kind of value of JSON this is.

    >>> describe([1]), describe(True), describe(None)
    ('a list', 'a boolean', 'null')
    """
    return TYPES.get(type(value), "a number")


def quote(value: Json) -> str:
    """A value as an error shows it: in ASCII, and not longer than a line."""
    text = json.dumps(value) if isinstance(value, (list, dict)) else ascii(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def listed(summary: str, errors: list[str]) -> str:
    """A message that lists errors; of many, the first ones and how many more there are."""
    shown = [error if len(error) < 1000 else f"{error[:1000]} ..." for error in errors[:SHOWN]]
    more = f"\n  and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    return f"{summary}:\n  " + "\n  ".join(shown) + more


# Types of fields.


def misfit(value: Value, hint: object) -> str:
    """What a field expects, if the value is of another type; empty if it fits.

    Args:
        value: with tuples for lists.
        hint: the annotated type of the field. Types that JSON does not have accept every value.

    >>> misfit("3", int), misfit((1, 2), int | tuple[int, ...])
    ('expected an integer', '')
    """
    if _fits(value, hint):
        return ""
    return f"expected {' or '.join(dict.fromkeys(_names(hint)))}"


def _names(hint: object) -> Iterator[str]:
    """What errors call the types that a hint allows."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for one in typing.get_args(hint):
            yield from _names(one)
    elif typing.get_origin(hint) is tuple:
        inner = list(dict.fromkeys(name for one in typing.get_args(hint) if one is not ... for name in _names(one)))
        yield f"a list of at most {AXES} integers" if inner == [TYPES[int]] else f"a list ({', '.join(inner)})"
    else:
        yield TYPES.get(hint, "anything") if isinstance(hint, type) else "anything"


def _fits(value: Value, hint: object) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(parts) == 2 and parts[1] is ...:
            return (parts[0] is not int or len(value) <= AXES) and all(_fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint is float:
        return type(value) in (int, float)
    if hint is str:
        return isinstance(value, str) and len(value) <= NAME
    return type(value) is hint if hint in (int, bool, type(None)) else True
