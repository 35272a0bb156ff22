"""What a network costs: parameters and FLOPs, in closed form in what is kept.

Every cost is a sum of products of axis lengths, read from the axis signatures: a parameter's size is the product of its
axes, a layer's FLOPs are two per multiply-add, as ``torch.utils.flop_counter`` counts (matrix products, convolutions).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taylorfx import axes as language
from taylorfx.coupling import Coupling
from taylorfx.labels import Labels

__all__ = ["Cost", "flops", "parameters"]


@dataclass(frozen=True)
class Cost:
    """A sum of monomials in the lengths of a coupling's axes.

    Call it with the mask of kept units, ``(units,)``; it never grows when a unit leaves.
    """

    coupling: Coupling
    factors: Labels
    """``(terms,)``: what does not change."""
    axes: Labels
    """``(terms, degree)``: the axes whose lengths multiply, by number; the number of axes stands for the length 1."""

    def __call__(self, keep: NDArray[np.bool_]) -> int:
        lengths = np.append(self.coupling.counts(keep), 1)
        return int((self.factors * lengths[self.axes].prod(1)).sum())

    def marginal(self, keep: NDArray[np.bool_] | None = None) -> Tensor:
        """What leaves with each unit, to first order, from the whole network or from what a mask keeps of it.

        ``(units,)``, in float64. A score divided by it is worth per cost:
        ``taylor(stats, coupling) / flops(coupling).marginal()``.
        """
        coupling = self.coupling
        keep = np.ones(len(coupling), bool) if keep is None else keep
        lengths = np.append(coupling.counts(keep), 1).astype(np.float64)
        slopes = np.zeros(len(lengths))  # how the cost grows with the length of each axis
        for column in range(self.axes.shape[1]):
            rest = np.delete(self.axes, column, 1)
            np.add.at(slopes, self.axes[:, column], self.factors * lengths[rest].prod(1))
        saved = np.zeros(len(coupling) + 1)
        for axis, slope in zip(coupling.axes, slopes, strict=False):
            saved += slope * np.bincount(axis.ravel() % len(saved), minlength=len(saved))
        return torch.from_numpy(saved[:-1])

    @property
    def total(self) -> int:
        """The cost of the whole network."""
        return self(np.ones(len(self.coupling), bool))


def parameters(coupling: Coupling) -> Cost:
    """The number of trained parameters (shared ones once; running statistics not counted)."""
    buffers = {node.path(leaf) for node in coupling.spec for leaf in node.layer.buffers}
    terms = [(1, axes) for path, axes in coupling.parameters.items() if path not in buffers]
    return _cost(coupling, terms)


def flops(coupling: Coupling) -> Cost:
    """Floating-point operations for one example: two per multiply-add of every convolution and matrix product."""
    terms: list[tuple[int, Sequence[int]]] = []
    for node in coupling.spec:
        bound, numbers = coupling.bounds[node.name], coupling.letters[node.name]
        for text in node.layer.multiplies:
            known = language.letters(language.pattern(text))
            names = [x for x in bound.sizes if x in known or (x[0] == "_" and "..." in known)]
            rigid = math.prod(bound.sizes[x] for x in names if x not in numbers)
            terms.append((2 * rigid, [numbers[x] for x in names if x in numbers]))
    return _cost(coupling, terms)


def _cost(coupling: Coupling, terms: Sequence[tuple[int, Sequence[int]]]) -> Cost:
    degree, one = max((len(axes) for _, axes in terms), default=0), len(coupling.axes)
    table = [[*axes, *[one] * (degree - len(axes))] for _, axes in terms]
    return Cost(
        coupling,
        np.array([factor for factor, _ in terms], np.int64),
        np.array(table, np.int64).reshape(len(terms), degree),
    )
