"""A network as data: named nodes over layers, and the pure functions that run it.

A `Spec` is a flat tuple of nodes in an order in which every node comes after its inputs. It holds no tensor: parameters
are a separate tree, so that ``apply(params, spec, x)`` is a function of values alone and every transform of
``torch.func`` applies to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from heapq import heappop, heappush
from typing import Any, NamedTuple

from taylorfx.layers import Input, Layer, Shape, ShapeError, sizes
from taylorfx.layers import axes as language
from taylorfx.network.bind import propagate
from taylorfx.network.interface import Interface
from taylorfx.network.labels import Ties
from taylorfx.network.layout import Layout
from taylorfx.network.optional import Called, calls, chosen
from taylorfx.network.tables import columns

__all__ = ["Node", "Spec", "SpecError"]


class SpecError(ValueError):
    """A network that does not hang together, or parameters that do not fit it; the message lists every offender."""


@dataclass(frozen=True)
class Node:
    """One layer at its place: a unique name, the names of the nodes whose values it consumes.

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

    @cached_property
    def sized(self) -> bool:
        """Whether the layer holds numbers that follow from the shapes of the network's inputs."""
        return sizes.has_sizes(tuple(vars(self.layer).values()))

    def at(self, axes: sizes.Axes, *, plain: bool = False) -> Node:
        """The same node with the numbers for inputs of these shapes."""
        return _with_layer(self, sizes.at(self.layer, axes, plain=plain))


class Step(NamedTuple):
    """One node of a run.

    Attributes:
        leaves: for each of its parameters the name in the layer, and the place among the paths of the spec's layout.
        unused: the values that no later node uses.
    """

    node: Node
    leaves: tuple[tuple[str, int], ...]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class Spec:
    """A network: nodes in the order of evaluation, and the names of those whose values it gives out.

    Immutable, hashable, comparable; ``print(spec)`` shows it as a table. One output is given out as a tensor, several
    as a tuple; with ``keys``, one for each, as a dict. ``interface`` is what a captured module is beyond its nodes.

    The layers of a captured network hold the numbers of its example. Those that follow from the shapes of the inputs
    are `taylorfx.layers.sizes.Size`, and `at` gives the network for inputs of other shapes. ``guards`` are conditions
    on several sizes at once, without which the network would not be the module's.

    Raises:
        SpecError: for duplicate names, inputs that no node has, or a cycle: all of them at once.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    interface: Interface | None = None
    guards: tuple[sizes.Formula, ...] = ()
    layout: Layout = field(init=False, repr=False, compare=False)
    steps: tuple[Step, ...] = field(init=False, repr=False, compare=False)
    sized: bool = field(init=False, repr=False, compare=False)
    input_layers: Mapping[str, Input] = field(init=False, repr=False, compare=False)
    _fitted: dict[tuple[Shape, ...], tuple[Step, ...]] = field(init=False, repr=False, compare=False)
    calls: Mapping[tuple[str, ...], Called] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        nodes = tuple(self.nodes)
        outputs = (self.outputs,) if isinstance(self.outputs, str) else tuple(self.outputs)
        object.__setattr__(self, "outputs", outputs or tuple(node.name for node in nodes[-1:]))
        object.__setattr__(self, "nodes", _order(nodes, self.outputs))
        # What every run needs is no cached_property: torch.compile does not trace the lock of one.
        object.__setattr__(self, "layout", Layout.of([path for node in self.nodes for path in node.paths.values()]))
        object.__setattr__(self, "steps", _steps(self.nodes, self.outputs, self.layout))
        layers = {node.name: node.layer for node in self.nodes if isinstance(node.layer, Input)}
        object.__setattr__(self, "input_layers", layers)
        object.__setattr__(self, "sized", any(node.sized for node in self.nodes))
        object.__setattr__(self, "_fitted", {})
        object.__setattr__(self, "calls", calls(self))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fitted": {}}

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes where tensors come in, in the order in which `apply` takes them."""
        return tuple(node for node in self.nodes if isinstance(node.layer, Input))

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        """The nodes by their names."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[Node, ...]]:
        """For every node those that consume its value, in order; one that does so twice stands there twice."""
        consumers: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in node.inputs:
                consumers[name].append(node)
        return {name: tuple(nodes) for name, nodes in consumers.items()}

    @cached_property
    def uses(self) -> Mapping[str, int]:
        """How often the value of every node is used: consumed, or given out by the network."""
        return {name: len(nodes) + self.outputs.count(name) for name, nodes in self.consumers.items()}

    @cached_property
    def owners(self) -> Mapping[str, tuple[Node, ...]]:
        """For the path of every parameter the nodes that have it, in order; several share it."""
        owners: dict[str, list[Node]] = {}
        for node in self.nodes:
            for path in node.paths.values():
                owners.setdefault(path, []).append(node)
        return {path: tuple(nodes) for path, nodes in owners.items()}

    def upstream(self, names: Iterable[str]) -> set[str]:
        """These nodes and all whose values they depend on."""
        reached = set(names)
        for node in reversed(self.nodes):  # every node comes after its inputs
            if node.name in reached:
                reached.update(node.inputs)
        return reached

    def downstream(self, names: Iterable[str]) -> set[str]:
        """These nodes and all whose values depend on theirs."""
        reached = set(names)
        for node in self.nodes:
            if not reached.isdisjoint(node.inputs):
                reached.add(node.name)
        return reached

    def part(self, names: Iterable[str], outputs: Sequence[str], keys: Sequence[str] = ()) -> Spec:
        """The network of these nodes alone, which gives out ``outputs``.

        What they consume of other nodes comes in: there is an `Input` node of that name.

        >>> from taylorfx import layers as L
        >>> nodes = Node("x", L.Input((3,))), Node("a", L.Linear(3, 2), "x"), Node("b", L.ReLU(), "a")
        >>> [(node.name, node.layer.title) for node in Spec(nodes).part(["b"], ["b"])]
        [('a', 'Input'), ('b', 'ReLU')]
        """
        chosen = set(names)
        nodes = [node for node in self.nodes if node.name in chosen]
        needed = dict.fromkeys([*(x for node in nodes for x in node.inputs), *outputs])
        inputs = (Node(name, Input()) for name in needed if name not in chosen)
        # What follows from the shapes of inputs that are no longer there stays as it is here.
        nodes = [node.at(self.axes(), plain=True) if node.sized else node for node in nodes]
        return Spec((*inputs, *nodes), tuple(outputs), tuple(keys))

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
        return self.by_name[name]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __str__(self) -> str:
        return self.table()

    def table(self, *shapes: Shape) -> str:
        """Name, layer, output shape, parameters and FLOPs (two per multiply-add) of every node, for one example.

        Shapes are those of the inputs, one example each; by default those that the `Input` nodes declare. Where the
        input's shape is not known, shapes and FLOPs are left out. Conditions on sizes (``guards``) stand below.
        """
        spec = self.at(*shapes) if shapes else self
        known = all(layer.shape is not None for layer in spec.input_layers.values())
        bounds = propagate(spec, Ties(labeled=False)) if known else {}
        rows, seen, total, work = [("name", "layer", "output", "parameters", "FLOPs")], set[str](), 0, 0
        for node in spec.nodes:
            trained = {x: shape for x, shape in node.shapes.items() if x not in node.layer.buffers}
            counts = {node.path(leaf): math.prod(shape) for leaf, shape in trained.items()}
            count = sum(n for path, n in counts.items() if path not in seen)
            seen.update(counts)
            bound = bounds.get(node.name)
            cost = 2 * language.products(node.layer.multiplies, bound.sizes) if bound else 0
            total, work = total + count, work + cost
            shape = "x".join(map(str, bound.shape[1:])) if bound else "-"
            shared = "shared" if counts and not count else f"{count:,}" if count else ""
            rows.append((node.name, str(node.layer), shape, shared, f"{cost:,}" if cost else ""))
        rows.append(("", "", "total", f"{total:,}", f"{work:,}" if known else "-"))
        return columns(rows) + "".join(f"\nif {sizes.shown(guard)}" for guard in self.guards)

    def at(self, *shapes: Shape) -> Spec:
        """The same network for inputs of these shapes (of one example).

        >>> from taylorfx import layers as L
        >>> from taylorfx.layers.sizes import Size
        >>> rows = L.View((1, Size(4, "x.1"), 1))
        >>> spec = Spec((Node("x", L.Input((4,))), Node("rows", rows, "x")))
        >>> spec.at((6,))["rows"].layer.shape
        (1, 6, 1)

        Raises:
            SpecError: if there are not as many shapes as inputs.
            ShapeError: if the network is not the module's at these sizes; every reason is listed.
        """
        names = [node.name for node in self.inputs]
        if len(shapes) != len(names):
            raise SpecError(
                f"Shapes are as many as the network's Input nodes, {len(names)} ({', '.join(names)}); "
                f"received {len(shapes)}."
            )
        declared = self.declared({name: {"shape": shape} for name, shape in zip(names, shapes, strict=True)})
        if not self.sized and not self.guards:
            return declared
        axes = declared.axes()
        declared.refuse(axes)
        return replace(declared, nodes=tuple([node.at(axes) if node.sized else node for node in declared.nodes]))

    def axes(self, shapes: Mapping[str, Sequence[Any]] | None = None) -> dict[str, Any]:
        """The sizes of the inputs' axes by name, ``"x.1"``; axis 0, that of the examples, is left out.

        Args:
            shapes: those of one example, by the names of the inputs; by default those that the inputs declare.
        """
        if shapes is None:
            declared = {name: layer.shape for name, layer in self.input_layers.items()}
            shapes = {name: shape for name, shape in declared.items() if isinstance(shape, tuple)}
        return {f"{name}.{k}": n for name, shape in shapes.items() for k, n in enumerate(shape, 1)}

    def refuse(self, axes: sizes.Axes) -> None:
        """Refuse sizes at which a captured network would compute something else than its module.

        Raises:
            ShapeError: with every axis that has another size than it may have, and every condition that does not hold.
        """
        wrong: list[str] = []
        for name, layer in self.input_layers.items():
            shape = tuple([axes[f"{name}.{k}"] for k in range(1, len(layer.ranges) + 1) if f"{name}.{k}" in axes])
            rank = len(layer.ranges)
            if text := layer.refusal(shape):
                wrong.append(f"{name}: {text}")
            elif shape and rank and (len(shape) < rank or f"{name}.{rank + 1}" in axes):
                count = sum(axis.rpartition(".")[0] == name for axis in axes)
                wrong.append(f"{name}: it has {rank} axes besides that of the examples, received {count}")
        for guard in self.guards if not wrong else ():
            here = {axis: axes[axis] for axis in sorted(sizes.axes_of(guard)) if axis in axes}
            # What is said of an input that was left out holds.
            if len(here) == len(sizes.axes_of(guard)) and not sizes.value(guard, axes):
                received = ", ".join(f"{axis} of size {n}" for axis, n in here.items())
                wrong.append(f"it takes sizes with {sizes.shown(guard)}, received {received}")
        if wrong:
            raise ShapeError(
                "A captured network takes the sizes at which it computes what its module does; received:\n  "
                + "\n  ".join(wrong)
                + "\nCapture the module on an example of this size, from_torch(module, example)."
            )

    def fitted(self, shapes: Mapping[str, Sequence[Any]]) -> tuple[Step, ...]:
        """The steps for inputs of these shapes (of one example), remembered for every shape that was seen.

        Raises:
            ShapeError: as `at` does.
        """
        key = tuple([tuple(shape) for shape in shapes.values()])
        steps = self._fitted.get(key)
        if steps is None:
            axes = self.axes(shapes)
            self.refuse(axes)
            steps = self.fitted_anew(axes) if self.sized else self.steps
            if len(self._fitted) >= _REMEMBERED:
                self._fitted.clear()
            self._fitted[key] = steps
        return steps

    def fitted_anew(self, axes: sizes.Axes) -> tuple[Step, ...]:
        """The steps for inputs with axes of these sizes, which may be torch's symbols; nothing is refused."""
        return tuple(
            [step._replace(node=step.node.at(axes, plain=True)) if step.node.sized else step for step in self.steps]
        )

    def called(self, *names: str) -> Spec:
        """The network of the call with these inputs, which computes what is needed for it, and nothing else.

        >>> from taylorfx import layers as L
        >>> x, mask = Node("x", L.Input((3,))), Node("mask", L.Input((3,), calls=(True, False)))
        >>> product = Node("product", L.Multiply(), ("x", "mask"))
        >>> spec = Spec((x, mask, product, Node("y", L.Choose((0, 1)), ("product", "x"))))
        >>> [node.name for node in spec.called("x", "mask")], [node.name for node in spec.called("x")]
        (['x', 'mask', 'product', 'y'], ['x', 'y'])

        Raises:
            ShapeError: if the network is not called so.
        """
        networks = self.calls or {tuple(self.input_layers): Called(self, ())}
        return chosen(networks, names).spec

    @property
    def first(self) -> Spec:
        """The network of the first way to call this one, whose FLOPs, memory and latency count; mostly itself."""
        return next(iter(self.calls.values())).spec if self.calls else self

    def declared(self, fields: Mapping[str, Mapping[str, Any]]) -> Spec:
        """The same network whose `Input` nodes say this: their fields, by the names of the nodes."""
        nodes = {name: replace(self[name], layer=replace(self[name].layer, **new)) for name, new in fields.items()}
        return replace(self, nodes=tuple(nodes.get(node.name, node) for node in self.nodes))


_REMEMBERED = 256
"""For how many shapes of the inputs a network remembers its steps."""


def _with_layer(node: Node, layer: Layer) -> Node:
    """The same node with another layer, which torch.compile can trace."""
    new = object.__new__(Node)
    new.__dict__.update({**{k: v for k, v in node.__dict__.items() if k != "sized"}, "layer": layer})
    return new


def _steps(nodes: Sequence[Node], outputs: Sequence[str], layout: Layout) -> tuple[Step, ...]:
    """The nodes with where their parameters lie, and which values no later node uses."""
    last = {name: k for k, node in enumerate(nodes) for name in node.inputs}
    unused: list[list[str]] = [[] for _ in nodes]
    for name, k in last.items():
        if name not in outputs:
            unused[k].append(name)
    place = {path: k for k, path in enumerate(layout.paths)}
    leaves = [tuple([(leaf, place[path]) for leaf, path in node.paths.items()]) for node in nodes]
    return tuple(map(Step, nodes, leaves, map(tuple, unused)))


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
        errors += [f"{node.name!r} consumes {x!r}, which no node is named" for x in node.inputs if x not in names]
    errors += [f"the output {x!r} is no node" for x in outputs if x not in names]
    missing = [{*node.inputs} & names.keys() for node in nodes]
    waiting: dict[str, list[int]] = {name: [] for name in names}
    for k, name in ((k, name) for k, inputs in enumerate(missing) for name in inputs):
        waiting[name].append(k)
    ready = [k for k, inputs in enumerate(missing) if not inputs]  # a heap: what was given first comes first
    ordered: list[Node] = []
    while ready:
        node = nodes[heappop(ready)]
        ordered.append(node)
        for k in waiting.pop(node.name, ()):
            missing[k].discard(node.name)
            if not missing[k]:
                heappush(ready, k)
    if cyclic := [repr(node.name) for node, inputs in zip(nodes, missing, strict=True) if inputs]:
        errors.append(f"the nodes {', '.join(cyclic)} lie on or behind a cycle")
    if errors:
        raise SpecError("A network is a graph of named nodes without cycles; received:\n  " + "\n  ".join(errors))
    return tuple(ordered)
