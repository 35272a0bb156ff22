"""From the derivatives at all places to those of the units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taylorfx.coupling.units import Place
from taylorfx.tree import Params, flatten

__all__ = ["Sums"]


@dataclass(frozen=True)
class Sums:
    """Which units' derivatives those at all places are; made once for all batches, as a copy to a device waits for it.

    Place p has 4 indices, of units 0 and 1; place q has 2, of unit 1 and of none, that is -1. Of 2 units in all::

        columns      p0 p1 p2 p3 | q0 q1
        index         0  0  1  1 |  1  2        2 is one past the last unit, and left out
        shares        ½  ½  ½  ½ |  1  1        for means: unit 0 has two columns of p
        unit 0        p0 + p1
        unit 1        p2 + p3 + q0

    Attributes:
        index: the units of all columns: one for every index of a place, and one more for every further unit that gates
            it. Where none does, it is one past the last.
        shares: for every row of units of a place, one by how many of its columns are the unit's.
        dtype: in which is summed: that of the parameters, single precision at least.
    """

    places: tuple[Place, ...]
    units: int
    index: Tensor
    shares: tuple[Tensor, ...]
    dtype: torch.dtype

    @staticmethod
    def at(places: Sequence[Place], units: int, params: Params) -> Sums:
        """Those of these places, on the device and in the dtype of the parameters."""
        real = next((x for x in flatten(params).values() if x.is_floating_point()), torch.zeros(()))
        dtype, device = torch.promote_types(real.dtype, torch.float32), real.device
        rows = [row for place in places for row in place.units % (units + 1)]
        index = np.concatenate([np.zeros(0, np.int64), *rows])
        shares = np.concatenate([np.zeros(0), *(1 / np.bincount(row)[row] for row in rows)])
        split = torch.split(torch.as_tensor(shares, dtype=dtype, device=device), [len(row) for row in rows])
        return Sums(tuple(places), units, torch.as_tensor(index, device=device), split, dtype)

    def __call__(self, height: int, columns: Mapping[str, Tensor], spread: Mapping[str, float] | None = None) -> Tensor:
        """The sums over each unit's columns, ``(height, units)``, or their means.

        Args:
            columns: ``(height, size)`` for every place, by its key as text; none for a place that the call of the
                network does not reach.
            spread: how many positions each index of a place stands for, by which a mean over them divides.
        """
        sizes = [(str(place.key), len(row)) for place in self.places for row in place.units]
        blank, keys = torch.zeros((), dtype=self.dtype, device=self.index.device), [key for key, _ in sizes]
        listed = [columns.get(key, blank.expand(height, size)).to(self.dtype) for key, size in sizes]
        if spread is not None:
            listed = [x * share / spread.get(key, 1.0) for x, share, key in zip(listed, self.shares, keys, strict=True)]
        zero = torch.zeros(height, self.units + 1, dtype=self.dtype, device=self.index.device)
        return zero.index_add(1, self.index, torch.cat([zero[:, :0], *listed], 1))[:, :-1]
