"""What a repair is, the inputs that it looks at, and what several processes that repair as one compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from taylorfx.cutting.plan import Plan
from taylorfx.network.run import Inputs
from taylorfx.network.spec import Spec
from taylorfx.scoring.batches import Batches, each_batch
from taylorfx.scoring.fingerprint import fingerprint
from taylorfx.tree import Params

__all__ = ["Batches", "Repair", "inputs_of", "refuse_none", "told"]


Repair = Callable[[Params, Plan, Batches], tuple[Params, Spec]]
"""``repair(params, plan, batches)``: the original parameters in, what is cut and repaired out, with its spec.

Where several processes prune as one, ``total=`` is given, too, if the repair takes it; what it gives is compared.
"""


def inputs_of(batches: Batches) -> Iterator[Inputs]:
    """The inputs of every batch; a list may have none, as an empty share of the data."""
    received = False
    for inputs, _ in each_batch(batches):
        received = True
        yield inputs
    refuse_none(received or not isinstance(batches, Iterator))


def refuse_none(received: object) -> None:
    """Refuse batches, of all processes together, of which there are none."""
    if not received:
        raise ValueError(
            "There is nothing to repair from: received no batch, or none with a position that counts. Was the iterator "
            "already used up?"
        )


def told(params: Params, plan: Plan) -> str:
    """What a repair starts from, as text: it has to be the same in all processes."""
    return f"{fingerprint(params, plan.coupling)}, plan {plan.digest}"
