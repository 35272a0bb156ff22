"""What the shares of a benchmark are of: the FLOPs, the parameters, or the measured time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import taylorfx as tfx

BUDGETS = ("FLOPs", "parameters", "time")

CLOCK = tfx.cost.Pace(error=0.01, seconds=2.0, clock=time.process_time)


@dataclass(frozen=True)
class Shares:
    """What shares are of.

    Attributes:
        by: one of `BUDGETS`.
        timings: what the time is measured by, once for all contestants.
    """

    by: str
    timings: tfx.cost.Timings

    @staticmethod
    def of(by: str, batch: int) -> Shares:
        """By the time of whole networks on batches of this size."""
        return Shares(by, tfx.cost.Timings(batch=batch, pace=CLOCK))

    def budget(self, share: float) -> tfx.Budget:
        if self.by == "time":
            return tfx.Latency(share, self.timings)
        return (tfx.Parameters if self.by == "parameters" else tfx.Flops)(share)

    def left(self, plan: tfx.Plan) -> float:
        """The share that a plan leaves."""
        if self.by == "time":
            return self.timings.share(plan.spec, plan.coupling.spec)
        cost = (tfx.cost.parameters if self.by == "parameters" else tfx.cost.flops)(plan.coupling)
        return cost(plan.keep) / cost.total
