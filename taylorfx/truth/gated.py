"""The loss as a function of the gates, and its derivatives, at any values of the gates.

`taylorfx.measure` computes the derivatives at gates of one in less time and memory. The functions here can be
differentiated and transformed further; `oracle` and the forecasts are built from them.
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
    params: Params, spec: Spec, inputs: Inputs, targets: object, coupling: Coupling, values: Tensor,
    *, measurement: Measurement | None = None, **options: Unpack[ObjectiveOptions],
) -> Tensor:  # fmt: skip
    """The loss of every example, ``(N,)``, at gates ``(units,)`` or, with gates for each example, ``(N, units)``.

    With ``per_example=False`` it is the loss of the whole batch, ``(1,)``.

    >>> from taylorfx import apply, couple, init, layers as L, serial
    >>> spec = serial(L.Input((3,)), a=L.Linear(3, 4), relu=L.ReLU(), b=L.Linear(4, 2))
    >>> params = init(spec, torch.Generator().manual_seed(0))
    >>> coupling, x, y = couple(params, spec), torch.eye(3), torch.tensor([0, 1, 0])
    >>> whole = gated_loss(params, spec, x, y, coupling, torch.ones(4))
    >>> torch.equal(whole, torch.nn.functional.cross_entropy(apply(params, spec, x), y, reduction="none"))
    True
    """
    objective = objective_of(measurement, options)
    batch = objective.parted(inputs, targets, spec)
    return either(lambda plain: gated((params, spec, *batch, coupling), values, objective, plain=plain))


def gradient(
    params: Params, spec: Spec, inputs: Inputs, targets: object, coupling: Coupling, values: Tensor,
    *, measurement: Measurement | None = None, **options: Unpack[ObjectiveOptions],
) -> Tensor:  # fmt: skip
    """The derivatives of the loss by the gates, at any ``values`` of the gates.

    `taylorfx.derivatives` computes those at gates of one with less memory.

    >>> from taylorfx import couple, init, layers as L, measure, serial
    >>> spec = serial(L.Input((3,)), a=L.Linear(3, 4), relu=L.ReLU(), b=L.Linear(4, 2))
    >>> params = init(spec, torch.Generator().manual_seed(0))
    >>> coupling, x, y = couple(params, spec), torch.eye(3), torch.tensor([0, 1, 0])
    >>> at_one = gradient(params, spec, x, y, coupling, torch.ones(4))
    >>> torch.allclose(at_one, measure(params, spec, (x, y), coupling).sum)
    True

    Returns:
        Of the shape of ``values``. For ``(units,)`` they are the derivatives of the sum of all examples' losses; for
        ``(N, units)`` those of each example's loss.
    """
    objective = objective_of(measurement, options)
    batch = objective.parted(inputs, targets, spec)
    return either(lambda plain: slope((params, spec, *batch, coupling), values, objective, plain=plain))


def curvature(
    params: Params, spec: Spec, inputs: Inputs, targets: object, coupling: Coupling, values: Tensor, direction: Tensor,
    *, measurement: Measurement | None = None, **options: Unpack[ObjectiveOptions],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The `gradient` at ``values``, and the product of the Hessian by the gates with ``direction``.

    Everything is ``(units,)``, and the results are those of the sum of all examples' losses. The product is computed by
    forward-mode over reverse-mode differentiation, in the time of about four forward passes, and the Hessian itself is
    never formed (Pearlmutter 1994, "Fast exact multiplication by the Hessian").
    """
    objective = objective_of(measurement, options)
    batch = objective.parted(inputs, targets, spec)
    return either(lambda plain: bend((params, spec, *batch, coupling), values, direction, objective, plain=plain))


Network = tuple[Params, Spec, Inputs, object, Coupling]
"""Parameters, spec, inputs, targets (parted by example) and coupling: what the loss depends on besides the gates."""


def either(function: Callable[[bool], T]) -> T:
    """``function(False)``, with a vectorized loss; if the loss cannot be vectorized, ``function(True)``, one by one."""
    with suppress(Unvectorized):
        return function(False)
    return function(True)  # outside of the handler, so that an error of the user's loss is not chained to ours


def gated(network: Network, values: Tensor, objective: Objective, *, plain: bool) -> Tensor:
    """`gated_loss`, with the loss vectorized or called plainly, on one example after the other."""
    params, spec, inputs, targets, coupling = network
    outputs = apply(params, spec, inputs, gates=gates(coupling, values))
    return objective.plain(outputs, targets) if plain else objective.vectorized(outputs, targets)


def slope(network: Network, values: Tensor, objective: Objective, *, plain: bool) -> Tensor:
    """`gradient`, by transforms of torch.func or, for a plain loss, by autograd."""
    if plain:
        return _twice(network, values, None, objective)[0]
    return torch.as_tensor(torch.func.grad(lambda at: gated(network, at, objective, plain=False).sum())(values))


def bend(
    network: Network, values: Tensor, direction: Tensor, objective: Objective, *, plain: bool
) -> tuple[Tensor, Tensor]:
    """`curvature`, by transforms of torch.func or, for a plain loss, by autograd."""
    if plain:
        return _twice(network, values, direction, objective)
    with torch.enable_grad():  # otherwise some backward passes are fused, and cannot be differentiated
        along = partial(slope, network, objective=objective, plain=False)
        first, second, *_ = torch.func.jvp(along, (values,), (direction,))
    return first, second


def _twice(network: Network, values: Tensor, direction: Tensor | None, objective: Objective) -> tuple[Tensor, Tensor]:
    """The gradient by autograd, and the Hessian's product with a direction, which is zero without one."""
    with torch.enable_grad():
        free = values.detach().clone().requires_grad_()
        each = gated(network, free, objective, plain=True).sum()
        if not each.requires_grad:
            return torch.zeros_like(values), torch.zeros_like(values)
        (first,) = torch.autograd.grad(each, free, create_graph=direction is not None, materialize_grads=True)
        if direction is None or not first.requires_grad:
            return first.detach(), torch.zeros_like(values)
        (second,) = torch.autograd.grad(first @ direction, free, materialize_grads=True)
    return first.detach(), second


def rows(function: Callable[[Tensor], T], points: Tensor) -> T:
    """The values of a function at every row, stacked. A single row needs no ``vmap``, which some functions refuse."""
    if len(points) > 1:
        return torch.func.vmap(function)(points)
    single: Any = function(points[0])
    return cast(T, optree.tree_map(lambda x: x[None], single))
