"""What training does beyond inference: a module is captured in inference, and compared with itself in training.

Both graphs are walked side by side. What training alone does has to be one of a few things, which are then written into
the graph of inference as operators of taylorfx (they return their input, and `run_decompositions` leaves them alone):

    x -> dropout(x)                     torch's dropouts, over positions, maps or whole examples
    x -> x * bernoulli((N, 1, 1)) / p   stochastic depth
    attention(..., dropout_p)           dropout of attention weights, a number of the operator
    W -> W / sigma(W)                   spectral norm, whose power iteration moves its vectors

Everything else is named to the caller: there, the captured network does in training what it does in inference.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx.node import Argument
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm

from taylorfx.internals import pytree
from taylorfx.interop.capture.arguments import tensor_node

__all__ = ["Difference", "align", "is_plain", "twin"]


class Difference(Exception):
    """A place where training does what cannot be captured; the message names it."""


# Operators that say in a graph of inference what training does. They survive every decomposition.
_OPERATORS: Any = torch.library.Library("taylorfx", "DEF")  # type: ignore[no-untyped-call]
_OPERATORS.define("dropout(Tensor x, float p, int[]? alone, bool alpha) -> Tensor")
_OPERATORS.define(
    "spectral_norm(Tensor weight, Tensor u, Tensor v, int dim, int steps, float eps, bool left) -> Tensor"
)
_OPERATORS.impl("dropout", lambda x, p, alone, alpha: x.clone(), "CompositeExplicitAutograd")


def _normalized(weight: Tensor, u: Tensor, v: Tensor, dim: int, steps: int, eps: float, left: bool) -> Tensor:
    """The weight by its norm in inference, as its vectors say it."""
    return weight / (u @ (weight.movedim(dim, 0).flatten(1) @ v))


_OPERATORS.impl("spectral_norm", _normalized, "CompositeExplicitAutograd")

_DROPOUTS: Mapping[str, tuple[tuple[int, ...] | None, bool]] = {
    "dropout": (None, False),
    "dropout_": (None, False),
    "feature_dropout": ((0, 1), False),
    "feature_dropout_": ((0, 1), False),
    "alpha_dropout": (None, True),
    "alpha_dropout_": (None, True),
    "feature_alpha_dropout": ((0, 1), True),
    "feature_alpha_dropout_": ((0, 1), True),
}
"""Torch's dropouts: along which axes every position draws for itself (none: all), and whether scale is kept."""

_TRAINS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(_DROPOUTS, (2,)),
    "batch_norm": (5, 6),
    "instance_norm": (5, 6),
    "lstm": (6,),
    "gru": (6,),
    "rnn_tanh": (6,),
    "rnn_relu": (6,),
    **dict.fromkeys(("rrelu", "rrelu_"), (3,)),
    "scaled_dot_product_attention": (4,),
}
"""Arguments in which an operator may differ in training: a flag, a momentum, a probability of dropout."""


def _parametrized(norm: parametrizations._SpectralNorm, weight: Tensor) -> Tensor:
    """Torch's spectral norm, a parametrization, as one operator."""
    steps = norm.n_power_iterations
    value: Tensor = torch.ops.taylorfx.spectral_norm(weight, norm._u, norm._v, norm.dim, steps, norm.eps, True)
    return value


def _hooked(norm: SpectralNorm, module: nn.Module, inputs: tuple[object, ...]) -> None:
    """Torch's older spectral norm, a hook before the module runs, as one operator."""
    weight, u, v = (getattr(module, f"{norm.name}_{part}") for part in ("orig", "u", "v"))
    value = torch.ops.taylorfx.spectral_norm(weight, u, v, norm.dim, norm.n_power_iterations, norm.eps, False)
    setattr(module, norm.name, value)


def twin(module: nn.Module) -> nn.Module:
    """A copy of the module that shares its tensors, in which spectral norms are operators."""
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    for part in module.modules():  # tensors that were computed, as older weight norms keep them
        shared |= {id(x): x for x in vars(part).values() if isinstance(x, Tensor)}
    other = copy.deepcopy(module, shared)
    for part in other.modules():
        if isinstance(part, parametrizations._SpectralNorm) and hasattr(part, "_u"):
            part.forward = partial(_parametrized, part)  # type: ignore[method-assign]
        for key, hook in part._forward_pre_hooks.items():
            if isinstance(hook, SpectralNorm):
                part._forward_pre_hooks[key] = partial(_hooked, hook)
    return other


def align(inference: ExportedProgram, training: ExportedProgram | None) -> None:
    """Write into the graph of inference what training does beyond it.

    Raises:
        Difference: naming the first place where training does what cannot be written; what comes before it is.
    """
    try:
        if training is not None:
            _Pair(inference, training).walk()
    finally:
        for node in list(inference.graph.nodes):
            if _name(node) in _DROPOUTS and not node.args[2]:  # one that is never off is no matter of training
                alone, alpha = _DROPOUTS[_name(node)]
                _insert(inference.graph, node, tensor_node(node.args[0]), (node.args[1], alone, alpha))
                inference.graph.erase_node(node)


def is_plain(program: ExportedProgram) -> bool:
    """No size is an argument of the graph, and none that is open is one at the example, as an axis that broadcasts is.

    Training can then be compared at other sizes, in plain numbers.
    """
    for node in filter(_computes, program.graph.nodes):
        if any(isinstance(x.meta.get("val"), (torch.SymInt, torch.SymFloat)) for x in node.all_input_nodes):
            return False
        shapes = [x.shape for x in pytree.tree_leaves(node.meta["val"]) if isinstance(x, Tensor)]
        if any(
            isinstance(n, torch.SymInt) and n.node.hint == 1 and n.node.expr.free_symbols
            for shape in shapes
            for n in shape
        ):
            return False
    return True


def _insert(graph: fx.Graph, node: fx.Node, x: fx.Node, arguments: tuple[Argument, ...]) -> fx.Node:
    """Our dropout of ``x`` in the place of a node, which may have written on ``x`` itself."""
    with graph.inserting_after(node):
        ours = graph.call_function(torch.ops.taylorfx.dropout.default, (x, *arguments))
    ours.meta = dict(node.meta)
    node.replace_all_uses_with(ours)
    if _name(node).endswith("_"):
        later = set(graph.nodes) - set(itertools.takewhile(lambda n: n is not ours, graph.nodes)) - {ours}
        x.replace_all_uses_with(ours, delete_user_cb=later.__contains__)
    return ours


_IDENTITIES = ("alias", "clone", "contiguous", "detach", "detach_", "lift_fresh_copy")
"""Operators that give their input."""


class _Noise(NamedTuple):
    """Noise of training, ``bernoulli(shape) / keep``."""

    keep: Argument
    """The probability to keep a position."""
    shape: tuple[Argument, ...]
    divided: bool
    """It is divided by ``keep`` already."""


class _Pair:
    """Walks the two graphs; ``seen`` says which value of inference stands for one of training."""

    def __init__(self, inference: ExportedProgram, training: ExportedProgram) -> None:
        self.inference, self.training = inference, training
        self.seen: dict[fx.Node, fx.Node] = {}
        self.noise: dict[fx.Node, _Noise] = {}
        self.noisy: dict[fx.Node, fx.Node] = {}
        """Values that training multiplies by noise, and what stands for them in inference."""
        self.waiting = deque(filter(_computes, inference.graph.nodes))
        """The steps of inference that have not been met in training."""
        self.roots: dict[fx.Node, fx.Node] = {}
        """For a value that only copies another one, that one."""
        self.counters: set[fx.Node] = set()
        """Numbers of batches, counted up."""

    def walk(self) -> None:
        places = {_home(item): node for item, node in _inputs(self.inference)}
        self.seen = {node: places[_home(item)] for item, node in _inputs(self.training) if _home(item) in places}
        for node in filter(_computes, self.training.graph.nodes):
            steps = (self._matches, self._passes, self._counts, self._draws, self._multiplies)
            if not any(step(node) for step in steps):
                raise Difference(_place(node))
        if rest := [node for node in self.waiting if _name(node) not in _IDENTITIES]:
            raise Difference(_place(rest[0]))
        one, other = (next(reversed(p.graph.nodes)) for p in (self.training, self.inference))
        if not self._equal(one.args, other.args):
            raise Difference("its outputs")
        self._follow(one, other)

    def _matches(self, node: fx.Node) -> bool:
        """The next step of inference is the same one."""
        for other in self.waiting:
            if self._same(node, other):
                while self.waiting.popleft() is not other:
                    pass
                self.seen[node] = other
                self._follow(node, other)
                return True
            if _name(other) not in _IDENTITIES:
                return False
            self.roots[other] = tensor_node(other.args[0])
        return False

    def _same(self, node: fx.Node, other: fx.Node) -> bool:
        """The same operator on the same values, but for what it is told of training."""
        free, name = _TRAINS.get(_name(node), ()), _name(node)
        if node.target != other.target:
            return False
        one, two = _filled(node), _filled(other)
        if not all(k in free or self._equal(a, b) for k, (a, b) in enumerate(zip(one, two, strict=True))):
            return False
        if name == "scaled_dot_product_attention":
            other.args, other.kwargs = (*two[:4], one[4], two[5]), {"scale": two[6], "enable_gqa": two[7]}
        return name not in ("batch_norm", "instance_norm") or bool(one[5])

    def _equal(self, one: Argument, other: Argument) -> bool:
        """An argument of training is one of inference: the same number, or values that stand for each other."""
        if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
            return len(one) == len(other) and all(map(self._equal, one, other))
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            value = one.meta.get("val")
            if isinstance(value, torch.SymInt):
                return str(value) == str(other.meta.get("val"))
            return self._root(self.seen.get(one)) is self._root(other)
        return type(one) is type(other) and bool(one == other)

    def _follow(self, node: fx.Node, other: fx.Node) -> None:
        """What training reads with noise, inference reads from the dropout that stands for it."""
        if any(x in self.noisy for x in node.all_input_nodes):
            other.args = tuple(self._dropped(a, b) for a, b in zip(node.args, other.args, strict=True))

    def _dropped(self, one: Argument, other: Argument) -> Argument:
        if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
            return type(other)([self._dropped(a, b) for a, b in zip(one, other, strict=True)])
        return self.noisy.get(one, other) if isinstance(one, fx.Node) else other

    def _root(self, node: fx.Node | None) -> fx.Node | None:
        while node in self.roots:
            node = self.roots[node]
        return node

    def _passes(self, node: fx.Node) -> bool:
        """A copy of what inference does not copy."""
        x = _first(node)
        if _name(node) not in _IDENTITIES or x not in self.seen:
            return False
        self.seen[node] = self.seen[x]
        if x in self.noisy:
            self.noisy[node] = self.noisy[x]
        return True

    def _counts(self, node: fx.Node) -> bool:
        """A batch norm counts its batches."""
        x = _first(node)
        if _name(node) != "add_" or x is None:
            return False
        if x not in self.counters and not str(x.target).endswith("num_batches_tracked"):
            return False
        self.counters.add(node)
        return True

    def _draws(self, node: fx.Node) -> bool:
        """A step of drawing noise."""
        name, x, rest = _name(node), _first(node), node.args[1:]
        if name in ("empty", "new_empty"):
            shape = rest[0] if rest else node.args[0]
            if not isinstance(shape, (list, tuple)):
                return False
            self.noise[node] = _Noise(1.0, tuple(shape), False)
            return True
        if x not in self.noise or not rest:
            return False
        noise = self.noise[x]
        if name in ("bernoulli_", "bernoulli"):
            self.noise[node] = _Noise(rest[0], noise.shape, False)
        elif name in ("div_", "div") and rest == (noise.keep,) and not noise.divided:
            self.noise[node] = noise._replace(divided=True)
        else:
            return False
        return True

    def _multiplies(self, node: fx.Node) -> bool:
        """Values times noise that keeps whole examples, maps or positions."""
        if _name(node) not in ("mul", "mul_") or len(node.args) < 2:
            return False
        value, factor = node.args[:2]
        if not isinstance(value, fx.Node) or not isinstance(factor, fx.Node):
            return False
        if value not in self.seen or factor not in self.noise:
            return False
        (keep, shape, divided), x = self.noise[factor], self.noisy.get(value, self.seen[value])
        sizes = x.meta["val"].shape
        if len(shape) != len(sizes) or not isinstance(keep, float) or not divided:
            return False
        pairs = enumerate(zip(shape, sizes, strict=True))
        alone = [k for k, (one, n) in pairs if one != 1 or (isinstance(n, int) and n == 1)]
        with (graph := self.inference.graph).inserting_after(x):
            ours = graph.call_function(torch.ops.taylorfx.dropout.default, (x, 1 - keep, alone, False))
        ours.meta = dict(x.meta)
        self.seen[node], self.noisy[node] = self.seen[value], ours
        if _name(node) == "mul_":
            self.noisy[value] = ours
        return True


def _computes(node: fx.Node) -> bool:
    """The node gives tensors, and no sizes."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), (Tensor, tuple, list))


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


def _first(node: fx.Node) -> fx.Node | None:
    """An operator's first argument, if it is a value of the graph."""
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def _inputs(program: ExportedProgram) -> list[tuple[InputSpec, fx.Node]]:
    """What the inputs of a graph are, with their nodes."""
    nodes = {node.name: node for node in program.graph.nodes}
    return [(item, nodes[item.arg.name]) for item in program.graph_signature.input_specs if item.arg.name in nodes]


def _home(item: InputSpec) -> tuple[InputKind, str]:
    """What an input of a graph is: one of the module's own tensors, or an argument."""
    return item.kind, item.target or item.arg.name


def _filled(node: fx.Node) -> tuple[Argument, ...]:
    """All arguments of an operator in their order, the defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return (*node.args, *node.kwargs.values())
    rest = schema.arguments[len(node.args) :]
    return (*node.args, *(node.kwargs.get(a.name, a.default_value) for a in rest))


def _place(node: fx.Node) -> str:
    """Where in the module a node comes from, and what it is."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((path for path, _ in reversed(stack.values())), "") if stack else ""
    return f"{path or 'the module itself'} ({node.target!s})"
