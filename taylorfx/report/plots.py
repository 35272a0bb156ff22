"""Plots: what a `Fidelity` says, and frontiers of accuracy against cost.

Each function returns a matplotlib ``Figure`` that belongs to nobody else: ``figure.savefig("fidelity.png")``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from scipy.stats import rankdata

from taylorfx.truth.correlations import Fidelity, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_fidelity", "plot_frontier"]

INK, SOFT, PALE, BLUE, ORANGE = "#1f2933", "#7b8794", "#e4e7eb", "#2563a8", "#d9622b"


def plot_fidelity(fidelity: Fidelity, *, title: str = "") -> Figure:
    """The correlations with their intervals and the noise ceiling, and each criterion's ranks against the oracle's.

    Raises:
        ImportError: without matplotlib.
    """
    names = sorted(fidelity.spearman, key=lambda name: -_number(fidelity.spearman[name].value))
    wide = 4
    rows = -(-len(names) // wide)
    figure = _figure((12, 0.32 * len(names) + 1.5 + 2.6 * rows))
    grid = figure.add_gridspec(1 + rows, wide, height_ratios=[0.32 * len(names) + 1.5, *[2.6] * rows])
    bars = _bare(figure.add_subplot(grid[0, :]))
    for kind, color, shift in (("spearman", BLUE, -0.18), ("kendall", ORANGE, 0.18)):
        intervals: list[Interval] = [getattr(fidelity, kind)[name] for name in names]
        height = [k + shift for k in range(len(names))]
        values = [_number(x.value) for x in intervals]
        ends = [[max(0.0, _number(v - x.low)) for v, x in zip(values, intervals, strict=True)],
                [max(0.0, _number(x.high - v)) for v, x in zip(values, intervals, strict=True)]]  # fmt: skip
        bars.barh(height, values, 0.34, color=color, label=kind.capitalize(), xerr=ends, ecolor=SOFT)
    if not math.isnan(fidelity.ceiling):
        bars.axvline(fidelity.ceiling, color=INK, linewidth=1, linestyle=":", label="noise ceiling (Spearman)")
    bars.set_yticks(range(len(names)), names)
    bars.invert_yaxis()
    bars.grid(axis="x", color=PALE)
    bars.set_axisbelow(True)
    bars.legend(frameon=False, fontsize=9)
    bars.set_title(title or "Rank correlation with the oracle", loc="left", fontsize=11, color=INK)
    truth = rankdata(fidelity.truth.numpy())
    for k, name in enumerate(names):
        axes = _bare(figure.add_subplot(grid[1 + k // wide, k % wide]))
        axes.scatter(truth, rankdata(fidelity.scores[name].numpy()), s=5, color=BLUE, alpha=0.5, linewidths=0)
        axes.set_title(f"{name}, {fidelity.spearman[name].value:.2f}", loc="left", fontsize=9, color=INK)
        axes.set_xlabel("rank by the oracle", fontsize=8, color=SOFT)
        axes.set_ylabel("rank by the score", fontsize=8, color=SOFT)
    return figure


def plot_frontier(
    lines: Mapping[str, Sequence[tuple[float, Interval]]],
    *,
    x: str = "FLOPs",
    y: str = "accuracy",
    title: str = "",
    whole: float | None = None,
) -> Figure:
    """What is left against what it costs: a line for each contestant, with a band for its intervals.

    Args:
        lines: by the contestant's name, its points: a cost, and a value with the ends of its interval.
        x, y: what cost and value are.
        whole: the value of the unpruned network, drawn as a level.

    Raises:
        ImportError: without matplotlib.
    """
    figure = _figure((8, 5))
    axes = _bare(figure.add_subplot())
    for name, points in lines.items():
        ordered = sorted(points, key=lambda point: point[0])
        costs = [cost for cost, _ in ordered]
        (line,) = axes.plot(
            costs, [interval.value for _, interval in ordered], "-o", linewidth=2, markersize=4, label=name
        )
        low, high = ([interval[k] for _, interval in ordered] for k in (1, 2))
        axes.fill_between(costs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    if whole is not None:
        axes.axhline(whole, color=SOFT, linewidth=1, linestyle=":", label="unpruned")
    axes.grid(color=PALE)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _figure(figsize: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots are drawn with matplotlib, which is not installed; pip install matplotlib.") from error
    return Figure(dpi=160, layout="constrained", figsize=figsize)


def _bare(axes: Axes) -> Axes:
    """Without a frame and ticks."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.tick_params(length=0, labelcolor=INK, labelsize=8)
    return axes


def _number(value: float) -> float:
    """Zero for what there is not."""
    return 0.0 if math.isnan(value) else value
