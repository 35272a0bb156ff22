"""The document that a spec is on disk: written, and read with nothing taken on trust.

A document may come from anywhere, so reading it runs nothing that it names but constructors of layer classes that the
program has imported, with numbers, texts and tuples of them. What it may name is closed (layer classes, operators,
dtypes, reductions), what it may ask for is bounded. Everything that is wrong is listed with its place in the document:
``nodes[3].fields.op``.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, fields
from functools import cache
from typing import Any

from taylorfx.layers import LAYERS, Input, Layer, ShapeError, kind
from taylorfx.layers.operators import admitted, operator
from taylorfx.layers.tensor import operator_of, runs_operator, slots
from taylorfx.network.bind import propagate
from taylorfx.network.interface import Interface
from taylorfx.network.labels import Ties
from taylorfx.network.limits import NUMBERS, impossible
from taylorfx.network.spec import Node, Spec, SpecError
from taylorfx.tree import unflatten

__all__ = ["FileError", "from_json", "to_json"]

VERSION = 1
"""The version of the document that is written. One without a version is read as of this one."""

DEPTH, NODES, NAME, PARTS, AXES, SHOWN = 32, 2**17, 512, 64, 64, 100
"""How deep a document may nest, its nodes, the characters and dotted parts of a name, the axes of a tensor, and how
many errors are listed."""

CHARACTERS = 100_000_000
"""The length of a document: that of the largest header of a safetensors file."""


class FileError(SpecError):
    """A file or document that is no network's; the message lists what is wrong, each with its place in the document."""


def to_json(spec: Spec) -> str:
    """A spec as JSON; `from_json` gives an equal one back.

    Raises:
        SpecError: listing every field that is no number, text or tuple of them.
    """
    nodes: list[dict[str, Any]] = []
    errors: list[str] = []
    for node in spec.nodes:
        values = {field.name: getattr(node.layer, field.name) for field in fields(node.layer) if field.init}
        for name, value in values.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError, RecursionError) as error:
                errors.append(f"{node.name}: {name} of {type(node.layer).__name__} ({error})")
        entry = {"name": node.name, "layer": kind(type(node.layer)), "fields": values, "inputs": node.inputs}
        nodes.append({**entry, "params": node.params} if node.params is not None else entry)
    if errors:
        raise SpecError("A document holds numbers, texts and tuples of them; received:\n  " + "\n  ".join(errors))
    own = {"interface": asdict(spec.interface)} if spec.interface else {}
    return json.dumps({"version": VERSION, "nodes": nodes, "outputs": spec.outputs, "keys": spec.keys, **own})


def from_json(text: str, *, operators: Collection[str] = ()) -> Spec:
    """The spec that `to_json` wrote. Layers from outside the package have to be imported before.

    Args:
        text: the document.
        operators: operators of other libraries that it may name, ``"torchvision::roi_align"``, beside those that the
            program has a `rule` for.

    Raises:
        FileError: if the document is no network's: everything that is wrong, each with its place in the document.
    """
    if not isinstance(text, str):
        raise FileError(f"A document is a text; received {type(text).__name__}.")
    reader = _Reader(operators)
    spec = reader.read(_parse(text))
    if reader.errors or spec is None:
        raise FileError(_listed("This document is no network's", reader.errors))
    return spec


def _listed(what: str, errors: list[str]) -> str:
    shown = [error if len(error) < 1000 else f"{error[:1000]} ..." for error in errors[:SHOWN]]
    more = f"\n  and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    return f"{what}:\n  " + "\n  ".join(shown) + more


def _parse(text: str) -> Any:
    """JSON of bounded length, without names that are there twice."""
    if len(text) > CHARACTERS:
        raise FileError(f"A document has at most {CHARACTERS:,} characters; received {len(text):,}.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{_short(next(n for n in names if names.count(n) > 1))} is there twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise FileError(f"A document is at most {DEPTH} lists and objects deep; this one is far deeper.") from None
    except ValueError as error:
        raise FileError(f"A network's document is JSON; this one is not: {error}") from None


def _short(value: Any) -> str:
    """A value from a document, as far as an error needs it."""
    text = ascii(value) if isinstance(value, (str, int, float, type(None))) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _says(value: Any) -> str:
    """What a value of JSON is."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", int: "a whole number"}
    return kinds.get(type(value), "null" if value is None else "a number")


class _Reader:
    """Goes through a document and collects what is wrong with it."""

    def __init__(self, operators: Collection[str]) -> None:
        self.operators = (operators,) if isinstance(operators, str) else operators
        self.errors: list[str] = []

    def wrong(self, place: str, text: str) -> None:
        self.errors.append(f"{place}: {text}" if place else text)

    def read(self, data: Any) -> Spec | None:
        if not isinstance(data, dict):
            self.wrong("", f'it is an object, {{"nodes": [...], ...}}; received {_says(data)}')
            return None
        version = data.get("version", VERSION)
        if version is not VERSION and (type(version) is not int or version != VERSION):
            self.wrong("version", f"{_short(version)} is not known, {VERSION} is; a newer taylorfx may read it")
            return None
        if problem := _depth(data):
            self.wrong("", problem)
            return None
        self.entries(data, "", ("version", "nodes", "outputs", "keys", "interface"), ("nodes", "outputs"))
        entries = self.listed(data, "nodes", "")
        if not 0 < len(entries) <= NODES:
            self.wrong("nodes", f"a network has 1 to {NODES:,} nodes; received {len(entries):,}")
            return None
        outputs, keys = self.names(data, "outputs", ""), self.texts(data, "keys", "")
        if keys and len(keys) != len(outputs):
            self.wrong("keys", f"one for each output, {len(outputs)}; received {len(keys)}")
        nodes = [self.node(entry, f"nodes[{k}]") for k, entry in enumerate(entries)]
        interface = self.interface(data["interface"], nodes) if "interface" in data else None
        self.graph(nodes, outputs)
        if self.errors:
            return None
        try:
            return self.whole(Spec(tuple(n for n in nodes if n is not None), outputs, keys, interface), nodes)
        except SpecError as error:
            self.wrong("nodes", str(error))
            return None

    def whole(self, spec: Spec, nodes: list[Node | None]) -> Spec:
        """What can only be told of the network as a whole."""
        places = {node.name: f"nodes[{k}]" for k, node in enumerate(nodes) if node}
        try:
            unflatten(dict.fromkeys(spec.shapes))
        except ValueError as error:
            self.wrong("", str(error))
        total = sum(map(math.prod, spec.shapes.values()))
        if total > NUMBERS:
            self.wrong("", f"its parameters are {total:,} numbers, where networks have at most {NUMBERS:,}")
        if not self.errors and all(isinstance(n.layer, Input) and n.layer.shape is not None for n in spec.inputs):
            ties = Ties(labeled=False)
            with suppress(ShapeError):  # layers that do not fit each other are the network's own, told where it is used
                propagate(spec, ties)
            for name, problem in ties.room.wrong:
                self.wrong(places[name], f"gives {problem}")
        return spec

    def graph(self, nodes: list[Node | None], outputs: tuple[str, ...]) -> None:
        """Every node once, and every input and output one of them."""
        first: dict[str, int] = {}
        for k, node in enumerate(nodes):
            if node is not None and first.setdefault(node.name, k) != k:
                self.wrong(f"nodes[{k}].name", f"{_short(node.name)} is the name of nodes[{first[node.name]}], too")
        if None in nodes:
            return
        places = [(f"nodes[{k}].inputs[{j}]", x) for k, n in enumerate(nodes) if n for j, x in enumerate(n.inputs)]
        for place, name in [*places, *((f"outputs[{k}]", name) for k, name in enumerate(outputs))]:
            if name not in first:
                self.wrong(place, f"no node is named {_short(name)}")

    def interface(self, data: Any, nodes: list[Node | None]) -> Interface | None:
        """How the network is called as a module."""
        found: Any = _failure(lambda: Interface.from_data(data)) if isinstance(data, dict) else "an object"
        if isinstance(found, str):
            self.wrong("interface", found)
            return None
        assert isinstance(found, Interface)
        inputs = {node.name for node in nodes if node is not None and isinstance(node.layer, Input)}
        if None not in nodes and (strange := sorted(found.inputs - inputs)):
            self.wrong("interface.arguments", f"no Input node is named {', '.join(map(_short, strange))}")
        return found

    # Parts of a document.

    def entries(self, data: Mapping[str, Any], place: str, known: Collection[str], needed: Collection[str]) -> None:
        """An object has these names and no others."""
        for name in data:
            if name not in known:
                self.wrong(_dotted(place, name), f"not known here; known are {', '.join(known) or 'none'}")
        for name in needed:
            if name not in data:
                self.wrong(_dotted(place, name), "missing")

    def listed(self, data: Mapping[str, Any], name: str, place: str) -> list[Any]:
        value = data.get(name, [])
        if isinstance(value, list):
            return value
        self.wrong(_dotted(place, name), f"a list; received {_says(value)}")
        return []

    def texts(self, data: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
        values = self.listed(data, name, place)
        for k, value in enumerate(values):
            if not isinstance(value, str) or len(value) > NAME:
                self.wrong(
                    f"{_dotted(place, name)}[{k}]", f"a text of at most {NAME} characters; received {_short(value)}"
                )
        return tuple(value if isinstance(value, str) else "" for value in values)

    def names(self, data: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
        values = self.listed(data, name, place)
        return tuple(self.name(value, f"{_dotted(place, name)}[{k}]") for k, value in enumerate(values))

    def name(self, value: Any, place: str) -> str:
        """The name of a node, or the path of a parameter."""
        if not isinstance(value, str):
            self.wrong(place, f"a name; received {_says(value)}")
            return ""
        if not value or len(value) > NAME or value.count(".") >= PARTS:
            self.wrong(place, f"a name has 1 to {NAME} characters and at most {PARTS} parts; received {_short(value)}")
        return value

    def node(self, entry: Any, place: str) -> Node | None:
        before = len(self.errors)
        if not isinstance(entry, dict):
            self.wrong(place, f"an object; received {_says(entry)}")
            return None
        self.entries(
            entry, place, ("name", "layer", "fields", "inputs", "params"), ("name", "layer", "fields", "inputs")
        )
        name = self.name(entry.get("name", "?"), f"{place}.name")
        inputs = self.names(entry, "inputs", place)
        params = self.params(entry.get("params"), f"{place}.params")
        layer = self.layer(entry, place, len(inputs))
        if layer is None or len(self.errors) > before:
            return None
        node = Node(name, layer, inputs, params)
        shapes: Any = _failure(lambda: node.shapes)
        if isinstance(shapes, str):
            self.wrong(f"{place}.fields", shapes)
            return None
        for leaf, shape in shapes.items():
            if problem := impossible(shape):
                self.wrong(f"{place}.fields", f"{leaf} would be {problem}")
        return node

    def params(self, value: Any, place: str) -> Any:
        """The path of a node's parameters, or pairs of a parameter and its path."""
        if value is None:
            return None
        if isinstance(value, str):
            return self.name(value, place)
        pairs: list[Any] = value if isinstance(value, list) else [None]
        if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            self.wrong(place, "the path of the parameters, or pairs of a parameter's name and its path")
            return None
        if len({leaf for leaf, _ in pairs}) < len(pairs):
            self.wrong(place, "a parameter is there twice")
        return tuple((leaf, self.name(path, f"{place}[{k}][1]")) for k, (leaf, path) in enumerate(pairs))

    def layer(self, entry: Mapping[str, Any], place: str, inputs: int) -> Layer | None:
        before, title, given = len(self.errors), entry.get("layer"), entry.get("fields", {})
        cls = LAYERS.get(title) if isinstance(title, str) and not title.startswith("_") else None
        if "layer" in entry and cls is None:
            self.wrong(f"{place}.layer", f"not known: {_short(title)}. Import the class before, or update taylorfx")
        if not isinstance(given, dict):
            self.wrong(f"{place}.fields", f"an object; received {_says(given)}")
        if cls is None or len(self.errors) > before:
            return None
        known = _fields(cls)  # type: ignore[arg-type]
        needed = [n for n, (field, _) in known.items() if field.default is MISSING and field.default_factory is MISSING]
        self.entries(given, f"{place}.fields", known, needed)
        values = {name: _tuples(value) for name, value in given.items()}
        for name, value in values.items():
            if name in known and (problem := _misfit(value, known[name][1])):
                self.wrong(f"{place}.fields.{name}", f"{problem}; received {_short(given[name])}")
        if len(self.errors) > before:
            return None
        if runs_operator(cls) and isinstance(problem := _failure(lambda: operator(values["op"])), str):
            self.wrong(f"{place}.fields.op", problem)
            return None
        layer: Any = _failure(lambda: cls(**values))
        if isinstance(layer, str):
            self.wrong(f"{place}.fields", layer)
            return None
        self.operator(layer, place, inputs)
        assert isinstance(layer, cls)
        return layer

    def operator(self, layer: Layer, place: str, inputs: int) -> None:
        """What an operator is, and that it has the inputs that its arguments are filled with."""
        name = operator_of(layer)
        if name is None:
            return
        if not admitted(name, self.operators):
            library = "::".join(name.split(".")[:2])
            way = f"if it may run, say operators={[library]!r} or give it a rule"
            self.wrong(f"{place}.fields.op", f"{_short(name)} is an operator of another library; {way}")
        if (count := slots(layer)) > inputs:
            self.wrong(f"{place}.fields.args", f"they name input {count - 1}, and the node has {inputs}")


def _failure(function: typing.Callable[[], Any]) -> Any:
    """What a function of a layer's class gives, or in words why it does not."""
    try:
        return function()
    except (ShapeError, SpecError) as error:
        return str(error)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError,
            ValueError) as error:  # fmt: skip
        return f"{type(error).__name__}: {error}"


def _dotted(place: str, name: str) -> str:
    name = name if len(name) <= 80 else f"{name[:76]} ..."
    return f"{place}.{name}".strip(".")


def _depth(data: Any) -> str:
    """Whether a document is too deep, or holds a number that no tensor has, told without recursion."""
    level, depth = [data], 0
    while level:
        depth += 1
        if depth > DEPTH:
            return f"it is at most {DEPTH} lists and objects deep"
        below: list[Any] = []
        for value in level:
            below.extend(value.values() if isinstance(value, dict) else value)
        strange = next((x for x in below if isinstance(x, int) and not -(2**63) <= x < 2**63), None)
        if strange is not None:
            return f"whole numbers have 64 bits; received {_short(strange)}"
        level = [value for value in below if isinstance(value, (dict, list))]
    return ""


def _tuples(value: Any) -> Any:
    """JSON has lists where we have tuples."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


@cache
def _fields(cls: type[Layer]) -> Mapping[str, tuple[Field[Any], Any]]:
    """A layer's fields and their types; a type that cannot be told is any."""
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, TypeError, AttributeError):
        hints = {}
    return {field.name: (field, hints.get(field.name, Any)) for field in fields(cls) if field.init}


def _misfit(value: Any, hint: Any) -> str:
    """What a field's type asks for, where a value has not got it; types that are not JSON's own take anything."""
    if _fits(value, hint):
        return ""
    return f"it is {' or '.join(dict.fromkeys(_words(hint)))}"


def _words(hint: Any) -> Iterator[str]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for one in typing.get_args(hint):
            yield from _words(one)
    elif typing.get_origin(hint) is tuple:
        inner = list(dict.fromkeys(word for one in typing.get_args(hint) if one is not ... for word in _words(one)))
        yield f"a list of at most {AXES}" if inner == ["a whole number"] else f"a list ({', '.join(inner)})"
    else:
        names = {int: "a whole number", float: "a number", bool: "a truth value", str: "a text", type(None): "null"}
        yield names.get(hint, "anything")


def _fits(value: Any, hint: Any) -> bool:
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
