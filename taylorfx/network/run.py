"""Run a network: pure functions of parameters, inputs and gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taylorfx.layers import ShapeError
from taylorfx.network.errors import explain
from taylorfx.network.parameters import check
from taylorfx.network.spec import Node, Paths, Spec, SpecError, Step
from taylorfx.tree import Params, merge

__all__ = ["Inputs", "apply", "bind_inputs", "evaluate", "gating", "train"]


Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a network takes: a tensor, a tuple in the order of its inputs, or a dict by their names."""


Tap = Callable[[str, int, Tensor], Tensor]
"""Called with a node's name, a slot (an input's number, or -1 for its output) and the tensor there; returns it."""


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
        strange = {name for name, _, _ in gates} - spec.by_name.keys()
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
    """The outputs and the new parameters. Everything that runs a network comes through here."""
    if not torch.compiler.is_compiling():
        check(params, spec)
    values = bind_inputs(spec, inputs)
    single = [layer for name, layer in spec.input_layers.items() if layer.alone and len(values[name]) != 1]
    if single and not training and all(layer.apart for layer in single):
        return _one_by_one(params, spec, values, tap), params
    if single:
        raise ShapeError(
            "This network takes one example at a time: it was captured from a module made for a fixed number of them. "
            "Give batches of one."
        )
    shapes = {name: values[name].shape[1:] for name in spec.input_layers}
    if torch.compiler.is_compiling():
        steps = spec.fitted_anew(spec.axes(shapes)) if spec.sized else spec.steps
    else:
        steps = spec.fitted(shapes)
    compute = _Training(params, generator) if training else _Inference(params)
    return _run(params, spec, steps, values, compute, tap), compute.parameters()


def _run(
    params: Params, spec: Spec, steps: Sequence[Step], values: dict[str, Any], compute: _Inference, tap: Tap | None
) -> Any:
    """The nodes in order; a value that no later node uses is let go at once."""
    inputs = dict(values)
    for node, paths, unused in steps:
        if node.name not in values:
            try:
                args = [values[x] for x in node.inputs]
                if tap is not None:
                    args = [tap(node.name, slot, x) for slot, x in enumerate(args)]
                value = compute(node, paths, args)
                values[node.name] = value if tap is None else tap(node.name, -1, value)
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                if not torch.compiler.is_compiling():
                    explain(params, spec, inputs, node, error)
                raise
        for name in unused:
            del values[name]
    outputs = tuple(values[x] for x in spec.outputs)
    if spec.keys:
        return dict(zip(spec.keys, outputs, strict=True))
    return outputs[0] if len(outputs) == 1 else outputs


class _Inference:
    """A node's value in inference."""

    def __init__(self, params: Params) -> None:
        self.params = params

    def __call__(self, node: Node, paths: Paths, args: Sequence[Tensor]) -> Tensor:
        return node.layer.apply(self.leaves(paths), *args)

    def leaves(self, paths: Paths) -> dict[str, Tensor]:
        """The parameters of a node by their names in the layer."""
        return {leaf: _at(self.params, keys) for leaf, keys in paths}

    def parameters(self) -> Params:
        """The parameters after the run."""
        return self.params


class _Training(_Inference):
    """A node's value in training. Nodes that share running statistics move them one after the other."""

    def __init__(self, params: Params, generator: torch.Generator | None) -> None:
        super().__init__(params)
        self.generator = generator
        self.moved: dict[str, Tensor] = {}  # running statistics by path

    def __call__(self, node: Node, paths: Paths, args: Sequence[Tensor]) -> Tensor:
        leaves, buffers = self.leaves(paths), [(leaf, node.path(leaf)) for leaf in node.layer.buffers]
        leaves |= {leaf: self.moved[path] for leaf, path in buffers if path in self.moved}
        value, new = node.layer.train(leaves, *args, generator=self.generator)
        self.moved |= {node.path(leaf): tensor for leaf, tensor in new.items()}
        return value

    def parameters(self) -> Params:
        return merge(self.params, self.moved)


def _one_by_one(params: Params, spec: Spec, values: Mapping[str, Tensor], tap: Tap | None) -> Any:
    """The outputs for every example of a batch alone, joined along axis 0."""
    count = max(map(len, values.values()))
    examples = [{name: x[k : k + 1] for name, x in values.items()} for k in range(count)]
    outputs = [evaluate(params, spec, (example,), tap=tap)[0] for example in examples]
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    if isinstance(outputs[0], Mapping):
        return {name: torch.cat([one[name] for one in outputs]) for name in outputs[0]}
    return tuple(map(torch.cat, zip(*outputs, strict=True)))


def bind_inputs(spec: Spec, inputs: Sequence[Inputs]) -> dict[str, Any]:
    """The tensors that come in, by the names of the input nodes."""
    tensors: Any = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], (Mapping, Sequence)) else inputs
    names = [*spec.input_layers]
    if isinstance(tensors, Mapping) and set(tensors) != set(names):
        raise ShapeError(
            f"Inputs are named as the network's Input nodes, {', '.join(names)}; received {', '.join(tensors)}."
        )
    if len(tensors) != len(names):
        raise ShapeError(
            f"Inputs are as many as the network's Input nodes, {len(names)} ({', '.join(names)}); "
            f"received {len(tensors)}."
        )
    return dict(tensors) if isinstance(tensors, Mapping) else dict(zip(names, tensors, strict=True))


def _at(params: Params, path: tuple[str, ...]) -> Tensor:
    value: Any = params
    for key in path:
        value = value[key]
    assert isinstance(value, Tensor)
    return value
