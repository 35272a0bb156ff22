"""A network as data: named nodes over layers, and the pure functions that run it.

A `Spec` is a flat tuple of nodes in an order in which every node comes after its inputs. It holds no tensor: parameters
are a separate tree, so that ``apply(params, spec, x)`` is a function of values alone and every transform of
``torch.func`` applies to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor

from taylorfx import axes as language
from taylorfx.interface import Interface
from taylorfx.labels import Ties
from taylorfx.layers import Input, Layer, Shape, ShapeError
from taylorfx.sizes import propagate
from taylorfx.text import columns
from taylorfx.tree import Params, flatten, merge, unflatten

__all__ = [
    "Inputs", "Node", "Spec", "SpecError", "Tap", "apply", "check", "evaluate", "init", "partition",
    "propagate", "train",
]  # fmt: skip

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a network takes: a tensor, a tuple in the order of its inputs, or a dict by their names."""

Tap = Callable[[str, int, Tensor], Tensor]
"""Called with a node's name, a slot (an input's number, or -1 for its output) and the tensor there; returns it."""


class SpecError(ValueError):
    """A network that does not hang together, or parameters that do not fit it; the message lists every offender."""


@dataclass(frozen=True)
class Node:
    """One layer at its place: a unique name, the names of the nodes that it hears.

    ``params`` is the path of its parameters where that is not the node's name: two nodes with one path share them. As
    a tuple of pairs it says the path of single ones: ``(("weight", "embed.weight"),)``.
    """

    name: str
    layer: Layer
    inputs: tuple[str, ...] = ()
    params: str | tuple[tuple[str, str], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", (self.inputs,) if isinstance(self.inputs, str) else tuple(self.inputs))

    def path(self, leaf: str) -> str:
        """Where a parameter of this node's layer lies in the tree."""
        for name, path in self.params if isinstance(self.params, tuple) else ():
            if name == leaf:
                return path
        base = self.params if isinstance(self.params, str) else self.name
        return base if self.layer.leaf else f"{base}.{leaf}"

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """The shapes of all its parameters, by their names in the layer."""
        return self.layer.shapes()

    @cached_property
    def paths(self) -> Mapping[str, str]:
        """The paths of all its parameters, by their names in the layer."""
        return {leaf: self.path(leaf) for leaf in self.shapes}


@dataclass(frozen=True)
class Spec:
    """A network: nodes in the order of evaluation, and the names of those whose values it gives out.

    Immutable, hashable, comparable; ``print(spec)`` shows it as a table. One output is given out as a tensor, several
    as a tuple; with ``keys``, one for each, as a dict. ``interface`` is what a captured module is beyond its nodes.

    Raises:
        SpecError: for duplicate names, inputs that no node has, or a cycle: all of them at once.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    interface: Interface | None = None

    def __post_init__(self) -> None:
        nodes = tuple(self.nodes)
        outputs = (self.outputs,) if isinstance(self.outputs, str) else tuple(self.outputs)
        object.__setattr__(self, "outputs", outputs or tuple(node.name for node in nodes[-1:]))
        object.__setattr__(self, "nodes", _order(nodes, self.outputs))
        last = {name: k for k, node in enumerate(self.nodes) for name in node.inputs}
        done: list[list[str]] = [[] for _ in self.nodes]
        for name, k in last.items():
            if name not in self.outputs:
                done[k].append(name)
        leaves = [tuple([(leaf, tuple(path.split("."))) for leaf, path in x.paths.items()]) for x in self.nodes]
        object.__setattr__(self, "_steps", tuple(zip(self.nodes, leaves, done, strict=True)))

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes where tensors come in, in the order in which `apply` takes them."""
        return tuple(node for node in self.nodes if isinstance(node.layer, Input))

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of every parameter, by path.

        Raises:
            SpecError: if nodes that share a parameter want it of different shapes; all of them are listed.
        """
        shapes: dict[str, Shape] = {}
        errors: list[str] = []
        for node in self.nodes:
            for path, shape in zip(node.paths.values(), node.shapes.values(), strict=True):
                known = shapes.setdefault(path, shape)
                if known != shape:
                    errors.append(f"{path}: {node.name} expects {shape}, a node before it {known}")
        if errors:
            raise SpecError("Nodes share parameters of one shape; received:\n  " + "\n  ".join(errors))
        return shapes

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __str__(self) -> str:
        return self.table()

    def table(self, *shapes: Shape) -> str:
        """Name, layer, output shape, parameters and FLOPs (two per multiply-add) of every node, for one example.

        Shapes are those of the inputs, one example each; by default those that the `Input` nodes declare. Where the
        input's shape is not known, shapes and FLOPs are left out.
        """
        spec = self.at(*shapes) if shapes else self
        known = all(node.layer.shape is not None for node in spec.inputs if isinstance(node.layer, Input))
        bounds = propagate(spec, Ties(labeled=False)) if known else {}
        rows, seen, total, work = [("name", "layer", "output", "parameters", "FLOPs")], set[str](), 0, 0
        for node in spec.nodes:
            trained = {x: shape for x, shape in node.shapes.items() if x not in node.layer.buffers}
            sizes = {node.path(leaf): math.prod(shape) for leaf, shape in trained.items()}
            count = sum(n for path, n in sizes.items() if path not in seen)
            seen.update(sizes)
            bound = bounds.get(node.name)
            cost = 2 * language.products(node.layer.multiplies, bound.sizes) if bound else 0
            total, work = total + count, work + cost
            shape = "x".join(map(str, bound.shape[1:])) if bound else "-"
            shared = "shared" if sizes and not count else f"{count:,}" if count else ""
            rows.append((node.name, str(node.layer), shape, shared, f"{cost:,}" if cost else ""))
        rows.append(("", "", "total", f"{total:,}", f"{work:,}" if known else "-"))
        return columns(rows)

    def at(self, *shapes: Shape) -> Spec:
        """The same network for inputs of these shapes (of one example)."""
        names = [node.name for node in self.inputs]
        if len(shapes) != len(names):
            raise SpecError(
                f"Shapes are as many as the network's Input nodes, {len(names)} ({', '.join(names)}); "
                f"received {len(shapes)}."
            )
        return self.declared({name: {"shape": shape} for name, shape in zip(names, shapes, strict=True)})

    def declared(self, fields: Mapping[str, Mapping[str, Any]]) -> Spec:
        """The same network whose `Input` nodes say this: their fields, by the names of the nodes."""
        made = {name: replace(self[name], layer=replace(self[name].layer, **given)) for name, given in fields.items()}
        return replace(self, nodes=tuple(made.get(n.name, n) for n in self.nodes))


def _order(nodes: tuple[Node, ...], outputs: tuple[str, ...]) -> tuple[Node, ...]:
    """The nodes such that each comes after its inputs, otherwise as given."""
    names = {node.name: k for k, node in enumerate(nodes)}
    forward = all([names.get(x, k) < k for k, node in enumerate(nodes) for x in node.inputs])  # noqa: C419, lists are faster
    if nodes and forward and len(names) == len(nodes) and names.keys() >= {*outputs}:
        return nodes
    seen: set[str] = set()
    errors = [] if nodes else ["a network has at least one node; received none"]
    for node in nodes:
        if node.name in seen:
            errors.append(f"two nodes are named {node.name!r}; give each node a name of its own")
        seen.add(node.name)
        errors += [f"{node.name!r} hears {x!r}, which no node is named" for x in node.inputs if x not in names]
    errors += [f"the output {x!r} is no node" for x in outputs if x not in names]
    missing = [{*node.inputs} & names.keys() for node in nodes]
    hearers: dict[str, list[int]] = {name: [] for name in names}
    for k, name in ((k, name) for k, heard in enumerate(missing) for name in heard):
        hearers[name].append(k)
    ready = [k for k, heard in enumerate(missing) if not heard]  # a heap: what was given first comes first
    ordered: list[Node] = []
    while ready:
        node = nodes[heappop(ready)]
        ordered.append(node)
        for k in hearers.pop(node.name, ()):
            missing[k].discard(node.name)
            if not missing[k]:
                heappush(ready, k)
    if cyclic := [repr(node.name) for node, heard in zip(nodes, missing, strict=True) if heard]:
        errors.append(f"the nodes {', '.join(cyclic)} lie on or behind a cycle")
    if errors:
        raise SpecError("A network is a graph of named nodes without cycles; received:\n  " + "\n  ".join(errors))
    return tuple(ordered)


def init(
    spec: Spec, generator: torch.Generator, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Fresh parameters, distributed as torch initializes its layers; shared ones are drawn once."""
    leaves: dict[str, Tensor] = {}
    for node in spec.nodes:
        try:
            fresh = node.layer.init(generator)
        except RuntimeError as error:
            raise SpecError(f"{node.name}: {node.layer} cannot be initialized: {error}") from error
        for leaf, tensor in fresh.items():
            if node.path(leaf) not in leaves:
                leaves[node.path(leaf)] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    params = unflatten(leaves)
    check(params, spec)
    return params


def apply(
    params: Params, spec: Spec, *inputs: Inputs, gates: Mapping[tuple[str, int, int], Tensor] | None = None
) -> Any:
    """The network's value in inference: a pure function of the parameters, the inputs and the gates.

    Args:
        inputs: tensors ``(N, ...)`` in the order of the `Input` nodes, or one tuple or dict of them.
        gates: factors at the reads, from ``plan.gates`` or `taylorfx.gates`; none is the network itself.

    Returns:
        The output tensor, or a tuple of them.

    Raises:
        SpecError: if parameters are missing, too many or misshapen.
        ShapeError: if the inputs do not fit.
    """
    tap = None
    if gates is not None:
        tap = gating(gates)
        strange = {name for name, _, _ in gates} - {node.name for node in spec.nodes}
        if strange and not torch.compiler.is_compiling():
            raise SpecError(
                f"Gates lie at the reads of their own network; received some at {', '.join(sorted(strange))}, which "
                "this one does not have. Make them from its own coupling or plan."
            )
    return evaluate(params, spec, inputs, tap=tap)[0]


def train(params: Params, spec: Spec, *inputs: Inputs, generator: torch.Generator | None = None) -> tuple[Any, Params]:
    """The network's value in training, and the parameters with their new running statistics.

    Batch norms normalize by the batch; dropout draws from ``generator``.
    """
    return evaluate(params, spec, inputs, training=True, generator=generator)


def gating(gates: Mapping[tuple[str, int, int], Tensor]) -> Tap:
    """The tap that multiplies what is read by its gates."""
    places: dict[tuple[str, int], list[Tensor]] = {}
    for (name, slot, _), gate in gates.items():
        places.setdefault((name, slot), []).append(gate)

    def tap(name: str, slot: int, x: Tensor) -> Tensor:
        for gate in places.get((name, slot), ()):
            # Gates of every example's own may meet a tensor that is the same for all: it becomes one of each.
            if any(m not in (1, n) for m, n in zip(reversed(gate.shape), reversed(x.shape), strict=False)):
                raise ShapeError(f"Gates fit what is read, {tuple(x.shape)}; received gates {tuple(gate.shape)}.")
            x = x * gate.to(x)  # gates follow the activations' dtype and device
        return x

    return tap


def evaluate(
    params: Params,
    spec: Spec,
    inputs: Sequence[Inputs],
    *,
    tap: Tap | None = None,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Any, Params]:
    """Run the nodes in order. Everything that runs a network comes through here."""
    if not torch.compiler.is_compiling():
        check(params, spec)
    values = bind_inputs(spec, inputs)
    alone = [node for node in spec.inputs if node.layer.alone and len(values[node.name]) != 1]  # type: ignore[attr-defined]
    if alone and not training and all(node.layer.apart for node in alone):  # type: ignore[attr-defined]
        return _one_by_one(params, spec, values, tap), params
    if alone:
        raise ShapeError(
            "This network takes one example at a time: it was captured from a module made for a fixed number of them. "
            "Give batches of one."
        )
    if not torch.compiler.is_compiling():
        _refuse_sizes(spec, values)
    moved: dict[str, Tensor] = {}  # running statistics, which a shared layer hears of at once
    try:
        for node, leaves, done in spec._steps:  # type: ignore[attr-defined]
            if node.name not in values:
                found = {leaf: _at(params, path) for leaf, path in leaves}
                args = [values[x] for x in node.inputs]
                if tap is not None:
                    args = [tap(node.name, slot, x) for slot, x in enumerate(args)]
                if training:
                    found |= {leaf: moved[node.path(leaf)] for leaf in node.layer.buffers if node.path(leaf) in moved}
                    value, new = node.layer.train(found, *args, generator=generator)
                    moved |= {node.path(leaf): tensor for leaf, tensor in new.items()}
                else:
                    value = node.layer.apply(found, *args)
                values[node.name] = value if tap is None else tap(node.name, -1, value)
            for name in done:
                del values[name]
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        if not torch.compiler.is_compiling():
            _explain(params, spec, bind_inputs(spec, inputs), node, error)
        raise
    outputs = tuple(values[x] for x in spec.outputs)
    if spec.keys:
        return dict(zip(spec.keys, outputs, strict=True)), merge(params, moved)
    return outputs[0] if len(outputs) == 1 else outputs, merge(params, moved)


def _one_by_one(params: Params, spec: Spec, values: Mapping[str, Tensor], tap: Tap | None) -> Any:
    """The outputs for every example of a batch alone, joined along axis 0."""
    count = max(map(len, values.values()))
    given = [{name: x[k : k + 1] for name, x in values.items()} for k in range(count)]
    found = [evaluate(params, spec, (one,), tap=tap)[0] for one in given]
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    if isinstance(found[0], Mapping):
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}
    return tuple(map(torch.cat, zip(*found, strict=True)))


def bind_inputs(spec: Spec, inputs: Sequence[Inputs]) -> dict[str, Any]:
    """The tensors that come in, by the names of the input nodes."""
    given: Any = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], (Mapping, Sequence)) else inputs
    names = [node.name for node in spec.inputs]
    if isinstance(given, Mapping) and set(given) != set(names):
        raise ShapeError(
            f"Inputs are named as the network's Input nodes, {', '.join(names)}; received {', '.join(given)}."
        )
    if len(given) != len(names):
        raise ShapeError(
            f"Inputs are as many as the network's Input nodes, {len(names)} ({', '.join(names)}); "
            f"received {len(given)}."
        )
    return dict(given) if isinstance(given, Mapping) else dict(zip(names, given, strict=True))


def _refuse_sizes(spec: Spec, values: Mapping[str, Any]) -> None:
    """Refuse sizes at which a captured network would compute something else than its module."""
    found = {node.name: node.layer.refusal(values[node.name].shape[1:]) for node in spec.inputs}  # type: ignore[attr-defined]
    if wrong := [f"{name}: {text}" for name, text in found.items() if text]:
        raise ShapeError(
            "A captured network takes the sizes at which it computes what its module does; received:\n  "
            + "\n  ".join(wrong)
            + "\nCapture the module on an example of this size, from_torch(module, example)."
        )


def _at(params: Params, path: tuple[str, ...]) -> Tensor:
    value: Any = params
    for key in path:
        value = value[key]
    assert isinstance(value, Tensor)
    return value


def check(params: Params, spec: Spec) -> None:
    """Refuse parameters that do not fit the network.

    Raises:
        SpecError: listing every parameter that is missing, unknown, misshapen or no tensor.
    """
    if not isinstance(params, Mapping) or not isinstance(spec, Spec):
        raise SpecError(
            "Parameters are nested dicts of tensors and come first, then the network, a Spec; "
            f"received {type(params).__name__}, {type(spec).__name__}."
        )
    expected, leaves = spec.shapes, flatten(params)
    errors = [f"{path}: missing, expected {shape}" for path, shape in expected.items() if path not in leaves]
    for path, leaf in leaves.items():
        shape = expected.get(path)
        if shape is None:
            errors.append(f"{path}: no layer has such a parameter")
        elif not isinstance(leaf, Tensor):
            errors.append(f"{path}: expected a tensor, received {type(leaf).__name__}")
        elif leaf.shape != shape:
            errors.append(f"{path}: expected {shape}, received {tuple(leaf.shape)}")
    if errors:
        raise SpecError("Parameters have to fit the network; received:\n  " + "\n  ".join(errors))


def _explain(params: Params, spec: Spec, values: Mapping[str, Any], node: Node, error: Exception) -> None:
    """Say what is wrong with the inputs where torch's own error would not say where."""
    strange = [f"{name} is {type(x).__name__}" for name, x in values.items() if not isinstance(x, Tensor)]
    if strange:
        raise ShapeError(f"A network takes tensors; received: {', '.join(strange)}.") from error
    try:
        propagate(spec.at(*(tuple(values[n.name].shape[1:]) for n in spec.inputs)), Ties(labeled=False))
    except ShapeError as problem:
        found = ", ".join(f"{name} {tuple(x.shape)}" for name, x in values.items())
        raise ShapeError(f"{problem}\n(with inputs of shape {found})") from error
    if isinstance(error, ValueError):  # a layer's own words
        raise ShapeError(f"{node.name}: {error}") from error
    tensors = {**{f"input {name}": x for name, x in values.items()}, **flatten(params)}
    kinds: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            kinds.setdefault(f"{tensor.dtype} on {tensor.device}", []).append(name)
    if len(kinds) > 1:
        lines = [f"{kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" for kind, names in kinds.items()]
        raise ShapeError(
            "Inputs and parameters have to agree in dtype and device; received:\n  "
            + "\n  ".join(lines)
            + f"\nfirst met at {node.name} ({type(node.layer).__name__}); convert one of them, x.to(...)."
        ) from error
    raise ShapeError(f"{node.name}: {type(node.layer).__name__} failed: {error}") from error


def partition(params: Params, spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate what is trained from what is not (running statistics, frozen parameters); `combine` joins them again."""
    buffers = {*(spec.interface.frozen if spec.interface else ())}
    buffers |= {node.path(leaf) for node in spec.nodes for leaf in node.layer.buffers}
    leaves = flatten(params)
    return (
        unflatten((path, leaf) for path, leaf in leaves.items() if path not in buffers),
        unflatten((path, leaf) for path, leaf in leaves.items() if path in buffers),
    )
