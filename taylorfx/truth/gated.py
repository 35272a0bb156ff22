"""The loss as a function of the gates, at any values of them, and its derivatives there.

`taylorfx.measure` has the derivatives where all gates are one, for less time and memory. What is here can be
differentiated and transformed in its turn: `oracle` and the forecasts are made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import optree
import torch
from torch import Tensor

from taylorfx.coupling.units import Coupling
from taylorfx.network.run import Inputs, apply
from taylorfx.network.spec import Spec
from taylorfx.scoring.gates import gates
from taylorfx.scoring.losses import Objective, Unvectorized
from taylorfx.scoring.measurement import Measurement, objective_of
from taylorfx.tree import Params

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from taylorfx.scoring.measurement import ObjectiveOptions

__all__ = ["Network", "bend", "curvature", "either", "gated", "gated_loss", "gradient", "rows", "slope"]

T = TypeVar("T")


def gated_loss(
    params: Params, spec: Spec, inputs: Inputs, targets: Any, coupling: Coupling, values: Tensor,
    *, measurement: Measurement | None = None, **options: Unpack[ObjectiveOptions],
) -> Tensor:  # fmt: skip
    """The loss as a function of the gates: ``(N,)``, of every example, at gates ``(units,)`` or ``(N, units)``.

    With ``per_example=False`` it is ``(1,)``, of the whole batch.
    """
    objective = objective_of(measurement, options)
    batch = objective.parted(inputs, targets, spec)
    return either(lambda plain: gated((params, spec, *batch, coupling), values, objective, plain=plain))


def gradient(
    params: Params, spec: Spec, inputs: Inputs, targets: Any, coupling: Coupling, values: Tensor,
    *, measurement: Measurement | None = None, **options: Unpack[ObjectiveOptions],
) -> Tensor:  # fmt: skip
    """Derivatives by the gates at any ``values`` of them; `derivatives` has those at one, with less memory.

    Returns:
        In the shape of the values: at ``(units,)`` those of the sum of the examples' losses, at ``(N, units)`` each
        example's own.
    """
    objective = objective_of(measurement, options)
    batch = objective.parted(inputs, targets, spec)
    return either(lambda plain: slope((params, spec, *batch, coupling), values, objective, plain=plain))


def curvature(
    params: Params, spec: Spec, inputs: Inputs, targets: Any, coupling: Coupling, values: Tensor, direction: Tensor,
    *, measurement: Measurement | None = None, **options: Unpack[ObjectiveOptions],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The `gradient` at ``values`` and its change along ``direction``, ``H v`` with the Hessian by the gates.

    All are ``(units,)``, of the sum of the examples' losses. Forward over reverse (Pearlmutter 1994, "Fast exact
    multiplication by the Hessian"): some four forward passes, and the Hessian itself never exists.
    """
    objective = objective_of(measurement, options)
    batch = objective.parted(inputs, targets, spec)
    return either(lambda plain: bend((params, spec, *batch, coupling), values, direction, objective, plain=plain))


Network = tuple[Params, Spec, Inputs, Any, Coupling]
"""Parameters, spec, inputs, parted targets and coupling: what a loss needs besides the values of the gates."""


def either(function: Callable[[bool], T]) -> T:
    """What a function gives that takes whether the loss is called plainly: vectorized, if it can be."""
    with suppress(Unvectorized):
        return function(False)
    return function(True)  # what it raises is the user's own error, with nothing in front of it


def gated(network: Network, values: Tensor, objective: Objective, *, plain: bool) -> Tensor:
    """`gated_loss`, with the loss vectorized or plain."""
    params, spec, inputs, targets, coupling = network
    outputs = apply(params, spec, inputs, gates=gates(coupling, values))
    return objective.plain(outputs, targets) if plain else objective.vectorized(outputs, targets)


def slope(network: Network, values: Tensor, objective: Objective, *, plain: bool) -> Tensor:
    """`gradient`: by transforms of torch.func, or by ordinary autograd."""
    if plain:
        return _twice(network, values, None, objective)[0]
    return torch.as_tensor(torch.func.grad(lambda at: gated(network, at, objective, plain=False).sum())(values))


def bend(
    network: Network, values: Tensor, direction: Tensor, objective: Objective, *, plain: bool
) -> tuple[Tensor, Tensor]:
    """`curvature`: by transforms of torch.func, or by ordinary autograd."""
    if plain:
        return _twice(network, values, direction, objective)
    with torch.enable_grad():  # without it some backward passes are fused, and then cannot be differentiated
        along = partial(slope, network, objective=objective, plain=False)
        moved: Any = torch.func.jvp(along, (values,), (direction,))
    return moved[0], moved[1]


def _twice(network: Network, values: Tensor, direction: Tensor | None, objective: Objective) -> tuple[Tensor, Tensor]:
    """The gradient, and its change along a direction if there is one, by ordinary autograd."""
    with torch.enable_grad():
        free = values.detach().clone().requires_grad_()
        each = gated(network, free, objective, plain=True).sum()
        if not each.requires_grad:
            return torch.zeros_like(values), torch.zeros_like(values)
        wanted: dict[str, Any] = {"materialize_grads": True}
        (first,) = torch.autograd.grad(each, free, create_graph=direction is not None, **wanted)
        if direction is None or not first.requires_grad:
            return first.detach(), torch.zeros_like(values)
        (second,) = torch.autograd.grad(first @ direction, free, **wanted)
    return first.detach(), second


def rows(function: Callable[[Tensor], T], points: Tensor) -> T:
    """The function of every row; a single one as it is, for functions that ``vmap`` cannot do."""
    if len(points) > 1:
        return torch.func.vmap(function)(points)
    single: Any = function(points[0])
    return cast(T, optree.tree_map(lambda x: x[None], single))
