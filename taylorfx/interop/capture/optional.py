"""One network of several captured calls, whose inputs may be left out.

Every call is captured alone, and the networks are laid over each other. A node of one and a node of the other are the
same where their layers and parameters are, in the same order. What one network has alone stays beside it, and where a
shared node consumes different values in the two, a `Choose` stands before it. So *any* choice of shared nodes gives a
network that computes each call as it was captured; one that shares many is small, and ties few channels::

    with a mask   x   mask   scaled                       relu   out
    without       x                                       relu   out
    together      x   mask   scaled   choose(scaled, x)   relu   out
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher

import torch
from torch import Tensor

from taylorfx.interop.capture.reader import CaptureError
from taylorfx.layers import Choose, Input
from taylorfx.network.bind import propagate
from taylorfx.network.build import unused
from taylorfx.network.interface import Argument, Interface
from taylorfx.network.labels import Ties, is_example, length
from taylorfx.network.run import apply
from taylorfx.network.spec import Node, Spec
from taylorfx.tree import Params, flatten, unflatten

__all__ = ["Call", "merge"]

Network = tuple[Params, Spec]


class Call:
    """The arguments of one call, as they are written: ``Call(tokens, mask=mask)``.

    >>> Call(1, mask=2).args, Call(1, mask=2).kwargs
    ((1,), {'mask': 2})
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.args, self.kwargs = args, kwargs


def merge(networks: Sequence[Network], examples: Sequence[Mapping[str, Tensor]]) -> Network:
    """The network of all calls, from the networks of each.

    Args:
        examples: the inputs of every call, by the names of the Input nodes; outputs are compared on them.

    Raises:
        CaptureError: if calls differ in more than tensors that are there or not, or in what the module returns.
    """
    names = {name for _, spec in networks for name in spec.input_layers}
    specs = [_beside(spec, names) for _, spec in networks]
    errors: list[str] = []
    inputs = _inputs(specs, errors)
    interface = _interface([spec.interface or Interface() for spec in specs], specs, errors)
    if errors:
        raise CaptureError(
            "One network stands for several calls that differ only in which tensors are there. The examples have to "
            "have:\n  " + "\n  ".join(errors)
        )
    leaves = flatten(networks[0][0])
    spec = replace(specs[0], interface=None)
    for k, ((params, _), other) in enumerate(zip(networks[1:], specs[1:], strict=True), 1):
        spec = _Overlay(spec, _with_paths(other, _shared(leaves, flatten(params))), k).network()
    order = dict.fromkeys([*(node for x in interface.arguments for _, node in x.inputs), *inputs])  # as called
    layers = [Node(name, inputs[name]) for name in order]
    nodes = tuple(node for node in spec.nodes if not isinstance(node.layer, Input))
    spec = replace(spec, nodes=(*layers, *nodes), interface=interface if interface.arguments else None)
    merged = unflatten({path: leaves[path] for path in spec.shapes})
    for (params, other), example in zip(networks, examples, strict=True):
        _prove(apply(params, other, example), apply(merged, spec, example), [*other.input_layers])
    return merged, spec


def _prove(expected: object, received: object, inputs: Sequence[str]) -> None:
    """The merged network computes for a call what the network of the call does, to the last bit."""
    try:
        torch.testing.assert_close(received, expected, rtol=0.0, atol=0.0, equal_nan=True)
    except AssertionError as error:
        raise CaptureError(
            f"One network cannot stand for all of these calls: that with {', '.join(inputs)} has other outputs. "
            f"Capture the calls one by one. {error}"
        ) from error


def _inputs(specs: Sequence[Spec], errors: list[str]) -> dict[str, Input]:
    """The inputs of all calls, which say in which calls they are there; ``errors`` says what differs."""
    inputs: dict[str, Input] = {}
    for spec in specs:
        for name, layer in spec.input_layers.items():
            known = inputs.setdefault(name, layer)
            if (known.shape, known.dtype) != (layer.shape, layer.dtype):
                kinds = " and ".join(f"{x.shape} ({x.dtype or 'real'})" for x in (known, layer))
                errors.append(f"{name}: one size and type in all examples, received {kinds}")
            else:
                inputs[name] = _both(known, layer)
    sets = [{*spec.input_layers} for spec in specs]
    for k, names in enumerate(sets):
        if names in sets[:k]:
            errors.append(f"calls with other tensors each, received {', '.join(sorted(names))} twice")
    for k, spec in enumerate(specs[1:], 1):
        if (len(spec.outputs), spec.keys) != (len(specs[0].outputs), specs[0].keys):
            one, other = (", ".join(x.keys) or f"{len(x.outputs)} tensors" for x in (specs[0], spec))
            errors.append(f"one kind of outputs: in example 0 {one}, in example {k} {other}")
    return {name: replace(layer, calls=_calls(name, sets)) for name, layer in inputs.items()}


def _calls(name: str, sets: Sequence[set[str]]) -> tuple[bool, ...]:
    there = tuple(name in names for names in sets)
    return () if all(there) else there


def _both(one: Input, other: Input) -> Input:
    """An input that takes what both take."""
    alone, apart = one.alone or other.alone, one.apart and other.apart
    if not one.ranges or not other.ranges or one.ranges == other.ranges:
        return replace(one, alone=alone, apart=apart, ranges=one.ranges or other.ranges)
    ranges = []
    for (least, most, step), (least_, most_, step_) in zip(one.ranges, other.ranges, strict=True):
        start = max(least, least_)
        fits = (n for n in range(start, start + step * step_) if (n - least) % step == (n - least_) % step_ == 0)
        ends = [x for x in (most, most_) if x is not None]
        ranges.append((next(fits, start), min(ends, default=None), math.lcm(step, step_)))
    return replace(one, alone=alone, apart=apart, ranges=tuple(ranges))


def _interface(interfaces: Sequence[Interface], specs: Sequence[Spec], errors: list[str]) -> Interface:
    """The interface of all calls: where a tensor may be left out stands what was captured in its place, too."""
    arguments: dict[str, Argument] = {}
    for interface in interfaces:
        for x in interface.arguments:
            known = arguments.setdefault(x.name, x)
            fixed = dict(known.fixed)
            for place, value in x.fixed:
                if fixed.setdefault(place, value) != value:
                    where = f"{x.name}.{place}" if place else x.name
                    errors.append(f"{where}: one value, received {fixed[place]!r} and {value!r}")
            inputs = tuple(dict.fromkeys((*known.inputs, *x.inputs)))
            default = x.default if x.fixed else known.default
            arguments[x.name] = replace(known, inputs=inputs, fixed=tuple(fixed.items()), default=default)
    used = {path for spec in specs for path in spec.shapes}
    return Interface(
        tuple(arguments.values()),
        tuple(dict.fromkeys(tie for x in interfaces for tie in x.ties if tie[0] not in used)),
        tuple(dict.fromkeys(path for x in interfaces for path in x.frozen)),
        tuple(dict.fromkeys(path for x in interfaces for path in x.transient)),
        interfaces[0].results,
    )


# Parameters.


def _shared(leaves: dict[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, str]:
    """The paths of other leaves among these, which get those that are not there yet.

    Constants are numbered in every capture anew, so they are looked up by value.
    """
    paths: dict[str, str] = {}
    constants = {path: leaf for path, leaf in leaves.items() if path.startswith("constants.")}
    for path, leaf in others.items():
        equal = [path] if path in leaves and _same(leaves[path], leaf) else []
        if not equal and path.startswith("constants."):
            equal = [name for name, constant in constants.items() if _same(constant, leaf)]
        new = equal[0] if equal else path
        while not equal and new in leaves:
            new += "_"
        paths[path] = new
        leaves.setdefault(new, leaf)
    return paths


def _same(one: Tensor, other: Tensor) -> bool:
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and (one.data_ptr() == other.data_ptr() or torch.equal(one, other))


def _with_paths(spec: Spec, paths: Mapping[str, str]) -> Spec:
    """The network whose parameters lie elsewhere."""

    def moved(node: Node) -> Node:
        if all(paths[path] == path for path in node.paths.values()):
            return node
        return replace(node, params=tuple((leaf, paths[path]) for leaf, path in node.paths.items()))

    return replace(spec, nodes=tuple(map(moved, spec.nodes)), interface=None)


# Nodes.


def _beside(spec: Spec, inputs: set[str]) -> Spec:
    """The network, in which the names of all inputs, also of other calls, are those of no other node."""
    names = {node.name: node.name for node in spec.nodes}
    for node in spec.nodes:
        if node.name in inputs and not isinstance(node.layer, Input):
            names[node.name] = unused(node.name, {*names.values(), *inputs})
    nodes = tuple(_renamed(node, names) for node in spec.nodes)
    return replace(spec, nodes=nodes, outputs=tuple(names[x] for x in spec.outputs))


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    """The node under other names, with its parameters where they are."""
    params = node.name if node.params is None and node.paths and names[node.name] != node.name else node.params
    return Node(names[node.name], node.layer, tuple(names[x] for x in node.inputs), params)


class _Overlay:
    """A network of ``count`` calls and that of one more, laid over each other.

    Attributes:
        names: for the nodes of the other network their names in the result.
        choices: the `Choose` between two values, by their names in the result.
    """

    def __init__(self, one: Spec, other: Spec, count: int) -> None:
        self.one, self.other, self.count = one, other, count
        self.values = propagate(one, Ties(labeled=False)), propagate(other, Ties(labeled=False))
        self.taken = {node.name for node in one.nodes}
        self.names: dict[str, str] = {}
        self.choices: dict[tuple[str, str], str] = {}
        self.nodes: list[Node] = []

    def network(self) -> Spec:
        """All nodes, in the order of both networks."""
        for node, twin in _pairs(self.one.nodes, self.other.nodes):
            if node is None or twin is None or not self._join(node, twin):
                if node is not None:
                    self._keep(node)
                if twin is not None:
                    self._add(twin)
        pairs = list(zip(self.one.outputs, self.other.outputs, strict=True))
        if others := [one for one, other in pairs if not self._fit(one, other)]:
            raise CaptureError(
                "One network stands for several calls with outputs of the same sizes; these have other sizes: "
                f"{', '.join(others)}. Capture the calls one by one."
            )
        outputs = tuple(self._choice(one, other) for one, other in pairs)
        return replace(self.one, nodes=tuple(self.nodes), outputs=outputs)

    def _join(self, node: Node, twin: Node) -> bool:
        """Let two nodes be one, if what they consume has the same shapes."""
        pairs = list(zip(node.inputs, twin.inputs, strict=True))
        if not all(self._fit(one, other) for one, other in pairs):
            return False
        self.names[twin.name] = node.name
        self.nodes.append(replace(node, inputs=tuple(self._choice(one, other) for one, other in pairs)))
        return True

    def _keep(self, node: Node) -> None:
        """A node of the first network alone. Its choices are made in the calls of that network only."""
        layer = node.layer
        self.nodes.append(replace(node, layer=Choose((*layer.of, 0))) if isinstance(layer, Choose) else node)

    def _add(self, twin: Node) -> None:
        """A node of the other network alone."""
        self.names[twin.name] = self._unused(twin.name)
        self.nodes.append(_renamed(twin, self.names))

    def _fit(self, one: str, other: str) -> bool:
        """Two values may stand for each other: they have the same axes, with the examples along the same ones."""
        if self.names[other] == one:
            return True
        (a, b) = (bounds[name].output for bounds, name in zip(self.values, (one, other), strict=True))
        return [*map(length, a)] == [*map(length, b)] and [*map(is_example, a)] == [*map(is_example, b)]

    def _choice(self, one: str, other: str) -> str:
        """The node of a value that is ``one`` in the first network and ``other`` in the other one."""
        pair = one, self.names[other]
        if pair[0] == pair[1]:
            return one
        if pair not in self.choices:
            self.choices[pair] = self._unused(f"choose_{len(self.choices)}")
            self.nodes.append(Node(self.choices[pair], Choose((*[0] * self.count, 1)), pair))
        return self.choices[pair]

    def _unused(self, name: str) -> str:
        name = unused(name, self.taken)
        self.taken.add(name)
        return name


def _pairs(nodes: Sequence[Node], others: Sequence[Node]) -> Iterator[tuple[Node | None, Node | None]]:
    """The nodes of two networks in the order of both: those that may be one in pairs, the others alone."""
    inputs, names = ({x.name: x for x in side if isinstance(x.layer, Input)} for side in (nodes, others))
    yield from ((inputs.get(name), names.get(name)) for name in {**inputs, **names})
    one, other = ([x for x in side if not isinstance(x.layer, Input)] for side in (nodes, others))
    matcher = SequenceMatcher(None, [*map(_kind, one)], [*map(_kind, other)], autojunk=False)
    for tag, start, stop, start_, stop_ in matcher.get_opcodes():
        if tag == "equal":
            yield from zip(one[start:stop], other[start_:stop_], strict=True)
        else:
            yield from ((node, None) for node in one[start:stop])
            yield from ((None, node) for node in other[start_:stop_])


def _kind(node: Node) -> tuple[object, ...]:
    """What two nodes agree in that may be one."""
    return type(node.layer), node.layer, tuple(node.paths.items()), len(node.inputs)
