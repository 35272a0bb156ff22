"""Making a captured graph functional, where that is plain to see: no operator writes on its inputs.

``ExportedProgram.run_decompositions`` does it for every graph, by tracing all of it twice with symbols for sizes: about
half of the time of a capture. Most graphs need little of that. What writes on a value that nothing else looks at,

    y = conv(x); relu_(y); z = y + 1        becomes        y = conv(x); w = relu(y); z = w + 1

and the operators of a graph are read as they stand. A graph with anything else (writing on a piece of a tensor or on an
input, operators without a rule that consist of others) is traced.
"""

from __future__ import annotations

import operator
from functools import partial

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument

from taylorfx.internals import OpOverload, pytree
from taylorfx.interop.capture.arguments import argument, called_with

__all__ = ["functional"]

_VIEWS = (
    "alias", "chunk", "contiguous", "detach", "expand", "flatten", "permute", "reshape", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "to", "transpose", "type_as", "unbind", "unflatten", "unsqueeze", "view",
)  # fmt: skip
"""Operators with a rule whose results may lie in the memory of their inputs."""

_UNTAGGED = ("hardswish", "masked_fill")
"""Pointwise operators that torch does not tag as such, and that are often written in place."""


class _Entangled(Exception):
    """A graph that has to be traced."""


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program with operators that write on nothing. Its own graph may be changed, to one that computes the same."""
    entangled = False
    try:
        _Writes(program.graph).replace()
    except _Entangled:
        entangled = True
    *_, last = program.graph.nodes
    for item, node in zip(program.graph_signature.output_specs, last.args[0], strict=True):
        if isinstance(item.arg, TensorArgument) and isinstance(node, fx.Node):
            item.arg.name = node.name
    if entangled:
        traced: ExportedProgram = program.run_decompositions({})
        return traced
    program.graph.eliminate_dead_code()
    return program


class _Writes:
    """Replaces what writes in a graph.

    Attributes:
        order: the places of the nodes.
        memory: for a piece of memory, the values that lie in it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.order = {node: k for k, node in enumerate(graph.nodes)}
        self.memory: dict[object, list[fx.Node]] = {}
        for node in graph.nodes:
            for place in _places(node):
                self.memory.setdefault(place, []).append(node)

    def replace(self) -> None:
        """Write every operator that writes as the one that does not.

        Raises:
            _Entangled: if one cannot be.
        """
        for node in list(self.order):
            if node.op == "call_function" and not _is_functional(node):
                self._replace(node)

    def _replace(self, node: fx.Node) -> None:
        x = node.args[0]
        if not isinstance(x, fx.Node):
            raise _Entangled
        (place,) = _places(x)
        before = [value for value in self.memory[place] if self.order[value] < self.order[node]]
        if (pure := _pure(node)) is None:
            raise _Entangled
        if any(value.op != "call_function" for value in before):
            raise _Entangled
        if any(self._later(node, user) for value in before if value is not x for user in value.users):
            raise _Entangled
        with self.graph.inserting_before(node):
            new = self.graph.create_node("call_function", pure, node.args, node.kwargs, node.name.rstrip("_"))
        new.meta = dict(node.meta)
        self.order[new] = self.order[node]
        x.replace_all_uses_with(new, delete_user_cb=partial(self._later, node))
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        self.memory[place] = [new if value is node else value for value in self.memory[place]]

    def _later(self, node: fx.Node, user: fx.Node) -> bool:
        return self.order[user] > self.order[node]


def _places(node: fx.Node) -> set[object]:
    """The pieces of memory in which the tensors of a node lie."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return {x.untyped_storage()._cdata for x in leaves if isinstance(x, Tensor)}


def _is_functional(node: fx.Node) -> bool:
    """The operator writes on nothing, and is read as it stands.

    Raises:
        _Entangled: if it consists of others, and these have to be read.
    """
    target = node.target
    if not isinstance(target, OpOverload):
        if target is not operator.getitem and _places(node):
            raise _Entangled
        return True
    schema, name = target._schema, str(target).split(".")[1]
    if schema.is_mutable:
        return False
    aliases = any(x.alias_info is not None for x in schema.arguments)
    if not aliases and torch.Tag.maybe_aliasing_or_mutating not in target.tags:
        return True
    inference = name == "batch_norm" and not argument(node, 5, "training")
    if not inference and (name not in _VIEWS or target.namespace != "aten"):
        raise _Entangled
    return True


def _pure(node: fx.Node) -> OpOverload | None:
    """The pointwise operator that computes what this one writes on its first argument; None if there is none."""
    x, (space, name, overload) = node.args[0], str(node.target).split(".")
    if not name.endswith("_"):
        return None
    pure = getattr(getattr(getattr(torch.ops, space), name.removesuffix("_"), None), overload, None)
    if not isinstance(pure, OpOverload):
        return None
    if torch.Tag.pointwise not in pure.tags and name.removesuffix("_") not in _UNTAGGED:
        return None
    if torch.Tag.nondeterministic_seeded in pure.tags:
        return None

    def number(value: fx.Node) -> object:
        """One number of a tensor's dtype, without memory: the dtype of the result has to be that of ``x``."""
        held = value.meta.get("val")
        if not isinstance(held, Tensor):
            raise _Entangled
        return torch.empty((), dtype=held.dtype, device="meta")

    args, kwargs = called_with(node, number)
    result = pure(*args, **kwargs)
    same = isinstance(x, fx.Node) and isinstance(result, Tensor) and result.dtype == x.meta["val"].dtype
    return pure if same else None
