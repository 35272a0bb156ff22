"""Reading an exported graph: walked in its order, it becomes the nodes of a network."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from fnmatch import fnmatchcase

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ArgumentSpec, InputKind, OutputKind, TensorArgument

from taylorfx.internals import pytree
from taylorfx.interop.calls import dotted, read_interface
from taylorfx.interop.capture.arguments import Unmapped, called_with, nothing, tensor_node
from taylorfx.interop.capture.convert import RULES, Convert
from taylorfx.interop.capture.operators import CONVERTERS
from taylorfx.interop.capture.sizes import Sizes
from taylorfx.layers import Input, Shape
from taylorfx.layers.operators import OWN
from taylorfx.layers.operators import operator as resolve
from taylorfx.layers.tensor import operator_of
from taylorfx.network.bind import propagate
from taylorfx.network.labels import Ties
from taylorfx.network.spec import Node, Spec
from taylorfx.tree import Params, unflatten

__all__ = ["CaptureError", "OutputsError", "Reader", "Wanted"]

Wanted = str | int | Iterable[str | int] | None
"""The outputs that are captured: names or globs of names, or numbers; all of them if None."""


class CaptureError(ValueError):
    """A module that cannot be captured; the message lists every cause that is known."""


class OutputsError(CaptureError):
    """Outputs are asked for that the module does not have."""


class Reader:
    """Walks an exported graph in its order and writes nodes."""

    def __init__(
        self, program: ExportedProgram, *, alone: bool, cumulative: frozenset[str], wanted: Wanted = None
    ) -> None:
        self.program, self.wanted = program, wanted
        self.convert = Convert(alone=alone, cumulative=cumulative)
        self.placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        arguments = [x.arg for x in program.graph_signature.input_specs if x.kind is InputKind.USER_INPUT]
        self.inputs = [self.placeholders[arg.name] for arg in arguments if isinstance(arg, TensorArgument)]
        """The tensors that the module takes; numbers, strings and None are in the graph."""
        self.sizes = Sizes(program, self.inputs)

    def read(self, module: nn.Module) -> tuple[Params, Spec]:
        """The parameters and the network.

        Raises:
            CaptureError: if a node cannot be followed or has no derivative, or an output is no tensor.
        """
        self._read_inputs()
        results = self._results()
        wanted = _above(self.program.graph, results)
        for node in self.program.graph.nodes:
            if node.op == "call_function" and node in wanted:
                try:
                    self._call(node)
                except CaptureError:
                    raise
                except (Unmapped, ValueError) as error:
                    where = f"{node.format_node()}: {error or 'its sizes cannot be followed'}"
                    raise CaptureError(f"from_torch follows shapes that are multiples of the batch; {where}") from error
            elif node.op == "get_attr":
                self.convert.constant(node, getattr(self.program.graph_module, node.target), node.target)
        outputs = self._outputs(results)
        used = _reachable(self.convert.nodes, list(outputs.values()))
        nodes = tuple(node for node in self.convert.nodes if node.name in used or isinstance(node.layer, Input))
        named = all(isinstance(key, str) for key in outputs)
        inputs = {node.name: self.convert.names[node.name] for node in self.inputs}
        nodes = tuple(replace(node, layer=self.sizes.layer(node.layer, inputs)) for node in nodes)
        spec = Spec(nodes, tuple(outputs.values()), tuple(map(str, outputs)) if named else ())
        interface = read_interface(module, self.program, self.convert.names, spec)
        if self.wanted is not None and not named:
            interface = replace(interface, results=tuple(int(key) for key in outputs))
        spec = replace(spec, interface=interface)
        _warn_of_randomness(module, spec)
        leaves = {path: x for path, x in self.convert.tensors.items() if path in spec.shapes}
        return unflatten(leaves), self._sized(spec)

    def _sized(self, spec: Spec) -> Spec:
        """The network, whose inputs say which sizes they take."""
        names = {self.convert.names[node.name]: node.name for node in self.inputs}

        def shapes(inputs: Mapping[str, Shape]) -> dict[str, Shape]:
            at = spec.at(*(inputs[names[node.name]] for node in spec.inputs))
            bounds = propagate(at, Ties(labeled=False))
            return {key: bounds[name].shape for key, name in self.convert.names.items() if name in bounds}

        inputs = {graph: node for node, graph in names.items()}
        ranges, guards = self.sizes.taken(shapes, inputs)
        causes = self.sizes.causes()
        fields = {}
        for node in spec.inputs:
            found = ranges[names[node.name]]
            lines = [line * (a == b) for line, (a, b, _) in zip(causes[names[node.name]], found, strict=True)]
            fields[node.name] = {"ranges": found, "causes": tuple(lines) if any(lines) else ()}
        declared = spec.declared(fields)
        return replace(declared, guards=guards)

    def _read_inputs(self) -> None:
        state: dict[str, Tensor] = {**self.program.state_dict, **self.program.constants}
        for item in self.program.graph_signature.input_specs:
            node = self.placeholders[getattr(item.arg, "name", "")]
            if item.kind is InputKind.USER_INPUT:
                if node in self.inputs:
                    self.convert.user_input(node)
            elif item.kind is InputKind.CONSTANT_TENSOR and item.target is not None:
                self.convert.constant(node, state[item.target], item.target)
            elif item.target is not None and item.target in state:
                self.convert.parameter(node, state[item.target], item.target)

    def _call(self, node: fx.Node) -> None:
        before = len(self.convert.nodes)
        if node.target is operator.getitem:
            if not nothing(node):
                self.convert.getitem(node)
        elif not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            return  # arithmetic on sizes: read from the shapes of the tensors that use it
        elif not self.convert.folded(node) and not nothing(node):  # which is left out of what it is part of
            space, name = str(node.target).split(".")[:2]
            rule = RULES.get(f"{space}::{name}") or (CONVERTERS.get(name) if space in ("aten", "taylorfx") else None)
            try:
                (rule or Convert.generic)(self.convert, node)
            except Unmapped:
                self.convert.captured(node)
        if any(operator_of(new.layer) for new in self.convert.nodes[before:]):
            _refuse_rigid(tensor_node(node.args[0]) if node.target is operator.getitem else node)

    def _results(self) -> dict[str | int, str | _Number]:
        """The values of the wanted outputs in the graph, by name if the module names them, otherwise by number.

        Raises:
            CaptureError: if the module returns no tensor.
        """
        items = self.program.graph_signature.output_specs
        values = [_output(item.arg) for item in items if item.kind is OutputKind.USER_OUTPUT]
        tree = pytree.tree_unflatten(values, self.program.call_spec.out_spec)
        leaves = [(path, x) for path, x in pytree.tree_flatten_with_path(tree)[0] if x is not None]
        if not leaves:
            raise CaptureError("A captured module returns at least one tensor; this one returns none.")
        named = isinstance(tree, Mapping) or is_dataclass(tree)
        keys = [dotted(path) if named else k for k, (path, _) in enumerate(leaves)]
        wanted = _chosen(keys, self.wanted)
        return {key: x for key, (_, x) in zip(keys, leaves, strict=True) if key in wanted}

    def _outputs(self, results: Mapping[str | int, str | _Number]) -> dict[str | int, str]:
        """The nodes of the wanted outputs.

        Raises:
            CaptureError: for those that are no tensors of the network.
        """
        outputs: dict[str | int, str] = {}
        strange: list[str] = []
        for key, x in results.items():
            if x in self.convert.names:
                outputs[key] = self.convert.names[x]
            else:
                strange.append(f"output {key} is {'a parameter' if isinstance(x, str) else x}")
        if strange:
            raise CaptureError(
                "A captured module returns tensors that it computes, or None, which is left out; "
                f"{', '.join(strange)}. Have its forward leave it out, or pick others, outputs=..."
            )
        return outputs


def _chosen(keys: Sequence[str | int], wanted: Wanted) -> set[str | int]:
    """The keys of the wanted outputs.

    >>> sorted(_chosen(["logits", "hidden_states.0", "hidden_states.1"], ["logits", "hidden_states.1"]))
    ['hidden_states.1', 'logits']
    >>> _chosen([0, 1], 1)
    {1}

    Raises:
        OutputsError: for what matches no output; all of it at once.
    """
    if wanted is None:
        return {*keys}
    asked = (wanted,) if isinstance(wanted, (str, int)) else tuple(wanted)
    matched = [
        {key for key in keys if key == one or (isinstance(one, str) and fnmatchcase(str(key), one))} for one in asked
    ]
    unknown = [repr(one) for one, some in zip(asked, matched, strict=True) if not some]
    if unknown or not asked:
        raise OutputsError(
            "Outputs are asked for by their names, by globs of these, or by numbers where they have none; received "
            f"{', '.join(unknown) or 'none'}, which no output has. The module gives out {', '.join(map(str, keys))}."
        )
    return set[str | int]().union(*matched)


def _output(argument: ArgumentSpec) -> str | _Number | None:
    """The name of a tensor, None as it is, and anything else as a `_Number`."""
    if isinstance(argument, TensorArgument):
        return argument.name
    value = getattr(argument, "value", argument)
    return None if value is None else _Number(value)


@dataclass(frozen=True)
class _Number:
    """An output that is no tensor."""

    value: object

    def __str__(self) -> str:
        return f"{self.value!r}, a {type(self.value).__name__}"


def _refuse_rigid(node: fx.Node) -> None:
    """Refuse an operator that floating-point numbers pass through without a derivative.

    The operator is run on tensors without memory, of two examples, and asked for gradients.
    """
    target, values = node.target, node.meta["val"]
    assert callable(target)
    if not any(isinstance(x, Tensor) and x.is_floating_point() for x in pytree.tree_leaves(values)):
        return
    if str(target).startswith(_BY_STRIDES):
        raise CaptureError(
            f"Operators see values, not memory: {node.format_node()} reads memory by strides, which a network does not "
            "fix. Index or unfold instead."
        )

    def number(size: int | torch.SymInt) -> int:  # with symbols, torch would record guards about them
        if isinstance(size, int):
            return size
        return int(size.node.expr.xreplace(dict.fromkeys(size.node.expr.free_symbols, sympy.Integer(2))))

    def differentiated(x: fx.Node) -> object:
        value: object = x.meta.get("val")
        if not isinstance(value, Tensor):
            return number(value) if isinstance(value, torch.SymInt) else value
        leaf = torch.empty([number(n) for n in value.shape], dtype=value.dtype, device="meta")
        return leaf.requires_grad_() if leaf.is_floating_point() or leaf.is_complex() else leaf

    args, kwargs = called_with(node, differentiated)
    try:
        with torch.enable_grad():
            results = [x for x in pytree.tree_leaves(target(*args, **kwargs)) if isinstance(x, Tensor)]
            sums = [x.sum() for x in results if x.requires_grad and x.is_floating_point()]
            if sums and str(target).split(".")[0] not in OWN:  # others fail only when a gradient is asked for
                torch.autograd.backward(sums)
    except Exception as error:
        if "derivative" in str(error) or "autograd" in str(error):
            raise CaptureError(
                f"Floating-point numbers pass through operators that have derivatives; {target} has none "
                f"({node.format_node()}). Give it a rule, taylorfx.interop.rule, or write it with other operators."
            ) from error


_BY_STRIDES = ("aten.as_strided",)


def _warn_of_randomness(module: nn.Module, spec: Spec) -> None:
    """Say which nodes of a network draw random numbers in inference."""
    named = [(node, operator_of(node.layer)) for node in spec.nodes]
    draws = torch.Tag.nondeterministic_seeded
    drawn = [f"{node.name} ({node.layer.title})" for node, name in named if name and draws in resolve(name).tags]
    if drawn:
        warnings.warn(
            f"{type(module).__name__} draws random numbers in inference, at {', '.join(drawn)}: the network's values "
            "are of one draw each, and so are scores. Pass noise as an input, or draw it in training mode only.",
            stacklevel=5,
        )


def _above(graph: fx.Graph, results: Mapping[str | int, str | _Number]) -> set[fx.Node]:
    """The nodes of a graph that some of its outputs depend on: what only the others need may be of any kind."""
    names = {*results.values()}
    above: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.name in names or any(user in above for user in node.users):
            above.add(node)
    return above


def _reachable(nodes: Sequence[Node], outputs: Sequence[str]) -> set[str]:
    """The nodes that the outputs depend on."""
    inputs = {node.name: node.inputs for node in nodes}
    reached: set[str] = set()
    waiting = list(outputs)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += inputs[name]
    return reached
