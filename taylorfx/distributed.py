"""The same sums over several processes: every process measures its own batches, `total` adds them up.

::

    stats = tfx.distributed.total(lambda: tfx.measure(params, spec, my_batches, coupling))
    plan = tfx.select(tfx.fisher(stats, coupling), coupling, budget=tfx.Flops(0.5))  # the same everywhere
    params, spec = tfx.reconstruct(params, plan, my_batches, total=tfx.distributed.total)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import reduce
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["total"]

T = TypeVar("T")


def total(value: T | Callable[[], T], group: ProcessGroup | None = None) -> T:
    """The sum of what every process holds, the same on all of them: of `Statistics`, `Means`, `LeastSquares`.

    Values are added in the order of the ranks, so that rows (``measure(..., rows=True)``) stand in it. Each process
    receives the values of all, which takes as many times the memory for a moment. Where ``torch.distributed`` is not
    initialized there is one process, and its value is the sum.

    Args:
        value: anything that adds up with ``+`` and can be pickled, or a function without arguments that gives it. What
            such a function raises is raised in its own process, and named in all others, which would wait otherwise. A
            process without batches measures an empty list, which gives neutral statistics: they change no sum.
        group: the process group; by default all processes.

    Raises:
        ValueError: on all processes alike, if some measured other units, parameters or dtypes than others, what is not
            finite, or failed in ``value``: nothing is added then, and they are named with what they have.
        RuntimeError: naming the rank of a process that ended before it reached the sum.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return _value(value)
    try:
        mine = _value(value)
    except Exception as error:  # the other processes learn of it before it is raised
        _gathered({"error": f"{type(error).__name__}: {error}", "holds": ""}, group)
        raise
    _agree(_gathered(_report(mine), group))
    return reduce(operator.add, _gathered(mine, group))


def _gathered(value: T, group: ProcessGroup | None) -> list[T]:
    """The values of all processes, in the order of the ranks.

    Every process counts in the group's store how often it reached this point. When a connection breaks, the counts tell
    which ranks are missing, which the text of the backend does not.
    """
    world = torch.distributed.group.WORLD if group is None else group
    size, store = torch.distributed.get_world_size(group), getattr(world, "get_group_store", lambda: None)()
    values: list[T] = [value] * size
    keys = [f"taylorfx/{rank}" for rank in range(size)]
    count = 0 if store is None else store.add(keys[torch.distributed.get_rank(group)], 1)
    try:
        torch.distributed.all_gather_object(values, value, group=group)
    except RuntimeError as error:
        try:
            missing = [rank for rank, key in enumerate(keys) if store is not None and store.add(key, 0) < count]
        except RuntimeError:  # the store is gone, too: it lives in the first process, unless it is the launcher's
            missing = [0]
        named = f"process {', '.join(map(str, missing))}" if missing else "another process"
        raise RuntimeError(
            f"Processes add up when all of them come to the sum; {named} of {size} did not before the connection "
            "broke. Look at its own error: it ended, or hangs."
        ) from error
    return values


def _value(value: T | Callable[[], T]) -> T:
    return value() if callable(value) else value


def _report(value: object) -> dict[str, str]:
    """What the processes compare before they add up, as text."""
    real = [x for x in _tensors(value) if x.is_floating_point() or x.is_complex()]
    finite = all(bool(x.isfinite().all()) for x in real)
    dtypes = " and ".join(sorted({str(x.dtype).removeprefix("torch.") for x in real}))
    networks = " and ".join(getattr(value, "networks", ()))
    neutral = getattr(value, "n", None) == 0
    holds = f"{type(value).__name__} in {dtypes or 'no'} numbers{f' of {networks}' * bool(networks)}"
    error = "" if finite else f"its {type(value).__name__} is not finite"
    return {"error": error, "holds": "" if neutral else holds}


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors of a dataclass, a mapping, a list or a tuple, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _agree(reports: Sequence[Mapping[str, str]]) -> None:
    """Refuse failures, and values of other networks or dtypes; adding them up compares the rest."""
    failed = {rank: report["error"] for rank, report in enumerate(reports) if report["error"]}
    if failed:
        raise ValueError(f"Processes add up what is finite, when none has failed; received {_listed(failed)}")
    holds = {rank: report["holds"] for rank, report in enumerate(reports) if report["holds"]}
    if len(set(holds.values())) > 1:
        raise ValueError(
            f"Processes add up what is of the same units, parameters and dtype; received {_listed(holds)}. Give all "
            "processes the same parameters, and the coupling of these."
        )


def _listed(texts: Mapping[int, str]) -> str:
    return "; ".join(f"process {rank}: {text}" for rank, text in texts.items())
