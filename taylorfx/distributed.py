"""The same sums over several processes: every process measures its own batches, `total` adds them up.

stats = tfx.distributed.total(tfx.measure(params, spec, my_batches, coupling))
plan = tfx.select(tfx.fisher(stats, coupling), coupling, budget=tfx.Flops(0.5))  # the same everywhere
params, spec = tfx.reconstruct(params, plan, my_batches, total=tfx.distributed.total)
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any, TypeVar

import torch

__all__ = ["total"]

T = TypeVar("T")


def total(value: T, group: Any = None) -> T:
    """The sum of what every process holds, the same on all of them: of `Statistics`, `Means`, `LeastSquares`.

    Processes are added in their order, so that rows (``measure(..., rows=True)``) stand in it, too. Each process gets
    the values of all, which takes as many times the memory for a moment. Without ``torch.distributed`` at work there is
    one process, and its value is the sum.

    Args:
        value: anything that adds up with ``+`` and can be pickled.
        group: the process group; by default all processes.

    Raises:
        ValueError: if the processes measured different units or networks, as adding them up does.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, value, group=group)
    return reduce(add, found)  # type: ignore[no-any-return]
