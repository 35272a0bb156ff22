"""Gates laid out at the reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taylorfx.coupling.units import Coupling

__all__ = ["Gates", "gates"]


Gates = dict[tuple[str, int, int], Tensor]
"""Factors at the reads, by node, input and axis, ready to broadcast."""


def gates(coupling: Coupling, values: Tensor) -> Gates:
    """Lay the values of the units' gates out at the reads, for ``apply(..., gates=...)``.

    Args:
        values: ``(units,)``, or ``(N, units)`` for a batch of ``N`` examples with gates of their own. A mask (0 or 1)
            removes units, anything between softens them; differentiable.
    """
    if values.ndim not in (1, 2) or values.shape[-1] != len(coupling):
        raise ValueError(
            f"Gates are one per unit, ({len(coupling)},), or so for each example, (N, {len(coupling)}); "
            f"received values of shape {tuple(values.shape)}."
        )
    extended = torch.cat([values, torch.ones_like(values[..., :1])], -1)  # unit -1 is always on
    result: Gates = {}
    for place in coupling.reads:
        factors = [extended[..., torch.as_tensor(row, device=values.device)] for row in place.units]
        gate = factors[0]
        for factor in factors[1:]:
            gate = gate * factor
        shape = [1] * len(place.shape)
        shape[place.axis] = place.units.shape[1]
        result[place.key] = gate.reshape(*values.shape[:-1], *shape)
        if values.ndim == 2 and place.example is not None:
            result[place.key] = _among(result[place.key], place.shape, *place.example)
    return result


def _among(gate: Tensor, shape: Sequence[int], axis: int, before: int) -> Tensor:
    """The reverse of `apart` for gates that broadcast: the examples back into the axis in which they run."""
    sizes = [-1] * gate.ndim
    sizes[axis + 1] = shape[axis]
    spread: Tensor = gate.expand(sizes).unflatten(axis + 1, (before, -1))  # type: ignore[no-untyped-call]
    return spread.movedim(0, axis + 1).flatten(axis, axis + 2)
