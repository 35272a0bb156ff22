"""Run a network: pure functions of parameters, inputs and gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taylorfx.layers import ShapeError
from taylorfx.network.errors import explain
from taylorfx.network.parameters import check
from taylorfx.network.spec import Spec, SpecError
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
            explain(params, spec, bind_inputs(spec, inputs), node, error)
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
