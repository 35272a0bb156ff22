"""Which residual branches leave first, and at what depths the rest of a budget is worth taking from the width.

Derivatives at the whole network say little of a branch, which is a large change of it: of a small Llama's eight, they
forecast a rise of the loss of 0.01 at most, and it is 0.08 to 5. So branches are ranked by the loss without each
(Kim et al. 2024, arXiv 2402.02834, take whole blocks of language models out by it), for what it saves::

    bundle          0      1      2      3        branches that leave together, alone unless they have to be uniform
    loss without    3.1    2.9    8.0    3.3      less the loss with all of them, for what is saved
    order           1      0      3      2
    depths          - | 1 | 1 0 | 1 0 3           not all of them: what is still to be saved is taken from the width
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from taylorfx.coupling.units import Mask
from taylorfx.selection.order import steps
from taylorfx.selection.select import Asked

__all__ = ["depths"]

SHARES = (0.25, 0.5, 0.75, 1.0)
"""How much of what has to be saved branches save at the depths that are looked at, about."""


def depths(asked: Asked, loss: Callable[[Mask], float]) -> list[Mask]:
    """The units that stay at some depths, ``(units,)`` each, from all of them to fewer and fewer branches.

    Args:
        loss: of the network with these units only. It is asked once for every bundle, and for all units.
    """
    coupling = asked.coupling
    everything = np.ones(len(coupling), bool)
    full = asked.fullness(everything)
    if full <= 1:
        return [everything]
    values = np.zeros(len(coupling))
    step, count = _steps(asked, values)
    whole = loss(everything) if count else 0.0
    for number in range(count):
        keep = coupling.settled(step != number)
        values[step == number] = max(loss(keep) - whole, 0.0) / max(full - asked.fullness(keep), 1e-12 * full)
    step, count = _steps(asked, np.nan_to_num(values, nan=np.inf, posinf=np.finfo(float).max))
    nested = [coupling.settled(step >= number) for number in range(count + 1)]
    nested = [keep for keep in nested if not coupling.empty(keep)]
    saved = np.array([(full - asked.fullness(keep)) / (full - 1) for keep in nested])
    chosen = {0, *(int(np.abs(saved - share).argmin()) for share in SHARES), *np.flatnonzero(saved >= 1)[:1].tolist()}
    return [nested[number] for number in sorted(chosen)]


def _steps(asked: Asked, values: np.ndarray) -> tuple[np.ndarray, int]:
    """The step in which each branch leaves; all other units stay."""
    coupling = asked.coupling
    stays = np.ones(len(coupling), bool)
    stays[[branch.unit for branch in coupling.branches]] = False
    return steps(values, coupling, stays | asked.rules.protected, asked.rules)
