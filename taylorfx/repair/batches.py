"""What a repair is, and the inputs that it looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from taylorfx.cutting.plan import Plan
from taylorfx.network.run import Inputs
from taylorfx.network.spec import Spec
from taylorfx.scoring.batches import Batches, each_batch
from taylorfx.tree import Params

__all__ = ["Batches", "Repair", "inputs_of"]


Repair = Callable[[Params, Plan, Batches], tuple[Params, Spec]]
"""``repair(params, plan, batches)``: the original parameters in, what is cut and repaired out, with its spec."""


def inputs_of(batches: Batches) -> Iterator[Inputs]:
    """The inputs of every batch, of which there is at least one."""
    received = False
    for inputs, _ in each_batch(batches):
        received = True
        yield inputs
    if not received:
        raise ValueError("There is nothing to repair from: received no batch. Was the iterator already used up?")
