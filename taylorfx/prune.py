"""The sentence in one word: couple, measure, select, cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from taylorfx.coupling import couple
from taylorfx.criteria import Criterion, taylor
from taylorfx.gates import measure
from taylorfx.loss import Batch, Loss, cross_entropy
from taylorfx.plan import cut
from taylorfx.selection import Budget, select
from taylorfx.spec import Spec
from taylorfx.tree import Params

__all__ = ["prune"]


def prune(
    params: Params,
    spec: Spec,
    batch: Batch | Iterable[Batch],
    *,
    budget: Budget | float | int,
    criterion: Criterion = taylor,
    loss: Loss = cross_entropy,
    moments: bool = False,
    protect: str | Sequence[str] = (),
    floor: int | Mapping[str, int] = 1,
    most: float | Mapping[str, float] = 1.0,
    multiple: int | Mapping[str, int] = 1,
    per_layer: bool = False,
    exact_only: bool = False,
) -> tuple[Params, Spec]:
    """A smaller network that computes what the units it keeps computed: new parameters and a new spec.

    Args:
        batch: ``(inputs, targets)``, or an iterable of such.
        budget: what may remain: ``Flops(0.5)``, ``Parameters(...)``, ``Units(...)``, ``Remove(1)``.
        criterion: a function of ``(statistics, coupling)``, or of ``(params, coupling)`` if marked by `of_weights`.

    The other arguments are those of `measure` and `select`, and so are the errors. Nothing given is changed. To see
    what is going to happen, or to cut momentum along, write the sentence out.
    """
    coupling = couple(params, spec)
    if getattr(criterion, "of_weights", False):
        scores: torch.Tensor = criterion(params, coupling)  # type: ignore[arg-type]
    else:
        stats = measure(params, spec, batch, coupling, loss=loss, moments=moments)
        scores = criterion(stats, coupling)  # type: ignore[arg-type]
    plan = select(
        scores, coupling, budget=budget, protect=protect, floor=floor, most=most, multiple=multiple,
        per_layer=per_layer, exact_only=exact_only,
    )  # fmt: skip
    return cut(params, plan), plan.spec
