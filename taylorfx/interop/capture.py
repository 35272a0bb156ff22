"""Modules in: ``torch.export`` captures any module as a graph of ATen operators, which are mapped to layers.

The graph is made functional first (no in-place operators, few composite ones). Parametric operators whose weights are
the module's own become the real layers, with the module's names; data movement, products, reductions and pointwise
operators become those of `taylorfx.layers.tensor`; what has no rule stays as it was captured, runs, and freezes the
units that touch it. Nothing is guessed from a number: where examples run is read from the symbol of the exported batch.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, OutputKind

from taylorfx.interop.convert import Convert, Unmapped
from taylorfx.interop.operators import CONVERTERS
from taylorfx.layers import Input
from taylorfx.spec import Node, Spec
from taylorfx.tree import Params, unflatten

__all__ = ["CaptureError", "from_torch"]


class CaptureError(ValueError):
    """A module that cannot be captured; the message lists every cause that is known."""


def from_torch(
    module: nn.Module, example_inputs: Any, *, example_kwargs: Mapping[str, Any] | None = None
) -> tuple[Params, Spec]:
    """Capture a module in inference mode as parameters and a spec; the module itself is left as it was.

    Args:
        module: any module that ``torch.export`` captures.
        example_inputs: a tensor, or a tuple of the positional arguments; every tensor's axis 0 runs over examples.
        example_kwargs: keyword arguments.

    Returns:
        Parameters by the module's own names (the tensors are shared, not copied), and the network. The inputs of the
        spec are named after the arguments of ``forward``; the outputs are the tensors that it returns, in their order.

    Raises:
        CaptureError: if the module, the example or the captured graph cannot be taken.
    """
    if not isinstance(module, nn.Module):
        raise CaptureError(f"from_torch captures a torch.nn.Module; received {type(module).__name__}.")
    args = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    kwargs = dict(example_kwargs or {})
    if not any(isinstance(x, Tensor) for x in torch.utils._pytree.tree_leaves((args, kwargs))):
        raise CaptureError("from_torch runs the module on an example; received no tensor. Pass example inputs.")
    return _Reader(_export(module, args, kwargs)).read()


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """The module as a functional graph, in inference mode, its axis of examples dynamic."""
    twin = copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())}).eval()

    # An example of one would be taken for a constant: two of it say the same.
    args, kwargs = torch.utils._pytree.tree_map(
        lambda x: x.repeat(2, *[1] * (x.ndim - 1)) if isinstance(x, Tensor) and x.ndim and len(x) == 1 else x,
        (args, kwargs),
    )
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor) and tensor.ndim:
            shapes[tensor] = {0: Dim.DYNAMIC}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch's own pytree
            program = torch.export.export(twin, args, kwargs, dynamic_shapes=shapes, strict=False)
            functional: ExportedProgram = program.run_decompositions({})
            return functional
    except Exception as error:  # torch.export raises whatever the module's own code raises
        raise CaptureError(f"torch.export cannot capture {type(module).__name__}: {error}") from error


class _Reader:
    """Walks an exported graph in its order and writes nodes."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.convert = Convert()

    def read(self) -> tuple[Params, Spec]:
        self._inputs()
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                try:
                    self._call(node)
                except (Unmapped, ValueError) as error:
                    where = f"{node.format_node()}: {error or 'its sizes cannot be followed'}"
                    raise CaptureError(f"from_torch follows shapes that are multiples of the batch; {where}") from error
            elif node.op == "get_attr":
                self.convert.constant(node, getattr(self.program.graph_module, node.target), node.target)
        outputs = self._outputs()
        used = _reachable(self.convert.nodes, outputs)
        nodes = tuple(node for node in self.convert.nodes if node.name in used or isinstance(node.layer, Input))
        spec = Spec(nodes, outputs)
        wanted = set(spec.shapes)
        leaves = {path: self.convert.tensors[path] for path in self.convert.tensors if path in wanted}
        return unflatten(leaves), spec

    def _inputs(self) -> None:
        state: dict[str, Any] = {**self.program.state_dict, **self.program.constants}
        placeholders = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        for item in self.program.graph_signature.input_specs:
            node = placeholders[getattr(item.arg, "name", "")]
            if item.kind is InputKind.USER_INPUT:
                self.convert.user_input(node)
            elif item.kind is InputKind.CONSTANT_TENSOR and item.target is not None:
                self.convert.constant(node, state[item.target], item.target)
            elif item.target is not None and item.target in state:
                self.convert.parameter(node, state[item.target], item.target)

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        if target is operator.getitem:
            self.convert.getitem(node)
        elif not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            return  # arithmetic on sizes: read from the shapes of the tensors that use it
        elif not self.convert.folded(node):
            name = getattr(target, "__name__", str(target))
            try:
                CONVERTERS.get(name.split(".")[0], Convert.generic)(self.convert, node)
            except Unmapped:
                self.convert.captured(node)

    def _outputs(self) -> tuple[str, ...]:
        names: list[str] = []
        for item in self.program.graph_signature.output_specs:
            name = getattr(item.arg, "name", None)
            if item.kind is OutputKind.USER_OUTPUT and name is not None:
                names.append(self.convert.names[name])
        if not names:
            raise CaptureError("A captured module gives out at least one tensor; this one gives out none.")
        return tuple(dict.fromkeys(names))


def _reachable(nodes: Sequence[Node], outputs: Sequence[str]) -> set[str]:
    """The nodes that the outputs depend on."""
    heard = {node.name: node.inputs for node in nodes}
    found: set[str] = set()
    waiting = list(outputs)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += heard[name]
    return found
