"""Sums over examples: what is measured adds up, over batches, processes and machines alike."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Moments", "Statistics"]


@dataclass(frozen=True)
class Moments:
    """Sums over the activations that are read, per unit: how many, their sum, their squares, how many are zero."""

    count: Tensor
    sum: Tensor
    sum_sq: Tensor
    zeros: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Statistics:
    """Additive sums of per-example gate derivatives ``g``: batches, processes and machines are all one ``+``.

    Attributes:
        n: the number of examples.
        batches: the number of batches.
        loss: the sum of the examples' losses.
        sum, sum_abs, sum_sq: ``(units,)``, of ``g``, ``|g|`` and ``g^2`` over the examples.
        sum_abs_mean: of ``|g|`` where each read is averaged over its positions (the paper's eq. 8 to the letter).
        sum_batch_abs, sum_batch_sq: over batches, of the absolute sum and of the squared mean of a batch's ``g``.
        moments: of the activations at the reads, if asked for.
        rows: ``(n, units)``, every example's ``g``, if asked for: the factor of the Gram matrix ``E[g g']``.
        units: the units' names, by which statistics tell whether they are of the same coupling.
    """

    n: int
    batches: int
    loss: Tensor
    sum: Tensor
    sum_abs: Tensor
    sum_sq: Tensor
    sum_abs_mean: Tensor
    sum_batch_abs: Tensor
    sum_batch_sq: Tensor
    moments: Moments | None = None
    rows: Tensor | None = None
    units: tuple[str, ...] = ()

    def __add__(self, other: Statistics | int) -> Statistics:
        if isinstance(other, int) and other == 0:  # the start of Python's sum()
            return self
        if not isinstance(other, Statistics):
            return NotImplemented
        kinds = [
            f"{len(x.sum)} units{' with moments' * (x.moments is not None)}{' with rows' * (x.rows is not None)}"
            for x in (self, other)
        ]
        if self.units != other.units or kinds[0] != kinds[1]:
            raise ValueError(
                "Statistics add up when they are of the same units, with or without moments and rows alike; "
                f"received {' and '.join(kinds)}. Measure both with one coupling and the same options."
            )
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name != "units"}
        sums: dict[str, Any] = {name: None if a is None else a + b for name, (a, b) in pairs.items() if name != "rows"}
        rows = None if self.rows is None or other.rows is None else torch.cat([self.rows, other.rows])
        return replace(self, **sums, rows=rows)

    __radd__ = __add__
