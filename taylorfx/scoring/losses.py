"""Batches and their losses, example by example or as a whole.

Derivatives and changes of the loss are those of single observations. By default these are the examples: a loss is a
function of one example's outputs and targets, and its mean or sum over a batch are taken afterwards. A loss that
compares examples (contrastive) has the whole batch for its observation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.internals import vectorized
from taylorfx.network.run import Inputs, apply, bind_inputs
from taylorfx.network.spec import Spec
from taylorfx.scoring.batches import Batch, Parted, Split, Targets, by_example, one_by_one, size
from taylorfx.tree import Params

__all__ = ["Loss", "Objective", "Outputs", "Unvectorized", "cross_entropy", "refuse_flat"]


Outputs = Any
"""What a network gives out: a tensor, a tuple or a dict of tensors."""


Loss = Callable[[Outputs, Targets], Tensor]
"""``loss(outputs, targets)``, called on every example as a batch of one, so that mean and sum are the same."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """``torch.nn.functional.cross_entropy`` of each example, ``(N,)``: what `measure` takes by default.

    Raises:
        ValueError: if the targets' shape, dtype or device do not fit the outputs, or a target is no class (on the
            CPU; elsewhere looking would wait for the device).
    """
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        received = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"Cross entropy takes scores of classes, (N, classes, ...); received {received}. Give a loss.")
    if not isinstance(targets, Tensor):
        raise ValueError(
            f"Targets of cross entropy are a tensor, classes or their probabilities; received {type(targets).__name__}."
            " Give a loss."
        )
    classes, expected = outputs.shape[1], (outputs.shape[0], *outputs.shape[2:])
    fits = targets.shape == (outputs.shape if targets.is_floating_point() else expected)
    if not fits or targets.device != outputs.device:
        raise ValueError(
            f"Targets are classes of shape {tuple(expected)}, or their probabilities of shape {tuple(outputs.shape)}, "
            f"on {outputs.device} as the outputs; received {targets.dtype} of shape {tuple(targets.shape)} on "
            f"{targets.device}."
        )
    visible = targets.device.type == "cpu" and not vectorized(targets)
    if not targets.is_floating_point() and visible and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if (low < 0 and low != -100) or high >= classes:
            raise ValueError(f"Targets are classes, 0 to {classes - 1}; received {low} to {high}.")
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses if losses.ndim == 1 else losses.flatten(1).mean(1)


class Unvectorized(Exception):
    """``torch.func.vmap`` cannot run the loss: by what it computes, or by the structure of its targets."""


@dataclass(frozen=True)
class Objective:
    """A loss, and what it is a function of: one example, or the whole batch.

    Attributes:
        loss: ``loss(outputs, targets)``, a tensor of one number.
        per_example: it is called on each example as a batch of one; otherwise on the batch, which is one observation.
        split: takes the targets apart, where they are not tensors (or lists) with one entry per example.
    """

    loss: Loss
    per_example: bool = True
    split: Split | None = None

    def __post_init__(self) -> None:
        if self.split is not None and not self.per_example:
            raise ValueError(
                "A loss of the whole batch takes its targets as they are; received per_example=False and a split. "
                "Leave one of them out."
            )

    def parted(self, inputs: Inputs, targets: Targets, spec: Spec) -> Batch:
        """The batch, with targets that can be sliced along the examples as the inputs can."""
        tensors = [x for x in bind_inputs(spec, (inputs,)).values() if isinstance(x, Tensor) and x.ndim]
        if self.split is None and self.per_example:
            count = len(tensors[0]) if tensors else None
            targets = targets if isinstance(targets, Parted) else by_example(targets, count)
        sizes = {len(x) for x in tensors}
        if self.split is not None and len(sizes) == 1 and not isinstance(targets, Parted):
            targets = Parted(tuple(self.split(targets, k) for k in range(*sizes)))
        if self.per_example:
            sizes |= {size(x) for x in optree.tree_leaves(targets)}
        if len(sizes) != 1 or not min(sizes):
            way_out = " Targets of another structure need split=..., a loss of the whole batch per_example=False."
            raise ValueError(
                f"A batch has one or more examples, as many inputs as targets; received {sorted(sizes)}."
                f"{way_out * (len(sizes) > 1)}"
            )
        return inputs, targets

    def observations(self, inputs: Inputs, spec: Spec) -> int:
        """How many losses a batch has."""
        return len(next(iter(bind_inputs(spec, (inputs,)).values()))) if self.per_example else 1

    def vectorized(self, outputs: Outputs, targets: Targets) -> Tensor:
        """The loss of every example, ``(N,)``, by ``torch.func.vmap``.

        Raises:
            Unvectorized: if that cannot be; `plain` then tells whether the loss itself is at fault.
        """
        if isinstance(targets, Parted) or not self.per_example:
            raise Unvectorized
        if self.loss is cross_entropy:
            return cross_entropy(outputs, targets)
        _same_length(outputs, targets)
        try:
            return torch.func.vmap(self._one)(*(optree.tree_map(lambda x: x[:, None], x) for x in (outputs, targets)))
        except Exception as error:  # of any kind: numpy, for one, has its own; the loss runs again without vmap
            raise Unvectorized from error

    def plain(self, outputs: Outputs, targets: Targets) -> Tensor:
        """The losses, ``(N,)`` or ``(1,)`` of the whole batch, by plain calls: what they raise is the user's own.

        They are given copies of the outputs, which they may write over as in training.
        """
        if not self.per_example:
            return self._one(optree.tree_map(torch.clone, outputs), targets)[None]
        count = _same_length(outputs, targets)

        def example(k: int) -> Tensor:
            mine: Outputs = optree.tree_map(lambda x: x[k : k + 1].clone(), outputs)
            wanted: Targets = optree.tree_map(lambda x: x[k : k + 1], targets)
            return self._one(mine, wanted.each[0] if isinstance(wanted, Parted) else wanted)

        return torch.stack([example(k) for k in range(count)])

    def slopes(self, outputs: Outputs, targets: Targets) -> tuple[Tensor, Outputs]:
        """The `plain` losses, and the derivatives of their sum by the outputs: ordinary autograd, without transforms.

        So a loss may look at numbers: copy to numpy, branch on data, match boxes.
        """
        leaves, tree = optree.tree_flatten(outputs)
        free = [x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for x in leaves]
        with torch.enable_grad():
            each = self.plain(tree.unflatten(free), targets)
        wanted = [x for x in free if x.requires_grad]
        if not each.requires_grad or not wanted:
            return each.detach(), optree.tree_map(torch.zeros_like, outputs)
        grads = iter(torch.autograd.grad(each.sum(), wanted, materialize_grads=True))
        return each.detach(), tree.unflatten([next(grads) if x.requires_grad else torch.zeros_like(x) for x in free])

    def _one(self, outputs: Outputs, targets: Targets) -> Tensor:
        value: object = self.loss(outputs, targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            received = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            what = "example" if self.per_example else "batch"
            raise ValueError(f"A loss is a tensor with one number per {what}; received {received}. Sum or average it.")
        return value.sum()


def _same_length(outputs: Outputs, targets: Targets) -> int:
    """The number of examples, which all outputs have for their first size."""
    sizes = {size(x) for tree in (outputs, targets) for x in optree.tree_leaves(tree)}
    if len(sizes) != 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in optree.tree_leaves(outputs))
        raise ValueError(
            f"A loss per example takes outputs whose first axis runs over the examples; received shapes {shapes}. Put "
            "that axis first in the network, or take the loss of the whole batch: per_example=False."
        )
    return sizes.pop()


def refuse_flat(
    objective: Objective,
    params: Params,
    spec: Spec,
    batch: Batch,
    largest: Tensor,
    mean: Tensor,
    *,
    values: bool = False,
) -> None:
    """Refuse a loss that is the same whatever the outputs are, since it says nothing about any unit.

    That is looked for where all that was measured is zero or may be rounding: of a few examples, at their outputs, at
    smaller ones and at each other's. So a loss that is flat only here (a margin that all examples keep) passes.

    Args:
        batch: a parted one.
        largest: the largest mean magnitude of what the loss changes by, over the units.
        mean: the mean loss.
        values: the loss itself is compared, which needs no derivatives (for the oracle).
    """
    if largest > 1e3 * torch.finfo(largest.dtype).eps * mean.abs().clamp(min=1):
        return
    some = one_by_one(batch, spec)[:4] if objective.per_example else [batch]
    with torch.no_grad():
        outputs = [apply(params, spec, inputs) for inputs, _ in some]
    for k, (_, targets) in enumerate(some):
        scales = (1, 0.5, 1e-3, -1) if values else (1, 0.5, 1e-3)
        points = [optree.tree_map(lambda x, c=c: x * c if x.is_floating_point() else x, outputs[k]) for c in scales]
        same = _same_value if values else _without_slope
        if not same(objective, [*points, outputs[k - 1]], targets):
            return
    if objective.per_example:
        raise ValueError(
            "A loss has to change with the outputs; received one of which the derivatives by the outputs of an example "
            "alone are zero, or rounding. If it compares the examples of a batch (contrastive), measure it as a loss "
            "of the whole batch, per_example=False; if it detaches, rounds or counts, give one that is differentiable."
        )
    raise ValueError(
        "A loss has to change with the outputs; received one of which the derivatives by the outputs of a whole batch "
        "are zero, or rounding. If it detaches, rounds or counts, give one that is differentiable."
    )


def _same_value(objective: Objective, points: Sequence[Outputs], targets: Targets) -> bool:
    """Whether the loss is the same at all these outputs, up to rounding."""

    def spread(points: Sequence[Outputs], targets: Targets) -> Tensor:
        losses = torch.cat([objective.plain(outputs, targets) for outputs in points])
        return (losses - losses[0]).abs().max() / losses[0].abs().clamp(min=1)

    with torch.no_grad():
        try:
            return bool(spread([_double(x) for x in points], _double(targets)) <= 1e-12)
        except Exception:  # the loss may hold tensors of its own, of another precision
            return bool(spread(points, targets) == 0)


def _without_slope(objective: Objective, points: Sequence[Outputs], targets: Targets) -> bool:
    """Whether the derivatives at all these outputs are zero or, as a higher precision tells, rounding."""

    def steepness(outputs: Outputs, targets: Targets) -> float:
        slopes = optree.tree_leaves(objective.slopes(outputs, targets)[1])
        pairs = [(x, s) for x, s in zip(optree.tree_leaves(outputs), slopes, strict=True) if x.numel()]
        return max(float(s.abs().max()) * (float(x.abs().max()) or 1.0) for x, s in pairs)

    def flat(outputs: Outputs) -> bool:
        coarse = steepness(outputs, targets)
        try:
            fine = steepness(_double(outputs), _double(targets))
        except Exception:  # as above
            return coarse == 0
        return fine <= 1e-12 or fine <= 1e-4 * coarse

    return all(map(flat, points))


def _double(tree: Targets) -> Targets:
    """The tree with its floating-point tensors in double precision."""
    if isinstance(tree, Parted):
        return Parted(tuple(map(_double, tree.each)))
    return optree.tree_map(
        lambda x: x.to(torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x, tree
    )
