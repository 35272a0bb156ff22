"""What a repair is, and the inputs that it looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from taylorfx.cutting.plan import Plan
from taylorfx.network.run import Inputs
from taylorfx.network.spec import Spec
from taylorfx.scoring.batches import Batch
from taylorfx.tree import Params

__all__ = ["Batches", "Repair", "inputs_of"]


Batches = Batch | Iterable[Batch]
"""``(inputs, targets)``, or an iterable of such."""


Repair = Callable[[Params, Plan, Batches], tuple[Params, Spec]]
"""``repair(params, plan, batches)``: the original parameters in, what is cut and repaired out, with its spec."""


def inputs_of(batches: Batches) -> Iterator[Inputs]:
    count = 0
    for batch in [batches] if isinstance(batches, tuple) else batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(
                "A batch is a pair (inputs, targets), several come in a list; "
                f"batch {count} is of the type {type(batch).__name__}."
            )
        count += 1
        yield batch[0]
    if not count:
        raise ValueError("There is nothing to repair from: received no batch. Was the iterator already used up?")
