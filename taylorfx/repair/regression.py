"""Linear regressions whose rows come batch by batch, in memory for at most two squares of their inputs.

::

    fewer rows than half of the inputs    the rows themselves         Rows
    more                                  the sums of their products  Packed, of two halves of the rows in one square
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

__all__ = ["RIDGES", "Halves", "LeastSquares"]

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Those among which `reconstruct` chooses."""

BLOCK = 1024
"""How many columns of a square are treated at once."""


class _Sums(ABC):
    """A regression by sums over its rows."""

    n: int
    x: Tensor
    y: Tensor
    xy: Tensor

    @abstractmethod
    def square(self) -> Tensor:
        """The sums of the products of inputs, ``(g, k, k)``, to be written over."""

    def solve(self, start: Tensor, ridge: float, *, intercept: bool = True) -> tuple[Tensor, Tensor]:
        """The weights ``W`` ``(g, k, o)`` and intercepts ``(g, o)`` of the least ``|y - x W - b|^2``, near ``start``.

        Added is ``ridge`` times the mean variance of ``x`` times ``|W - start|^2``. So a large ridge leaves the weights
        alone and moves the intercept only, which is what `compensate` does.

        Args:
            intercept: otherwise ``b`` is zero, and the second moment of ``x`` stands for its variance.
        """
        x, y = (total / self.n if intercept else torch.zeros_like(total) for total in (self.x, self.y))
        variance, added = self._variance(x, ridge)
        residual = (self.xy / self.n).baddbmm_(x[:, :, None], y[:, None], alpha=-1)
        residual.baddbmm_(variance, start, alpha=-1)
        variance.diagonal(dim1=1, dim2=2).add_(added)
        factor = variance.mT  # the same, in columns, which LAPACK factorizes in place
        failed = torch.empty(len(x), dtype=torch.int32, device=x.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if failed.any():
            variance, added = self._variance(x, ridge)
            variance.diagonal(dim1=1, dim2=2).add_(added)
            step = torch.linalg.solve(variance, residual)
        else:
            step = torch.linalg.solve_triangular(factor, residual, upper=False)
            step = torch.linalg.solve_triangular(factor.mT, step, upper=True)
        weights = start + step
        return weights, y - (x[:, None] @ weights)[:, 0]

    def _variance(self, x: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """The variance of the inputs around ``x``, and what the ridge adds to its diagonal."""
        variance = self.square().div_(self.n)
        size = variance.diagonal(dim1=1, dim2=2).mean(1)
        variance.baddbmm_(x[:, :, None], x[:, None], alpha=-1)
        return variance, _added(ridge, size, variance.diagonal(dim1=1, dim2=2).mean(1))

    def error(self, weights: Tensor, bias: Tensor) -> float:
        """The mean of ``|y - x W - b|^2`` over these rows, less that of ``|y|^2``."""
        products = (weights * (self.square() @ weights - 2 * self.xy)).sum()
        shifts = (bias * (2 * (self.x[:, None] @ weights)[:, 0] - 2 * self.y + self.n * bias)).sum()
        return float(products + shifts) / self.n


def _added(ridge: float, size: Tensor, spread: Tensor) -> Tensor:
    """What is added to the diagonal of the variance, ``(g, 1)``; where inputs are constant, more than is rounded.

    Args:
        size, spread: the mean square of the inputs and their mean variance, ``(g,)``.
    """
    least = (1e-12 * size).clamp(min=torch.finfo(size.dtype).tiny)
    return torch.maximum(ridge * spread, least)[:, None]


@dataclass(frozen=True)
class LeastSquares(_Sums):
    """The sums of a linear regression with intercept, in ``g`` groups: additive, so that it streams and distributes.

    Attributes:
        n: the number of rows.
        x, y: their sums, ``(g, k)`` and ``(g, o)``.
        xx, xy: the sums of their products, ``(g, k, k)`` and ``(g, k, o)``.
    """

    n: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor

    @staticmethod
    def of(x: Tensor, y: Tensor) -> LeastSquares:
        """The sums of one batch of rows, ``(rows, g, k)`` and ``(rows, g, o)``, kept in double precision."""
        x, y = x.detach().transpose(0, 1).double(), y.detach().transpose(0, 1).double()
        return LeastSquares(x.shape[1], x.sum(1), y.sum(1), x.mT @ x, x.mT @ y)

    @staticmethod
    def neutral(device: torch.device) -> LeastSquares:
        """The sums of no rows, which change nothing that they are added to, whatever its shapes."""
        return LeastSquares(0, *(torch.zeros((), dtype=torch.double, device=device) for _ in range(4)))

    def __add__(self, other: LeastSquares) -> LeastSquares:
        if not (self.n and other.n):
            return self if self.n else other
        return LeastSquares(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def square(self) -> Tensor:
        return self.xx.clone()


@dataclass(frozen=True)
class Rows:
    """A regression by its rows ``(g, n, k)`` and ``(g, n, o)``.

    With centered rows ``X``, ``(X'X + c)^-1 X' = X' (X X' + c)^-1``: solved for is a square of rows, not of inputs, the
    dual of a ridge regression (Saunders et al. 1998).
    """

    x: Tensor
    y: Tensor

    @property
    def n(self) -> int:
        """The number of rows."""
        return self.x.shape[1]

    def __add__(self, other: Rows) -> Rows:
        return Rows(torch.cat([self.x, other.x], 1), torch.cat([self.y, other.y], 1))

    def solve(self, start: Tensor, ridge: float, *, intercept: bool = True) -> tuple[Tensor, Tensor]:
        """As `LeastSquares.solve`."""
        means = (rows.mean(1, keepdim=True) for rows in (self.x, self.y))
        x, y = (mean if intercept else torch.zeros_like(mean) for mean in means)
        centered = self.x - x
        added = _added(ridge, *(rows.square().mean((1, 2)) for rows in (self.x, centered)))
        products = centered @ centered.mT / self.n
        products.diagonal(dim1=1, dim2=2).add_(added)
        weights = start + centered.mT @ torch.linalg.solve(products, (self.y - y - centered @ start) / self.n)
        return weights, (y - x @ weights)[:, 0]

    def error(self, weights: Tensor, bias: Tensor) -> float:
        """As `LeastSquares.error`."""
        found = self.x @ weights + bias[:, None]
        return float((found * (found - 2 * self.y)).sum()) / self.n


@dataclass(frozen=True)
class Unpacked(_Sums):
    """The sums of one half, or of both, whose square is made when it is needed.

    Attributes:
        lowers: squares that add up, of which the lower triangles count.
    """

    n: int
    x: Tensor
    y: Tensor
    xy: Tensor
    lowers: Sequence[Tensor]

    def square(self) -> Tensor:
        square = torch.zeros_like(self.lowers[0], memory_format=torch.contiguous_format)
        for lower in self.lowers:
            for before, block in _blocks(lower.shape[1]):
                square[:, block, before] += lower[:, block, before]
                square[:, before, block] += lower[:, block, before].mT
                corner = lower[:, block, block].tril()
                square[:, block, block] += corner + corner.mT.triu(1)
        return square


@dataclass(frozen=True)
class Packed:
    """The sums of two halves of the rows. Their squares are symmetric, so that both fit into one and a row more::

        first   a        second  A B C    square  A B C
                b c                D E            a D E
                d e f                F            b c F
                                                  d e f

    Attributes:
        n: the numbers of rows of both halves.
        x, y, xy: the sums of both halves, ``(2, g, k)``, ``(2, g, o)``, ``(2, g, k, o)``.
        xx: the square, ``(g, k + 1, k)``.
    """

    n: tuple[int, int]
    x: Tensor
    y: Tensor
    xy: Tensor
    xx: Tensor

    @staticmethod
    def none(x: Tensor, y: Tensor) -> Packed:
        """The sums of no rows, to which rows such as ``(g, n, k)`` and ``(g, n, o)`` are added."""
        (g, _, k), o = x.shape, y.shape[2]
        return Packed((0, 0), *(x.new_zeros(shape) for shape in ((2, g, k), (2, g, o), (2, g, k, o), (g, k + 1, k))))

    def __add__(self, other: Packed) -> Packed:
        n = self.n[0] + other.n[0], self.n[1] + other.n[1]
        return Packed(n, self.x + other.x, self.y + other.y, self.xy + other.xy, self.xx + other.xx)

    def take(self, halves: tuple[Rows, Rows]) -> Packed:
        """The sums with these rows, written over the present ones."""
        for k, (rows, lower) in enumerate(zip(halves, self._lowers, strict=True)):
            self.x[k] += rows.x.sum(1)
            self.y[k] += rows.y.sum(1)
            self.xy[k].baddbmm_(rows.x.mT, rows.y)
            for before, block in _blocks(lower.shape[1]):
                right = rows.x[:, :, block]
                lower[:, block, before].baddbmm_(right.mT, rows.x[:, :, before])
                lower[:, block, block] += (right.mT @ right).tril()
        return replace(self, n=(self.n[0] + halves[0].n, self.n[1] + halves[1].n))

    @property
    def halves(self) -> tuple[Unpacked, Unpacked]:
        """Each half alone."""
        first, second = (
            Unpacked(self.n[k], self.x[k], self.y[k], self.xy[k], [lower]) for k, lower in enumerate(self._lowers)
        )
        return first, second

    @property
    def whole(self) -> Unpacked:
        """Both halves."""
        return Unpacked(sum(self.n), self.x.sum(0), self.y.sum(0), self.xy.sum(0), self._lowers)

    @property
    def _lowers(self) -> tuple[Tensor, Tensor]:
        """The squares of both halves, of which the lower triangles count: views."""
        return self.xx[:, 1:], self.xx[:, :-1].mT


def _blocks(size: int) -> Iterator[tuple[slice, slice]]:
    """The columns before each block, and those of the block."""
    return ((slice(0, k), slice(k, min(k + BLOCK, size))) for k in range(0, size, BLOCK))


@dataclass(frozen=True)
class Halves:
    """Two halves of the rows of a regression: one is solved for, the other one judges. Additive, and at first empty.

    >>> x, y = torch.randn(8, 1, 2), torch.randn(8, 1, 3)
    >>> halves = Halves.of(x, y) + Halves.of(x, y)
    >>> halves.whole.n, [half.n for half in halves.each]
    (16, [8, 8])

    Attributes:
        held: the rows of both, if they are at most half as many as inputs; otherwise sums. ``None`` if there are none.
    """

    held: tuple[Rows, Rows] | Packed | None = None

    @staticmethod
    def of(x: Tensor, y: Tensor) -> Halves:
        """One batch of rows, ``(rows, g, k)`` and ``(rows, g, o)``; examples are next to each other."""
        return Halves().take(x, y, len(x) // 2)

    def take(self, x: Tensor, y: Tensor, solved: int) -> Halves:
        """The halves with the rows of one batch, of which the first ones join the half that is solved for.

        Sums are written over, so that only who has made them may call this.
        """
        x, y = x.detach().transpose(0, 1).double(), y.detach().transpose(0, 1).double()
        rows = Rows(x[:, :solved], y[:, :solved]), Rows(x[:, solved:], y[:, solved:])
        return Halves(self.held.take(rows)) if isinstance(self.held, Packed) else _held(self.held, rows)

    def __add__(self, other: Halves) -> Halves:
        mine, theirs = self.held, other.held
        if mine is None or theirs is None:
            return self if theirs is None else other
        if isinstance(mine, Packed) or isinstance(theirs, Packed):
            return Halves(_packed(mine) + _packed(theirs))
        return _held(mine, theirs)

    @property
    def each(self) -> tuple[Rows, Rows] | tuple[Unpacked, Unpacked]:
        """The half that is solved for, and the one that judges."""
        assert self.held is not None, "no rows"
        return self.held.halves if isinstance(self.held, Packed) else self.held

    @property
    def whole(self) -> Rows | Unpacked:
        """All rows."""
        assert self.held is not None, "no rows"
        return self.held.whole if isinstance(self.held, Packed) else self.held[0] + self.held[1]

    @property
    def n(self) -> int:
        """The number of rows."""
        return 0 if self.held is None else sum(half.n for half in self.each)

    def ridge(self, start: Tensor, *, intercept: bool) -> float:
        """The ridge with which the solution of one half has the least error on the other half."""
        solved, judging = self.each
        if not (solved.n and judging.n):
            return RIDGES[-1]
        errors = {ridge: judging.error(*solved.solve(start, ridge, intercept=intercept)) for ridge in RIDGES}
        return min(errors, key=errors.__getitem__)


def _held(before: tuple[Rows, Rows] | None, new: tuple[Rows, Rows]) -> Halves:
    """Both together: as rows, if they are few."""
    rows = new if before is None else (before[0] + new[0], before[1] + new[1])
    few = 2 * (rows[0].n + rows[1].n) <= rows[0].x.shape[2]
    return Halves(rows if few else _packed(rows))


def _packed(held: tuple[Rows, Rows] | Packed) -> Packed:
    return held if isinstance(held, Packed) else Packed.none(held[0].x, held[0].y).take(held)
