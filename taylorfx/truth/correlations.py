"""Fidelity: how far scores rank the units as the oracle does, and how far the oracle agrees with itself.

Pruning only asks which unit leaves first, so what counts are rank correlations: Spearman's rho and Kendall's tau-b,
over all units and within every scope. Their intervals are bootstrap intervals over the units, from resamples that are
the same for all criteria.

All resamples are ranked at once. Let ``s_ij`` be the sign of ``x_i - x_j``, and let a resample draw unit ``i`` ``w_i``
times. Then the centered rank of unit ``i`` in this resample is ``sum_j w_j s_ij / 2``. For the scores ``(5, 1, 3)``,
each drawn once::

          s =   0  1  1       sum over j =  2       ranks, centered =  1
               -1  0 -1                    -2                         -1
               -1  1  0                     0                          0

So the product of ``s`` with the weights of all resamples gives all ranks (Spearman). The products of the signs of
scores and oracle count the pairs that agree (Kendall).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from taylorfx.coupling.units import Coupling
from taylorfx.network.tables import columns
from taylorfx.truth.oracles import Oracle

__all__ = ["Fidelity", "Interval", "Target", "correlations", "fidelity"]

Target = Callable[[Oracle, int | None], Tensor]
"""The function of the oracle that scores are compared with: `Oracle.signed`, `.absolute` or `.mean_absolute`."""


class Interval(NamedTuple):
    """A value and the ends of its interval. NaN if there is no correlation: for a single unit, or for equal scores."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]" if self.value == self.value else "-"


@dataclass(frozen=True, eq=False)
class Fidelity:
    """The rank correlations of scores with the oracle. ``print(fidelity)`` gives the table.

    Attributes:
        spearman, kendall: the correlations by criterion, with bootstrap intervals.
        ceiling: the noise ceiling, -1 to 1: the Spearman correlation that the oracle would have with an oracle of as
            many other examples. It is computed from the two halves of the oracle, corrected for their length
            (Spearman-Brown). Scores of other examples cannot be expected to exceed it; scores of the oracle's own
            examples share its noise and may.
        scores: by criterion, ``(units,)``, for the units that the oracle was asked about.
        truth: the oracle, ``(units,)``.
        layers: the same for the units of every scope, by the scope's name.
    """

    spearman: Mapping[str, Interval]
    kendall: Mapping[str, Interval]
    ceiling: float
    scores: Mapping[str, Tensor]
    truth: Tensor
    layers: Mapping[str, Fidelity] = field(default_factory=dict)

    def __str__(self) -> str:
        order = sorted(self.spearman, key=lambda name: -np.nan_to_num(self.spearman[name].value, nan=-2))
        rows = [
            ("criterion", "Spearman", "Kendall"),
            *((x, str(self.spearman[x]), str(self.kendall[x])) for x in order),
        ]
        text = f"{len(self.truth)} units, noise ceiling of Spearman {self.ceiling:.3f}\n\n{columns(rows)}"
        if not self.layers:
            return text
        table = [("layer", "units", "ceiling", *order)]
        for name, layer in self.layers.items():
            numbers = (layer.ceiling, *(layer.spearman[x].value for x in order))
            table.append((name, str(len(layer.truth)), *(f"{x:.2f}" if x == x else "-" for x in numbers)))
        return f"{text}\n\nSpearman within the layers\n\n{columns(table, right=len(table[0]) - 1)}"


def fidelity(
    scores: Mapping[str, Tensor],
    oracle: Oracle,
    coupling: Coupling,
    *,
    target: Target = Oracle.signed,
    resamples: int = 1000,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> Fidelity:
    """Correlate the ranks of scores with those of the oracle.

    >>> from taylorfx import Units, couple, init, layers as L, serial
    >>> from taylorfx.truth import oracle
    >>> spec = serial(L.Input((3,)), a=L.Linear(3, 4), tanh=L.Tanh(), b=L.Linear(4, 2))
    >>> params = init(spec, torch.Generator().manual_seed(0))
    >>> coupling, batch = couple(params, spec), (torch.eye(3), torch.tensor([0, 1, 0]))
    >>> truth = oracle(params, spec, batch, coupling)
    >>> print(fidelity({"truth": truth.signed()}, truth, coupling).spearman["truth"].value)
    1.0

    Args:
        scores: by the names of the criteria; each ``(units,)``, as for `select`.
        oracle: of all units, or of some; then the scores of these are compared.
        target: the function of the oracle that is taken for the truth.
        resamples: how many resamples are drawn for the intervals.
        level: the share of the resamples that lies within an interval.
        generator: draws the resamples; by default one with seed 0.

    Raises:
        ValueError: if there are no scores, if scores or the oracle are of other units, or if scores are not finite;
            lists all of these.
    """
    place = {name: k for k, name in enumerate(coupling.names)}
    errors = [f"{name}: {error}" for name, x in scores.items() if (error := _problem(x, len(coupling)))]
    errors += [] if scores else ["no scores"]
    unknown = [name for name in oracle.units if name not in place]
    errors += [f"an oracle of {len(unknown)} units that the coupling does not have ({unknown[0]})"] if unknown else []
    if errors or resamples < 1 or not 0 < level < 1:
        errors += [] if resamples >= 1 and 0 < level < 1 else [f"resamples={resamples}, level={level}"]
        raise ValueError(
            f"Fidelity compares finite scores of the coupling's units, ({len(coupling)},), with an oracle of these "
            "units, over at least one resample and a level between 0 and 1; received:\n  " + "\n  ".join(errors)
        )
    index = torch.tensor([place[name] for name in oracle.units])
    truth, *halves = (target(oracle, half).detach().to("cpu", torch.float64) for half in (None, 0, 1))
    compared = {name: x.detach().to("cpu", torch.float64)[index] for name, x in scores.items()}
    generator = generator or torch.Generator().manual_seed(0)

    def within(some: Tensor) -> Fidelity:
        drawn = torch.randint(len(some), (resamples, len(some)), generator=generator, device=generator.device).cpu()
        counts = torch.zeros(resamples, len(some), dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
        )
        weights = torch.cat([torch.ones(1, len(some), dtype=torch.float64), counts]).T  # the first draws each unit once
        both = {name: correlations(x[some], truth[some], weights) for name, x in compared.items()}
        twins = correlations(halves[0][some], halves[1][some], weights[:, :1])[0].item()
        return Fidelity(
            spearman={name: _interval(rho, level) for name, (rho, _) in both.items()},
            kendall={name: _interval(tau, level) for name, (_, tau) in both.items()},
            ceiling=-1.0 if twins <= -1 / 3 else 2 * twins / (1 + twins),  # Spearman-Brown
            scores={name: x[some] for name, x in compared.items()},
            truth=truth[some],
        )

    scope = coupling.scope[index]
    whole = within(torch.arange(len(index)))
    layers = {coupling.scopes[k]: within(torch.from_numpy(np.flatnonzero(scope == k))) for k in np.unique(scope)}
    return Fidelity(whole.spearman, whole.kendall, whole.ceiling, whole.scores, whole.truth, layers)


def correlations(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Spearman's rho and Kendall's tau-b of ``x`` and ``y``, ``(units,)``, in every resample.

    >>> x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 4.0, 3.0])
    >>> [round(value.item(), 3) for value in correlations(x, y, torch.ones(4, 1))]
    [0.8, 0.667]

    Args:
        weights: ``(units, resamples)``, how often each resample draws each unit.

    Returns:
        Both as ``(resamples,)``; NaN for a resample of equal values only.
    """
    weights = weights.to(torch.float64)
    moments = weights.new_zeros(6, weights.shape[1])  # by ranks, then by pairs: xy, xx, yy
    step = max(1, 2**22 // len(x))
    for rows in (slice(start, start + step) for start in range(0, len(x), step)):
        a, b = ((z[rows, None] - z).sign().to(torch.float64) for z in (x, y))
        ranks, drawn = (a @ weights, b @ weights), weights[rows]
        for k, (p, q) in enumerate(((0, 1), (0, 0), (1, 1))):
            moments[k] += (drawn * ranks[p] * ranks[q]).sum(0)
            moments[3 + k] += (drawn * (((a, b)[p] * (a, b)[q]) @ weights)).sum(0)
    rho, tau = (both / (one * other).sqrt() for both, one, other in (moments[:3], moments[3:]))
    return rho, tau


def _interval(values: Tensor, level: float) -> Interval:
    """The first value, with the percentiles of the others."""
    ends = torch.nanquantile(values[1:], torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype))
    return Interval(values[0].item(), *ends.tolist())


def _problem(scores: Tensor, count: int) -> str:
    """What is wrong with scores; empty if nothing is."""
    if not isinstance(scores, Tensor) or scores.shape != (count,) or scores.is_complex():
        return f"{tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
    bad = int(scores.isfinite().logical_not().sum())
    return f"{bad} of {count} not finite" if bad else ""
