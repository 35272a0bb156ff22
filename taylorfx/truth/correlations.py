"""Fidelity: how well scores rank the units as the oracle does, and how well the oracle ranks them itself.

Rank correlations, since a pruner asks who leaves first: Spearman's rho and Kendall's tau-b, over all units and within
every scope, with bootstrap intervals over the units (percentiles of resamples, the same ones for all criteria). With
``s_ij`` the sign of ``x_i - x_j`` and ``w_i`` how often a resample draws unit ``i``, the unit's centered rank in it is
``sum_j w_j s_ij / 2``, so that one matrix product ranks all resamples, and another counts the pairs in agreement.
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
"""What scores are compared with: `Oracle.signed`, `Oracle.absolute` or `Oracle.mean_absolute`."""


class Interval(NamedTuple):
    """A value and the ends of its interval; NaN where there is none (a layer of one unit, or equal scores)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]" if self.value == self.value else "-"


@dataclass(frozen=True, eq=False)
class Fidelity:
    """The rank correlations of some criteria's scores with the oracle; ``print(fidelity)`` gives the table.

    Attributes:
        spearman, kendall: by criterion, with their bootstrap intervals.
        ceiling: the Spearman correlation of the oracle with itself, asked of as many other examples: that of its two
            halves, corrected for their length (Spearman-Brown), -1 to 1. A score of other examples cannot be expected
            to do better; one of the oracle's own may share its noise.
        scores: by criterion, ``(units,)``, of the units that the oracle was asked about.
        truth: ``(units,)``, the oracle.
        layers: the same within every scope of the network, by its name.
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
            found = (layer.ceiling, *(layer.spearman[x].value for x in order))
            table.append((name, str(len(layer.truth)), *(f"{x:.2f}" if x == x else "-" for x in found)))
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

    Args:
        scores: by a name of each criterion, ``(units,)``, as `select` takes them.
        oracle: of all units or of some, which are then looked at alone.
        target: what of the oracle is the truth.
        resamples: how often the units are drawn anew for the intervals.
        level: the share of the resamples that lies within an interval.
        generator: draws the resamples; by default one with the seed 0.

    Raises:
        ValueError: for no scores, scores or an oracle of other units, or scores that are not finite; all at once.
    """
    place = {name: k for k, name in enumerate(coupling.names)}
    errors = [f"{name}: {error}" for name, x in scores.items() if (error := _strange(x, len(coupling)))]
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
    own = {name: x.detach().to("cpu", torch.float64)[index] for name, x in scores.items()}
    generator = generator or torch.Generator().manual_seed(0)

    def within(some: Tensor) -> Fidelity:
        drawn = torch.randint(len(some), (resamples, len(some)), generator=generator, device=generator.device).cpu()
        counts = torch.zeros(resamples, len(some), dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
        )
        weights = torch.cat([torch.ones(1, len(some), dtype=torch.float64), counts]).T  # first, each unit once
        found = {name: correlations(x[some], truth[some], weights) for name, x in own.items()}
        twins = correlations(halves[0][some], halves[1][some], weights[:, :1])[0].item()
        return Fidelity(
            spearman={name: _interval(rho, level) for name, (rho, _) in found.items()},
            kendall={name: _interval(tau, level) for name, (_, tau) in found.items()},
            ceiling=-1.0 if twins <= -1 / 3 else 2 * twins / (1 + twins),  # Spearman-Brown
            scores={name: x[some] for name, x in own.items()},
            truth=truth[some],
        )

    scope = coupling.scope[index]
    whole = within(torch.arange(len(index)))
    layers = {coupling.scopes[k]: within(torch.from_numpy(np.flatnonzero(scope == k))) for k in np.unique(scope)}
    return Fidelity(whole.spearman, whole.kendall, whole.ceiling, whole.scores, whole.truth, layers)


def correlations(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Spearman's rho and Kendall's tau-b of ``x`` and ``y``, ``(units,)``, in every resample.

    Args:
        weights: ``(units, resamples)``, how often each resample draws each unit.

    Returns:
        Two of ``(resamples,)``; NaN where a resample has only equal values.
    """
    weights = weights.to(torch.float64)
    moments = weights.new_zeros(6, weights.shape[1])  # by ranks, then by pairs: xy, xx, yy
    step = max(1, 2**22 // len(x))
    for rows in (slice(start, start + step) for start in range(0, len(x), step)):
        a, b = ((z[rows, None] - z).sign().to(torch.float64) for z in (x, y))
        ranks, mine = (a @ weights, b @ weights), weights[rows]
        for k, (p, q) in enumerate(((0, 1), (0, 0), (1, 1))):
            moments[k] += (mine * ranks[p] * ranks[q]).sum(0)
            moments[3 + k] += (mine * (((a, b)[p] * (a, b)[q]) @ weights)).sum(0)
    rho, tau = (both / (one * other).sqrt() for both, one, other in (moments[:3], moments[3:]))
    return rho, tau


def _interval(values: Tensor, level: float) -> Interval:
    """The first value, and the percentiles of the others."""
    ends = torch.nanquantile(values[1:], torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype))
    return Interval(values[0].item(), *ends.tolist())


def _strange(scores: Tensor, count: int) -> str:
    if not isinstance(scores, Tensor) or scores.shape != (count,) or scores.is_complex():
        return f"{tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
    bad = int(scores.isfinite().logical_not().sum())
    return f"{bad} of {count} not finite" if bad else ""
