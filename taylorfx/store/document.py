"""JSON documents from anywhere: their text, their size, and whether a value fits the type of a field."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TypeAlias, cast

from taylorfx.layers.sizes import Formula, Ratio, Size, fault, numbers
from taylorfx.network.spec import SpecError

__all__ = [
    "FileError", "Json", "Reader", "Value", "describe", "dotted", "listed", "misfit", "parse", "quote", "read_document",
    "to_field", "to_tuples", "written",
]  # fmt: skip

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
"""A value of a JSON document."""

Value: TypeAlias = "bool | int | float | str | tuple[Value, ...] | dict[str, Value] | None"
"""A value of JSON with tuples for lists, as layers hold it in their fields."""

DEPTH, NAME, PARTS, AXES, SHOWN = 64, 512, 64, 64, 100
"""The most lists and objects within each other, characters and dotted parts of a name, axes, and errors shown."""

CHARACTERS = 100_000_000
"""The most characters of a document: those of the largest header of a safetensors file."""

TYPES = {
    int: "an integer", float: "a number", bool: "a boolean", str: "a string", type(None): "null", dict: "an object",
    list: "a list",
}  # fmt: skip
"""What errors call the types of JSON's values."""


class FileError(SpecError):
    """A file that holds no network, plan, statistics or timings; the message lists every error with its place."""


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
        raise FileError(f"A document is JSON; this text is not: {error}") from None
    return value


def read_document(path: str | PathLike[str]) -> Json:
    """The JSON of a file of bounded length.

    Raises:
        FileError: if the file is too long, or no JSON in UTF-8.
        OSError: if it cannot be read.
    """
    with Path(path).open("rb") as file:
        data = file.read(CHARACTERS + 1)
    try:
        return parse(data.decode())
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: A document is text in UTF-8; this one is not: {error}") from None
    except FileError as error:
        raise FileError(f"{path}: {error}") from None


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


class Reader:
    """Reads a document and collects everything that is wrong with it.

    The methods return what they read. What is wrong they add to ``errors``, and they go on, if they can, with a value
    that causes no further errors.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []

    def wrong(self, place: str, problem: str) -> None:
        self.errors.append(f"{place}: {problem}" if place else problem)

    def readable(self, data: Mapping[str, Json], known: int) -> bool:
        """Whether a document is of the version that is known, and of a depth and numbers that can be read."""
        version = data.get("version", 1)
        if type(version) is not int or version != known:
            self.wrong("version", f"{quote(version)} is unknown, {known} is known; a newer taylorfx may read it")
        elif problem := unfit({**data}):
            self.wrong("", problem)
        return not self.errors

    def of_kind(self, data: Mapping[str, Json], kind: str, version: int, names: tuple[str, ...]) -> bool:
        """Whether a document is of this kind and a version that is known, and has all of its entries and no others."""
        if data.get("kind") != kind:
            self.wrong("kind", f"expected {quote(kind)}, received {quote(data.get('kind'))}")
        elif self.readable(data, version):
            self.check_names(data, "", names, names)
        return not self.errors

    # Entries of an object, whose place in the document is ``place``.

    def check_names(
        self, data: Mapping[str, Json], place: str, known: Collection[str], required: Iterable[str]
    ) -> None:
        """Check that an object has no unknown entries and all required ones."""
        for name in data:
            if name not in known:
                self.wrong(dotted(place, name), f"unknown; known are {', '.join(known) or 'none'}")
        for name in required:
            if name not in data:
                self.wrong(dotted(place, name), "missing")

    def expect_object(self, value: Json, place: str = "") -> None:
        """Say so if a value is no object."""
        if not isinstance(value, dict):
            self.wrong(place, f"expected an object, received {describe(value)}")

    def count_at(self, data: Mapping[str, Json], name: str, place: str, *, least: int = 0) -> int:
        value = data.get(name)
        if type(value) is int and value >= least:
            return value
        self.wrong(dotted(place, name), f"expected an integer, {least} or more, received {quote(value)}")
        return least

    def string_at(self, data: Mapping[str, Json], name: str, place: str) -> str:
        value = data.get(name)
        if isinstance(value, str):
            return value
        self.wrong(dotted(place, name), f"expected a string, received {describe(value)}")
        return ""

    def list_at(self, data: Mapping[str, Json], name: str, place: str) -> list[Json]:
        value = data.get(name, [])
        if isinstance(value, list):
            return value
        self.wrong(dotted(place, name), f"expected a list, received {describe(value)}")
        return []

    def strings_at(self, data: Mapping[str, Json], name: str, place: str) -> tuple[str, ...]:
        values = self.list_at(data, name, place)
        for k, value in enumerate(values):
            if not isinstance(value, str) or len(value) > NAME:
                problem = f"expected a string of at most {NAME} characters, received {quote(value)}"
                self.wrong(f"{dotted(place, name)}[{k}]", problem)
        return tuple(value if isinstance(value, str) else "" for value in values)

    def names_at(self, data: Mapping[str, Json], name: str, place: str) -> tuple[str, ...]:
        values = self.list_at(data, name, place)
        return tuple(self.name(value, f"{dotted(place, name)}[{k}]") for k, value in enumerate(values))

    def name(self, value: Json, place: str) -> str:
        """The name of a node, or the path of a parameter; ``place`` is that of the name itself."""
        if not isinstance(value, str):
            self.wrong(place, f"expected a name, received {describe(value)}")
            return ""
        if not value or len(value) > NAME or value.count(".") >= PARTS:
            self.wrong(place, f"a name has 1 to {NAME} characters and at most {PARTS} parts, received {quote(value)}")
        return value


def dotted(place: str, name: str) -> str:
    """The place of an entry of the object at ``place``; a long name is shortened."""
    name = name if len(name) <= 80 else f"{name[:76]} ..."
    return f"{place}.{name}".strip(".")


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
