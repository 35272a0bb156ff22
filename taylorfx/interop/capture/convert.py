"""The network that a captured graph becomes: its nodes, and where the graph's values are found among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from taylorfx import layers as L
from taylorfx.internals import pytree
from taylorfx.interop.capture.arguments import (
    Unmapped,
    argument,
    called_with,
    coefficient,
    measured,
    named_dtype,
    nothing,
    tensor_node,
    tensors_of,
    whole,
    wholes,
)
from taylorfx.interop.capture.symbols import Open, OpenRatio
from taylorfx.layers import Layer, Shape
from taylorfx.layers.experts import Score
from taylorfx.layers.operators import COUNT, DEVICE, DTYPE, SLOT
from taylorfx.network.spec import Node

__all__ = ["Convert", "Converter", "Operand", "Router"]

Operand = bool | int | float | str | None | tuple["Operand", ...]
"""An argument as a layer keeps it: a plain value, or a tuple; ``("$", 0)`` stands for the first input."""


Converter = Callable[["Convert", fx.Node], None]
"""``converter(c, node)`` writes the nodes of a graph's operator, or raises `Unmapped`."""

RULES: dict[str, Converter] = {}
"""Rules from outside, by operator; see `taylorfx.interop.rule`."""

SEVERAL = {
    "topk": (2, "dim"), "sort": (1, "dim"), "max": (1, "dim"), "min": (1, "dim"), "median": (1, "dim"),
    "mode": (1, "dim"), "kthvalue": (2, "dim"), "var_mean": (1, "dim"), "std_mean": (1, "dim"), "cummax": (1, "dim"),
    "cummin": (1, "dim"),
}  # fmt: skip
"""Operators along axes that have several results, and which argument names the axes."""

OVER_SPACE = (
    "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d",
)  # fmt: skip
"""Operators on every map alone that have several results."""

SEPARATE = {
    "gather": (1, "dim", None), "scatter": (1, "dim", None), "scatter_add": (1, "dim", None),
    "index_select": (1, "dim", None), "diff": (2, "dim", -1), "im2col": None, "col2im": None, "grid_sampler": None,
    "bilinear": None, "lstm": None, "gru": None, "rnn_tanh": None, "rnn_relu": None,
}  # fmt: skip
"""Operators without a rule that treat every example alone, and which argument names the axis that they work along."""


class Router(NamedTuple):
    """How experts are chosen.

    Attributes:
        inputs: the nodes that give their gates, their logits, and the bias of the choice where there is one.
        score: what the logits become.
    """

    inputs: tuple[str, ...]
    score: Score = "softmax"


class Convert:
    """The network so far: nodes, and where the graph's values are found among them."""

    def __init__(self, *, alone: bool = False, cumulative: frozenset[str] = frozenset()) -> None:
        self.alone = alone
        self.cumulative = cumulative
        """Running means that are averages over all batches."""
        self.nodes: list[Node] = []
        self.names: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.paths: dict[str, tuple[str, bool]] = {}
        self.constants: dict[str, Tensor] = {}
        """Tensors that depend on nothing but numbers."""
        self.pieces: dict[str, Sequence[Tensor]] = {}
        """The same of operators with several results."""
        self.taken: set[str] = set()
        self.reference: str | None = None
        self.first: str | None = None
        """The first input, on whose device tensors are made."""
        self.routers: dict[str, Router] = {}
        """By ``topk`` that chooses experts, how it does."""
        self.counting: set[str] = set()
        """The graph's values that number the examples."""

    # Inputs, parameters and constants.

    def user_input(self, node: fx.Node) -> None:
        shape, axis = measured(node)
        if axis != 0 and not self.alone:
            raise ValueError(f"{node.name} does not have the examples along axis 0")
        self.add(node, L.Input(_numbers(shape[1:]), self.alone, dtype=named_dtype(node.meta["val"])), ())
        self.first = self.first or self.names[node.name]
        if axis == 0 and self.reference is None:
            self.reference = self.names[node.name]

    def parameter(self, node: fx.Node, tensor: Tensor, path: str, trained: bool | None = None) -> None:
        self.tensors[path] = tensor.detach()
        self.paths[node.name] = path, isinstance(tensor, torch.nn.Parameter) if trained is None else trained

    def constant(self, node: fx.Node, tensor: Tensor, name: str) -> None:
        self.constants[node.name] = tensor
        self.parameter(node, tensor, f"constants.{name.replace('.', '_')}", False)

    # Values of the graph, as nodes of the network.

    def path(self, node: object) -> str:
        """The path of an argument that is one of the module's own tensors."""
        if not isinstance(node, fx.Node) or node.name not in self.paths:
            raise Unmapped
        return self.paths[node.name][0]

    def tensor(self, node: fx.Node) -> str:
        """The name of the node that gives this value.

        Raises:
            ValueError: for a value with nothing in it.
        """
        if node.name not in self.names:
            if node.name not in self.paths and nothing(node):
                raise ValueError(f"{node.name} has nothing in it, its sizes are {measured(node)[0]}")
            path, trained = self.paths[node.name]
            tensor = self.tensors[path]
            shape = tuple(tensor.shape)
            if path not in self.taken:
                layer = L.Parameter(shape) if trained else L.Buffer(shape, dtype=named_dtype(tensor))
                self.nodes.append(Node(path, layer))
                self.taken.add(path)
            self.names[node.name] = path
        return self.names[node.name]

    # Writing nodes.

    def add(
        self,
        node: fx.Node,
        layer: Layer,
        inputs: Sequence[str],
        *,
        leaves: Mapping[str, str] | None = None,
        tag: str = "",
    ) -> str:
        """Write the node of a graph's value; ``leaves`` says where its parameters lie."""
        leaves = leaves or {}
        home = {path.rpartition(".")[0] for path in leaves.values()}
        name = home.pop() if len(home) == 1 else ""
        if not name or name in self.taken or any(path.startswith(f"{name}.") for path in self.taken):
            name = f"{node.name}{tag}"
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        moved = tuple((leaf, path) for leaf, path in leaves.items() if path != f"{name}.{leaf}")
        self.nodes.append(Node(name, layer, tuple(inputs), moved or None))
        self.names[node.name] = name
        return name

    def alias(self, node: fx.Node, position: int = 0) -> None:
        source = node.args[position]
        assert isinstance(source, fx.Node)
        if source.name in self.counting:
            self.counting.add(node.name)
        if source.name in self.paths:
            self.paths[node.name] = self.paths[source.name]
        else:
            self.names[node.name] = self.tensor(source)

    def template(self, node: fx.Node) -> tuple[tuple[Operand, ...], tuple[tuple[str, Operand], ...], list[str]]:
        """The arguments of an operator as a template, and the nodes that fill it.

        ``add(x, 2, alpha=y)`` has the template ``(("$", 0), 2)``, ``(("alpha", ("$", 1)),)``, filled by ``[x, y]``.
        """
        inputs: list[str] = []
        counted = False

        def hold(value: object) -> Operand:
            nonlocal counted
            if isinstance(value, fx.Node):
                held = value.meta.get("val")
                if isinstance(held, Tensor):
                    inputs.append(self.tensor(value))
                    return (SLOT, len(inputs) - 1)
                if isinstance(held, torch.SymInt):
                    counted = True
                    return (COUNT, coefficient(value))
                value = held
            if isinstance(value, (list, tuple)):
                return tuple(map(hold, value))
            if isinstance(value, torch.dtype):
                return (DTYPE, str(value).removeprefix("torch."))
            if value is None or isinstance(value, (bool, int, float, str)):
                return value
            raise Unmapped

        args = tuple(map(hold, node.args))
        dropped = ("device", "layout", "pin_memory", "memory_format")
        kwargs = tuple((key, hold(value)) for key, value in node.kwargs.items() if key not in dropped)
        if counted:
            inputs.append(self.known_examples())
        elif not inputs and "device" in node.kwargs and self.first is not None:  # made of numbers alone
            inputs.append(self.first)
        if not tensors_of(node) and "device" in node.kwargs and inputs:
            kwargs += (("device", (DEVICE, len(inputs) - 1)),)
        return args, kwargs, inputs

    def operator(
        self,
        node: fx.Node,
        kind: Callable[..., Layer],
        item: int | None = None,
        source: fx.Node | None = None,
        **fields: object,
    ) -> None:
        """The operator as it stands; of one with several results, the ``source``, the one that the node takes."""
        args, kwargs, inputs = self.template(source or node)
        name = str((source or node).target).removeprefix("aten.")
        self.add(node, kind(name, args, kwargs, item, **fields), inputs)

    def generic(self, node: fx.Node) -> None:
        """An operator without a converter: pointwise, or as captured."""
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            raise Unmapped
        self.pointwise(node)

    def pointwise(self, node: fx.Node) -> None:
        """An operator whose inputs broadcast to its output."""
        values = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        shapes = [measured(n)[0] for n in values]
        if not values or _numbers(measured(node)[0]) != np.broadcast_shapes(*map(_numbers, shapes)):
            raise Unmapped
        self.operator(node, L.Elementwise)

    def folded(self, node: fx.Node) -> bool:
        """Compute what depends on nothing but numbers once and for all: it becomes a constant.

        What depends on the sizes of the inputs is computed where the network runs.
        """
        if any(isinstance(x, (Open, OpenRatio)) for x in pytree.tree_leaves((node.args, dict(node.kwargs)))):
            return False
        name, constants = str(node.target), {**self.constants, **self.pieces}
        if name.startswith(("aten.new_zeros", "aten.new_ones", "aten.new_full")) and len(node.all_input_nodes) == 1:
            (source,) = node.all_input_nodes  # of which only the dtype counts
            constants = {source.name: torch.zeros((), dtype=source.meta["val"].dtype)}
        known = all(n.name in constants for n in node.all_input_nodes)
        if not known or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return False
        assert callable(node.target)
        args, kwargs = called_with(node, lambda n: constants[n.name])
        result = node.target(*args, **kwargs)
        if isinstance(result, Tensor):
            self.constant(node, result, node.name)
        else:
            self.pieces[node.name] = result
        return True

    def known_examples(self) -> str:
        """The name of an input, whose length is the number of examples."""
        if self.reference is None:
            raise Unmapped
        return self.reference

    def captured(
        self, node: fx.Node, item: int | None = None, source: fx.Node | None = None, *, apart: bool = False
    ) -> None:
        if isinstance(node.meta["val"], (tuple, list)):
            return  # each of its results is captured by itself
        shape, axis = measured(node)
        source = source or node
        try:
            args, kwargs, inputs = self.template(source)
        except Unmapped:
            raise ValueError(f"{source.target} takes arguments that cannot be kept: {source.format_node()}") from None
        held = tensors_of(source)
        examples = tuple(measured(n)[1] for n in held) + (-1 if self.alone else 0,) * (len(inputs) - len(held))
        apart = apart or not held
        name = str(source.target).removeprefix("aten.")
        layer = L.Captured(name, args, kwargs, item, shape, axis, examples, apart or _separate(source, axis, examples))
        self.add(node, layer, inputs)

    def getitem(self, node: fx.Node) -> None:
        """One of several results: a piece of a split axis, or the first of a norm's."""
        source, index = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        if node.name in self.names:
            return  # written where its source was
        name = str(source.target)
        try:
            if source.name in self.names and index == 0:
                self.names[node.name] = self.names[source.name]
            elif source.name in self.pieces:
                self.constant(node, self.pieces[source.name][index], node.name)
            elif name.startswith(("aten.split", "aten.chunk", "aten.unbind")):
                self._piece(node, source, index, name.startswith("aten.unbind"))
            elif name.split(".")[1] in OVER_SPACE:
                self.maps(node, index, source)
            elif name.split(".")[1] in SEVERAL:
                self.along(node, *SEVERAL[name.split(".")[1]], index, source)
            else:
                raise Unmapped
        except Unmapped:
            self.captured(node, index, source)

    def _piece(self, node: fx.Node, source: fx.Node, index: int, unbind: bool) -> None:
        x = tensor_node(source.args[0])
        dim = whole(argument(source, 1 if unbind else 2, "dim", 0)) % len(measured(x)[0])
        widths = [1 if unbind else shape[dim] for shape, _ in source.meta["measured"]]
        self.slice(node, x, dim, sum(widths[:index]), sum(widths[: index + 1]), drop=unbind)

    def along(
        self, node: fx.Node, position: int, name: str, item: int | None = None, source: fx.Node | None = None
    ) -> None:
        """An operator that works along some axes, and changes their sizes at most."""
        x = tensor_node((source or node).args[0])
        axes = argument(source or node, position, name)
        (before, axis), (after, _) = measured(x), measured(node)
        dims = tuple(d % len(before) for d in ((axes,) if isinstance(axes, int) else wholes(axes or ())))
        if not dims or axis in dims:
            raise Unmapped
        kept = [n for k, n in enumerate(before) if k not in dims]
        if len(after) == len(before):
            lengths = tuple(after[d] for d in dims)
            rest = [n for k, n in enumerate(after) if k not in dims]
        else:
            lengths, rest = (0,) * len(dims), list(after)
        if kept != rest:
            raise Unmapped
        self.operator(node, L.Along, item, source, dims=dims, lengths=None if after == before else lengths)

    def maps(self, node: fx.Node, item: int | None = None, source: fx.Node | None = None) -> None:
        """An operator on every map alone."""
        shape, axis = measured(node)
        if axis != 0 or len(shape) < 3 or any(len(measured(n)[0]) != len(shape) for n in tensors_of(source or node)):
            raise Unmapped
        self.operator(node, L.Maps, item, source, space=shape[2:])

    def slice(self, node: fx.Node, x: fx.Node, dim: int, start: int, stop: int, *, drop: bool = False) -> None:
        shape, axis = measured(x)
        if axis == dim:
            raise Unmapped
        name = self.tensor(x)
        if (start, stop) != (0, shape[dim]):
            name = self.add(node, L.Slice(dim, start, stop), (name,), tag="_slice" if drop else "")
        if drop:
            dropped, new_axis = measured(node)
            name = self.add(node, L.View(dropped, axis, new_axis), (name,))
        self.names[node.name] = name


def _numbers(shape: Shape) -> Shape:
    """The example's sizes alone."""
    return tuple(map(int, shape))


def _separate(node: fx.Node, result: int, inputs: tuple[int, ...]) -> bool:
    """An operator treats every example alone: its examples are never along the axis that it works on.

    Args:
        result: the axis of its result along which examples run.
        inputs: those of its inputs.
    """
    name = str(node.target).split(".")[1]
    where = SEPARATE.get(name)
    if where is None:
        return name in SEPARATE
    dim = argument(node, *where)
    rank = len(measured(tensors_of(node)[0])[0])
    return isinstance(dim, int) and {*inputs, result} <= {0, -1} and dim % rank != 0
