"""A spec as a JSON document: written, and read back without trusting what it says.

A document may come from anywhere. Reading one therefore runs nothing that it names, except the constructors of layer
classes that the program has imported, and these receive numbers, strings and tuples of them only. What a document may
name is a closed list (layer classes, operators, dtypes, reductions), and what it may ask for is bounded. An error lists
everything that is wrong, each with its place in the document: ``nodes[3].fields.op``.
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, fields
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

from taylorfx.layers import LAYERS, Input, Layer, ShapeError, kind, sizes
from taylorfx.layers.operators import admitted, operator
from taylorfx.layers.tensor import operator_of, runs_operator, slots
from taylorfx.network.bind import propagate
from taylorfx.network.interface import Interface
from taylorfx.network.labels import Ties
from taylorfx.network.limits import NUMBERS, impossible
from taylorfx.network.spec import Node, Spec, SpecError
from taylorfx.store.document import (
    FileError,
    Json,
    Reader,
    describe,
    listed,
    misfit,
    parse,
    quote,
    to_field,
    to_tuples,
    written,
)
from taylorfx.tree import unflatten

__all__ = ["from_json", "to_json"]

VERSION = 1
"""The version of the documents that are written. A document without a version is read as one of this version."""

NODES = 2**17
"""The most nodes of a document."""

T = TypeVar("T")


def to_json(spec: Spec) -> str:
    """A spec as a JSON document, from which `from_json` reads an equal one.

    >>> from taylorfx import layers as L
    >>> spec = Spec((Node("x", L.Input((3,))), Node("relu", L.ReLU(), ("x",))))
    >>> from_json(to_json(spec)) == spec
    True

    Raises:
        SpecError: if fields of layers hold other values than numbers, strings and tuples of them; lists all of them.
    """
    nodes: list[dict[str, object]] = []
    errors: list[str] = []
    for node in spec.nodes:
        nodes.append({"name": node.name, **written_layer(node.layer, node.name, errors), "inputs": node.inputs})
        if node.params is not None:
            nodes[-1]["params"] = node.params
    if errors:
        raise SpecError("A document holds numbers, strings and tuples of them; received:\n  " + "\n  ".join(errors))
    interface = {"interface": asdict(spec.interface)} if spec.interface else {}
    guards = {"guards": spec.guards} if spec.guards else {}
    whole = {"version": VERSION, "nodes": nodes, "outputs": spec.outputs, "keys": spec.keys, **interface, **guards}
    return json.dumps(whole)


def written_layer(layer: Layer, where: str, errors: list[str]) -> dict[str, object]:
    """A layer as entries of a document; fields that a document does not hold are added to the errors."""
    values = {field.name: getattr(layer, field.name) for field in fields(layer) if field.init}
    for name, value in values.items():
        try:
            values[name] = written(value)
            json.dumps(values[name])
        except (TypeError, ValueError, RecursionError) as error:
            errors.append(f"{where}: {name} of {type(layer).__name__} ({error})")
    return {"layer": kind(type(layer)), "fields": values}


def from_json(text: str, *, operators: Collection[str] = ()) -> Spec:
    """The spec that `to_json` wrote. Modules that define layers of your own have to be imported before.

    Args:
        text: the document.
        operators: further operators that the document may name, such as ``"torchvision::roi_align"``. Those of torch,
            and those that the program has a rule for (`taylorfx.interop.rule`), need no mention.

    Raises:
        FileError: if the document describes no network; the message lists every error with its place in the document.
    """
    if not isinstance(text, str):
        raise FileError(f"A document is a string; received {type(text).__name__}.")
    reader = LayerReader(operators)
    spec = reader.read(parse(text))
    if reader.errors or spec is None:
        raise FileError(listed("This document does not describe a network", reader.errors))
    return spec


class _Field(NamedTuple):
    """A field of a layer class: its annotated type, and whether a document has to give it a value."""

    hint: object
    required: bool


class LayerReader(Reader):
    """Reads networks and their layers."""

    def __init__(self, operators: Collection[str] = ()) -> None:
        super().__init__()
        self.operators = (operators,) if isinstance(operators, str) else operators
        self.known: dict[type[Layer], dict[str, _Field]] = {}

    # The network.

    def read(self, data: Json) -> Spec | None:
        if not isinstance(data, dict):
            self.wrong("", f'expected an object, {{"nodes": [...], ...}}, received {describe(data)}')
            return None
        if not self.readable(data, VERSION):
            return None
        self.check_names(data, "", ("version", "nodes", "outputs", "keys", "interface", "guards"), ("nodes", "outputs"))
        entries = self.list_at(data, "nodes", "")
        if not 0 < len(entries) <= NODES:
            self.wrong("nodes", f"a network has 1 to {NODES:,} nodes, received {len(entries):,}")
            return None
        outputs, keys = self.names_at(data, "outputs", ""), self.strings_at(data, "keys", "")
        if keys and len(keys) != len(outputs):
            self.wrong("keys", f"expected one for each output, {len(outputs)}, received {len(keys)}")
        nodes = [self.node(entry, f"nodes[{k}]") for k, entry in enumerate(entries)]
        interface = self.interface(data["interface"], nodes) if "interface" in data else None
        guards = tuple(self.formula(guard, f"guards[{k}]") for k, guard in enumerate(self.list_at(data, "guards", "")))
        self.graph(nodes, outputs)
        if self.errors:
            return None
        try:
            spec = Spec(tuple(node for node in nodes if node is not None), outputs, keys, interface, guards)
            self.whole(spec, nodes)
        except SpecError as error:
            self.wrong("nodes", str(error))
            return None
        return spec

    def graph(self, nodes: list[Node | None], outputs: tuple[str, ...]) -> None:
        """Check that every node has a name of its own, and that inputs and outputs are names of nodes."""
        first: dict[str, int] = {}
        for k, node in enumerate(nodes):
            if node is not None and first.setdefault(node.name, k) != k:
                self.wrong(f"nodes[{k}].name", f"{quote(node.name)} is already the name of nodes[{first[node.name]}]")
        if None in nodes:
            return
        places = [(f"nodes[{k}].inputs[{j}]", x) for k, n in enumerate(nodes) if n for j, x in enumerate(n.inputs)]
        for place, name in [*places, *((f"outputs[{k}]", name) for k, name in enumerate(outputs))]:
            if name not in first:
                self.wrong(place, f"no node is named {quote(name)}")

    def whole(self, spec: Spec, nodes: list[Node | None]) -> None:
        """Check what concerns several nodes: paths of parameters, and the sizes of parameters and values."""
        try:
            unflatten(dict.fromkeys(spec.shapes))
        except ValueError as error:
            self.wrong("", str(error))
        self.sizes(spec)
        total = sum(map(math.prod, spec.shapes.values()))
        if total > NUMBERS:
            self.wrong("", f"its parameters are {total:,} numbers, where networks have at most {NUMBERS:,}")
        if not self.errors and all(isinstance(n.layer, Input) and n.layer.shape is not None for n in spec.inputs):
            ties = Ties(labeled=False)
            with suppress(ShapeError):  # layers that do not fit each other raise where the network is used
                propagate(spec, ties)
            places = {node.name: f"nodes[{k}]" for k, node in enumerate(nodes) if node}
            for name, problem in ties.room.wrong:
                self.wrong(places[name], f"gives {problem}")

    def formula(self, data: Json, place: str) -> sizes.Formula:
        """A condition on the sizes of the inputs."""
        formula = to_tuples(data)
        if problem := sizes.fault(formula):
            self.wrong(place, problem)
        return cast("sizes.Formula", formula)

    def sizes(self, spec: Spec) -> None:
        """Check that formulas name axes that there are, and that the numbers beside them are those of the example."""
        axes = spec.axes()
        held = [(f"nodes[{k}].fields", x) for k, n in enumerate(spec.nodes) if n.sized for x in sizes.held(n.layer)]
        for place, formula in [(place, x.formula) for place, x in held] + [("guards", x) for x in spec.guards]:
            if unknown := sorted(sizes.axes_of(formula) - axes.keys()):
                self.wrong(place, f"no input has the axis {', '.join(map(quote, unknown))}")
        for place, size in held if not self.errors else ():
            here: object = _attempt(partial(sizes.value, size.formula, axes))
            if here != size:
                self.wrong(place, f"{sizes.shown(size.formula)} is {here} for the declared inputs, not {size}")

    def interface(self, data: Json, nodes: list[Node | None]) -> Interface | None:
        """The arguments and names of the module that the network was captured from."""
        result = _attempt(lambda: Interface.from_data(data)) if isinstance(data, dict) else "expected an object"
        if isinstance(result, str):
            self.wrong("interface", result)
            return None
        inputs = {node.name for node in nodes if node is not None and isinstance(node.layer, Input)}
        if None not in nodes and (unknown := sorted(result.inputs - inputs)):
            self.wrong("interface.arguments", f"no Input node is named {', '.join(map(quote, unknown))}")
        return result

    # A node.

    def node(self, entry: Json, place: str) -> Node | None:
        before = len(self.errors)
        if not isinstance(entry, dict):
            self.wrong(place, f"expected an object, received {describe(entry)}")
            return None
        self.check_names(
            entry, place, ("name", "layer", "fields", "inputs", "params"), ("name", "layer", "fields", "inputs")
        )
        name = self.name(entry.get("name", "?"), f"{place}.name")
        inputs = self.names_at(entry, "inputs", place)
        params = self.params(entry.get("params"), f"{place}.params")
        layer = self.layer(entry, place, len(inputs))
        if layer is None or len(self.errors) > before:
            return None
        node = Node(name, layer, inputs, params)
        shapes = _attempt(lambda: node.shapes)
        if isinstance(shapes, str):
            self.wrong(f"{place}.fields", shapes)
            return None
        for leaf, shape in shapes.items():
            if problem := impossible(shape):
                self.wrong(f"{place}.fields", f"{leaf} would be {problem}")
        return node

    def params(self, value: Json, place: str) -> str | tuple[tuple[str, str], ...] | None:
        """Where a node's parameters are stored: one path, or pairs of a parameter's name and its path."""
        if value is None:
            return None
        if isinstance(value, str):
            return self.name(value, place)
        pairs: list[tuple[str, str]] = []
        for k, pair in enumerate(value if isinstance(value, list) else [None]):
            leaf, path = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
            if not isinstance(leaf, str):
                self.wrong(place, "expected the path of the parameters, or pairs of a parameter's name and its path")
                return None
            pairs.append((leaf, self.name(path, f"{place}[{k}][1]")))
        if len(dict(pairs)) < len(pairs):
            self.wrong(place, "names a parameter twice")
            return None
        return tuple(pairs)

    def layer(self, entry: Mapping[str, Json], place: str, inputs: int) -> Layer | None:
        before, title, received = len(self.errors), entry.get("layer"), entry.get("fields", {})
        cls = LAYERS.get(title) if isinstance(title, str) and not title.startswith("_") else None
        if "layer" in entry and cls is None:
            self.wrong(f"{place}.layer", f"unknown: {quote(title)}. Import the module of its class, or update taylorfx")
        if not isinstance(received, dict):
            self.wrong(f"{place}.fields", f"expected an object, received {describe(received)}")
            return None
        if cls is None or len(self.errors) > before:
            return None
        known = self.fields_of(cls)
        required = [name for name, field in known.items() if field.required]
        self.check_names(received, f"{place}.fields", known, required)
        values: dict[str, Any] = {}
        for name, value in received.items():
            try:
                values[name] = to_field(value)
            except FileError as error:
                self.wrong(f"{place}.fields.{name}", str(error))
        for name, value in values.items():
            if name in known and (problem := misfit(sizes.numbers(value), known[name].hint)):
                self.wrong(f"{place}.fields.{name}", f"{problem}, received {quote(received[name])}")
        if len(self.errors) > before:
            return None
        if runs_operator(cls):
            function = _attempt(lambda: operator(str(values["op"])))
            if isinstance(function, str):
                self.wrong(f"{place}.fields.op", function)
                return None
        layer = _attempt(lambda: cls(**values))
        if isinstance(layer, str):
            self.wrong(f"{place}.fields", layer)
            return None
        self.check_operator(layer, place, inputs)
        return layer

    def fields_of(self, cls: type[Layer]) -> dict[str, _Field]:
        """The fields of a layer class; one whose type cannot be told accepts every value."""
        if cls not in self.known:
            try:
                hints = typing.get_type_hints(cls)
            except (NameError, TypeError, AttributeError):
                hints = {}
            self.known[cls] = {
                x.name: _Field(hints.get(x.name, object), x.default is MISSING and x.default_factory is MISSING)
                for x in fields(cls)
                if x.init
            }
        return self.known[cls]

    def check_operator(self, layer: Layer, place: str, inputs: int) -> None:
        """Check that the program admits the operator that a layer runs, and that the node has the inputs it uses."""
        name = operator_of(layer)
        if name is None:
            return
        if not admitted(name, self.operators):
            library = "::".join(name.split(".")[:2])
            advice = f"to let it run, pass operators={[library]!r} or give it a rule"
            self.wrong(f"{place}.fields.op", f"{quote(name)} is an operator of another library; {advice}")
        if (count := slots(layer)) > inputs:
            self.wrong(f"{place}.fields.args", f"they use input {count - 1}, counted from 0; the node has {inputs}")


def _attempt(function: Callable[[], T]) -> T | str:
    """What a function of a layer class returns; if it raises, the error as text."""
    try:
        return function()
    except (ShapeError, SpecError) as error:
        return str(error)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError,
            ValueError) as error:  # fmt: skip
        return f"{type(error).__name__}: {error}"
