"""How a repair is called, of ours or of a user's own, and what it has to give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from taylorfx.cutting.cut import cut
from taylorfx.cutting.plan import Plan
from taylorfx.distributed import Total
from taylorfx.functions import filled_in, name_of, unfit
from taylorfx.network.parameters import check
from taylorfx.network.spec import Spec
from taylorfx.repair.batches import Batches, Repair
from taylorfx.tree import Params

__all__ = ["check_repair", "mended"]


def check_repair(repair: Repair | None, batches: Batches) -> None:
    """Refuse what is no repair, before anything is measured."""
    if repair is None:
        return
    problem = unfit(repair, None, None, None) if callable(repair) else "it is not called"
    if problem:
        raise ValueError(
            "A repair is a function of (params, plan, batches) that gives (params, spec): reconstruct, compensate, "
            f"recalibrate; received {name_of(repair)}: {problem}."
        )
    if isinstance(batches, Iterator):
        raise ValueError(
            "A repair looks at the batches that were measured; received an iterator, which measuring uses up. Give a "
            "list or a loader."
        )


def mended(
    repair: Repair | None, batches: Batches, params: Params, plan: Plan, total: Total | None
) -> tuple[Params, Spec]:
    """What is cut, and repaired; by sums over the processes, if the repair takes what adds them up."""
    if repair is None:
        return cut(params, plan), plan.spec
    call: Callable[..., object] = repair
    if total is not None and "total" not in filled_in(repair) and not unfit(repair, None, None, None, total=total):
        call = partial(call, total=total)
    repaired = call(params, plan, batches)
    if not isinstance(repaired, tuple) or len(repaired) != 2 or not isinstance(repaired[1], Spec):
        kind = type(repaired).__name__
        raise ValueError(f"A repair gives (params, spec) of the smaller network; {name_of(repair)} gave a {kind}.")
    check(*repaired)
    return repaired
