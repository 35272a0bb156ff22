"""Sums over examples: what is measured adds up, over batches, processes and machines alike."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial

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


SUMS = (
    "n", "batches", "loss", "sum", "sum_abs", "sum_sq", "sum_abs_mean", "sum_batch_abs", "sum_batch_sq",
)  # fmt: skip
"""The attributes of `Statistics` that simply add up."""


@dataclass(frozen=True, repr=False)
class Statistics:
    """Additive sums of gate derivatives ``g`` of observations: batches, processes and machines are all one ``+``.

    An observation is an example or, measured with ``per_example=False``, a whole batch, or with ``per_position`` one
    position of an example. Statistics without any, of which there are `neutral` ones, change nothing that they are
    added to.

    Attributes:
        n: the number of observations.
        batches: the number of batches.
        loss: the sum of the examples' losses, or the batches'.
        sum, sum_abs, sum_sq: ``(units,)``, of ``g``, ``|g|`` and ``g^2`` over the observations.
        sum_abs_mean: of ``|g|`` where each read is averaged over its positions (the paper's eq. 8 to the letter).
        sum_batch_abs, sum_batch_sq: over batches, of the absolute sum and of the squared mean of a batch's ``g``.
        moments: of the activations at the reads, if asked for.
        rows: ``(n, units)``, every observation's ``g``, if asked for: the factor of the Gram matrix ``E[g g']``.
        units: the units' names, by which statistics tell whether they are of the same coupling.
        per_example: the observations are examples, or positions of them.
        per_position: the axis of an input whose positions are the observations, if they are: ``"input_ids.1"``.
        networks: what tells the measured networks apart (dtypes, digests of parameters and units), each once.
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
    per_example: bool = True
    per_position: str | None = None
    networks: tuple[str, ...] = ()

    @staticmethod
    def neutral(units: tuple[str, ...]) -> Statistics:
        """The statistics of no batch, with ``coupling.names``: ``stats + neutral`` is ``stats``."""
        zeros = partial(torch.zeros, len(units))
        return Statistics(0, 0, torch.zeros(()), zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), units=units)

    def __add__(self, other: Statistics | int) -> Statistics:
        if isinstance(other, int) and other == 0:  # the start of Python's sum()
            return self
        if not isinstance(other, Statistics):
            return NotImplemented
        kinds = [x._kind() for x in (self, other)]
        one_is_neutral = not (self.n and other.n)
        if self.units != other.units or (kinds[0] != kinds[1] and not one_is_neutral):
            raise ValueError(
                "Statistics add up when they are of the same units, with or without moments and rows alike; "
                f"received {' and '.join(kinds)}. Measure both with one coupling and the same options."
            )
        if one_is_neutral:
            return self if self.n else other
        sums = {name: getattr(self, name) + getattr(other, name) for name in SUMS}
        moments = None if self.moments is None or other.moments is None else self.moments + other.moments
        rows = None if self.rows is None or other.rows is None else torch.cat([self.rows, other.rows])
        networks = tuple(dict.fromkeys((*self.networks, *other.networks)))
        return replace(self, **sums, moments=moments, rows=rows, networks=networks)

    __radd__ = __add__

    def __repr__(self) -> str:
        """One line; the sums themselves are the attributes.

        >>> Statistics.neutral(("a[0]", "a[1]"))
        Statistics(0 examples in 0 batches, 2 units)
        """
        what = "position" if self.per_position else "example"
        examples = f"{self.n:,} {what}{'s' * (self.n != 1)} in " * self.per_example
        batches = f"{self.batches:,} batch{'es' * (self.batches != 1)}"
        mean = f", mean loss {self.loss.item() / self.n:.4g}" if self.n else ""
        return f"Statistics({examples}{batches}, {self._kind()}{mean})"

    def _kind(self) -> str:
        also = " with moments" * (self.moments is not None) + " with rows" * (self.rows is not None)
        of = (
            f" by position of {self.per_position}"
            if self.per_position
            else " of whole batches" * (not self.per_example)
        )
        return f"{len(self.sum)} units{also}{of}"
