"""Batches and their losses, example by example.

Derivatives and changes of the loss are those of every single example: a loss is a function of one example's outputs and
targets, and its mean or sum over a batch are taken afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import optree
import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.coupling import Coupling
from taylorfx.spec import Inputs, Spec, bind_inputs, check
from taylorfx.tree import Params

__all__ = ["Batch", "Loss", "cross_entropy", "each_batch", "examples", "one_by_one", "own", "per_example"]

Batch = tuple[Inputs, Any]
"""``(inputs, targets)``."""

Loss = Callable[[Any, Any], Tensor]
"""``loss(outputs, targets)``, called on every example as a batch of one, so that mean and sum are the same."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """``torch.nn.functional.cross_entropy`` of each example, ``(N,)``: what `measure` takes by default.

    Raises:
        ValueError: if the targets' shape, dtype or device do not fit the outputs, or a target is no class (on the
            CPU; elsewhere looking would wait for the device).
    """
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"Cross entropy takes scores of classes, (N, classes, ...); received {found}. Give a loss.")
    classes, expected = outputs.shape[1], (outputs.shape[0], *outputs.shape[2:])
    fits = targets.shape == (outputs.shape if targets.is_floating_point() else expected)
    if not fits or targets.device != outputs.device:
        raise ValueError(
            f"Targets are classes of shape {tuple(expected)}, or their probabilities of shape {tuple(outputs.shape)}, "
            f"on {outputs.device} as the outputs; received {targets.dtype} of shape {tuple(targets.shape)} on "
            f"{targets.device}."
        )
    visible = targets.device.type == "cpu" and not torch._C._functorch.is_batchedtensor(targets)
    if not targets.is_floating_point() and visible and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if (low < 0 and low != -100) or high >= classes:
            raise ValueError(f"Targets are classes, 0 to {classes - 1}; received {low} to {high}.")
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses if losses.ndim == 1 else losses.flatten(1).mean(1)


def per_example(loss: Loss, outputs: Any, targets: Any) -> Tensor:
    """The loss of every example, ``(N,)``."""
    if loss is cross_entropy:
        return cross_entropy(outputs, targets)

    def one(output: Any, target: Any) -> Tensor:
        output, target = (optree.tree_map(lambda x: x[None], tree) for tree in (output, target))
        value: Any = loss(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"A loss is a tensor with one number per example; received {found}. Sum or average it.")
        return value.sum()

    return torch.func.vmap(one)(outputs, targets)


def examples(inputs: Inputs, targets: Any, spec: Spec) -> int:
    """The number of examples of a batch, which all its tensors share."""
    tensors: Sequence[Any] = [*bind_inputs(spec, (inputs,)).values(), *optree.tree_leaves(targets)]
    sizes = {len(x) for x in tensors if isinstance(x, Tensor) and x.ndim}
    if len(sizes) != 1 or not min(sizes):
        raise ValueError(f"A batch has one or more examples, as many inputs as targets; received {sorted(sizes)}.")
    return sizes.pop()


def one_by_one(batch: Batch, spec: Spec) -> list[Batch]:
    """The examples of a batch as batches of one."""
    count, whole = examples(*batch, spec), cast(Any, batch)
    return [cast(Batch, optree.tree_map(lambda x, k=k: x[k : k + 1], whole)) for k in range(count)]


def each_batch(batches: Batch | Iterable[Batch]) -> Iterator[Batch]:
    """The batches, of which a tuple is a single one."""
    for k, batch in enumerate([batches] if isinstance(batches, tuple) else batches):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            kind = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
            raise ValueError(f"A batch is a pair (inputs, targets), several come in a list; batch {k} is a {kind}.")
        yield batch[0], batch[1]


def own(params: Params, spec: Spec, coupling: Coupling) -> None:
    """Refuse parameters or a coupling that are not of this network."""
    if coupling.spec != spec:
        raise ValueError(
            f"Units are those of the network itself; received a coupling of another one, of {len(coupling)} units. "
            "Couple again: couple(params, spec)."
        )
    check(params, spec)
