"""Positions that count: repairs leave padding and masked positions out where they are told which."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from taylorfx.layers.base import Shape
from taylorfx.network.run import Inputs

__all__ = ["Positions", "counting", "mask_of"]

Positions = Callable[[Inputs], Tensor | None]
"""``positions(inputs)``: a mask ``(N, T)``, zero or false where a position does not count; ``None`` if all do."""


def mask_of(positions: Positions | None, inputs: Inputs) -> Tensor | None:
    """Which positions of a batch count, as truth values.

    Raises:
        ValueError: for what is no mask.
    """
    mask: object = None if positions is None else positions(inputs)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim < 2 or not ((mask == 0) | (mask == 1)).all():
        received = f"a tensor {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            "Positions are a function of the inputs that gives a mask (N, T), ones where positions count and zeros "
            f"elsewhere; received {received}. Give the mask of the tokens, not what is added to scores."
        )
    return mask.detach() != 0


def counting(mask: Tensor | None, axes: Shape) -> Tensor | None:
    """Which rows of a layer count, ``(rows,)``; ``None`` if all do, as where they lie along other axes (pooled).

    >>> import torch
    >>> mask = torch.tensor([[True, True, False]])
    >>> counting(mask, (1, 3, 2))  # positions, and heads
    tensor([ True,  True,  True,  True, False, False])
    >>> counting(mask, (3,)), counting(mask, (1,))  # positions of all examples along one axis; an example's only row
    (tensor([ True,  True, False]), None)
    """
    if mask is None:
        return None
    if axes[: mask.ndim] != mask.shape:
        if axes[:1] != (mask.numel(),):
            return None
        mask = mask.flatten()
    return mask.reshape(*mask.shape, *[1] * (len(axes) - mask.ndim)).expand(axes).flatten()
