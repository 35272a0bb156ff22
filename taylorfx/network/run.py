"""Run a network: pure functions of parameters, inputs and gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from taylorfx.distributed import computed, is_shared
from taylorfx.layers import Leaves, ShapeError
from taylorfx.network.errors import explain
from taylorfx.network.labels import STATE
from taylorfx.network.optional import chosen
from taylorfx.network.parameters import gather
from taylorfx.network.spec import Spec, SpecError, Step
from taylorfx.tree import Params, merge

__all__ = ["Inputs", "apply", "bind_inputs", "evaluate", "fitted", "gating", "run", "train"]


Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a network takes: a tensor, a tuple in the order of its inputs, or a dict by their names."""


Tap = Callable[[str, int, Tensor], Tensor]
"""Called with a node's name, a slot and the tensor there; returns it. A slot is an input's number or -1 for the output;
at -2, `STATE`, it is called for every state that a recurrent layer reads."""

Read = Callable[[Tensor], Tensor]
"""The tap of one recurrent layer's state."""


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
    """The outputs and the new parameters."""
    leaves = gather(params, spec)
    outputs, moved = run(leaves, spec, inputs, tap=tap, training=training, generator=generator)
    return outputs, merge(params, {spec.layout.paths[k]: leaf for k, leaf in moved.items()})


def run(
    leaves: Sequence[Tensor],
    spec: Spec,
    inputs: Sequence[Inputs],
    *,
    tap: Tap | None = None,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Any, dict[int, Tensor]]:
    """The outputs, and the running statistics that moved, by their places. Every run of a network comes through here.

    Args:
        leaves: the parameters, which fit the network, in the order of ``spec.layout.paths``.
    """
    values = bind_inputs(spec, inputs)
    if others := [f"{name} is {type(x).__name__}" for name, x in values.items() if not isinstance(x, Tensor)]:
        raise ShapeError(f"A network takes tensors; received: {', '.join(others)}.")
    if spec.calls:
        part, places = chosen(spec.calls, values)
        own = [leaves[k] for k in places]
        outputs, new = run(own, part, (values,), tap=tap, training=training, generator=generator)
        return outputs, {places[k]: leaf for k, leaf in new.items()}
    single = [layer for name, layer in spec.input_layers.items() if layer.alone and len(values[name]) != 1]
    if single and not training and all(layer.apart for layer in single):
        return _one_by_one(leaves, spec, values, tap), {}
    if single:
        raise ShapeError(
            "This network takes one example at a time: it was captured from a module made for a fixed number of them. "
            "Give batches of one."
        )
    shapes = {name: values[name].shape[1:] for name in spec.input_layers}
    if torch.compiler.is_compiling():
        from taylorfx.network.traced import traced_steps  # loads torch's compiler

        steps = traced_steps(spec, spec.axes(shapes))
    else:
        steps = spec.fitted(shapes)
    own = list(leaves)
    moved: set[int] = set()

    def train(step: Step, args: Iterable[Tensor], read: Read | None, params: Leaves) -> Tensor:
        """The value of a node in training. Nodes that share running statistics move them one after the other."""
        if read is not None:
            return step.node.layer.recur(params, *args, read=read, training=True, generator=generator)
        value, new = step.node.layer.train(params, *args, generator=generator)
        for leaf, k in step.leaves if new else ():
            if leaf in new:
                own[k] = new[leaf]
                moved.add(k)
        return value

    def compute(step: Step, args: Iterable[Tensor], read: Read | None) -> Tensor:
        """The value of a node in training, or of shared parameters, which are whole meanwhile."""
        one = train if training else _infer
        return computed({leaf: own[k] for leaf, k in step.leaves}, partial(one, step, args, read))

    special = training or (not torch.compiler.is_compiling() and any(map(is_shared, leaves)))
    return _run(own, spec, steps, values, compute if special else None, tap), {k: own[k] for k in moved}


def _infer(step: Step, args: Iterable[Tensor], read: Read | None, params: Leaves) -> Tensor:
    """The value of a node in inference."""
    layer = step.node.layer
    return layer.apply(params, *args) if read is None else layer.recur(params, *args, read=read)


def _run(
    leaves: Sequence[Tensor],
    spec: Spec,
    steps: Sequence[Step],
    values: dict[str, Any],
    compute: Callable[[Step, Iterable[Tensor], Read | None], Tensor] | None,
    tap: Tap | None,
) -> Any:
    """The nodes in order; a value that no later node uses is let go at once. Nodes compute unless ``compute`` does."""
    inputs = dict(values)
    value_of = values.__getitem__
    for step in steps:
        node, places, unused = step
        name = node.name
        if name not in values:
            try:
                args: Iterable[Tensor] = map(value_of, node.inputs)
                if tap is not None:
                    args = [tap(name, slot, x) for slot, x in enumerate(args)]
                read = None if tap is None or not node.layer.recurrent else partial(tap, name, STATE)
                if compute is not None:
                    value = compute(step, args, read)
                else:
                    value = _infer(step, args, read, {leaf: leaves[k] for leaf, k in places} if places else {})
                values[name] = value if tap is None else tap(name, -1, value)
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                if not torch.compiler.is_compiling():
                    explain(dict(zip(spec.layout.paths, leaves, strict=True)), spec, inputs, node, error)
                raise
        for x in unused:
            del values[x]
    outputs = tuple(values[x] for x in spec.outputs)
    if spec.keys:
        return dict(zip(spec.keys, outputs, strict=True))
    return outputs[0] if len(outputs) == 1 else outputs


def _one_by_one(leaves: Sequence[Tensor], spec: Spec, values: Mapping[str, Tensor], tap: Tap | None) -> Any:
    """The outputs for every example of a batch alone, joined along axis 0."""
    count = max(map(len, values.values()))
    examples = [{name: x[k : k + 1] for name, x in values.items()} for k in range(count)]
    outputs = [run(leaves, spec, (example,), tap=tap)[0] for example in examples]
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    if isinstance(outputs[0], Mapping):
        return {name: torch.cat([one[name] for one in outputs]) for name in outputs[0]}
    return tuple(map(torch.cat, zip(*outputs, strict=True)))


def fitted(spec: Spec, inputs: Inputs) -> Spec:
    """The network for inputs of these shapes: itself, where no number of its layers follows from them.

    Raises:
        ShapeError: if the inputs do not fit.
    """
    if not spec.sized:
        return spec
    values = bind_inputs(spec, (inputs,))
    declared = {name: layer.shape for name, layer in spec.input_layers.items()}
    shapes: list[Any] = [tuple(values[x].shape[1:]) if x in values else shape for x, shape in declared.items()]
    return spec if shapes == [*declared.values()] else spec.at(*shapes)


def bind_inputs(spec: Spec, inputs: Sequence[Inputs]) -> dict[str, Any]:
    """The tensors that come in, by the names of the input nodes."""
    tensors: Any = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], (Mapping, Sequence)) else inputs
    names = [*spec.input_layers]
    if spec.calls:
        return _present(spec, tensors)
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


def _present(spec: Spec, tensors: Any) -> dict[str, Any]:
    """The tensors that are there, of a network whose inputs may be left out: a dict without them, or None for them.

    By position, a shorter tuple leaves out those that may be.
    """
    if not isinstance(tensors, Mapping):
        names = [*spec.input_layers]
        if len(tensors) < len(names):
            names = next((list(inputs) for inputs in spec.calls if len(inputs) == len(tensors)), names)
        if len(tensors) != len(names):
            raise ShapeError(
                f"Inputs are as many as the network's Input nodes, {len(names)} ({', '.join(names)}), some of which "
                f"may be left out; received {len(tensors)}."
            )
        tensors = dict(zip(names, tensors, strict=True))
    present = {name: x for name, x in tensors.items() if x is not None}
    chosen(spec.calls, present)
    return present
