"""The same sums over several processes: every process measures its own batches, `total` adds them up.

stats = tfx.distributed.total(lambda: tfx.measure(params, spec, my_batches, coupling))
plan = tfx.select(tfx.fisher(stats, coupling), coupling, budget=tfx.Flops(0.5))  # the same everywhere
params, spec = tfx.reconstruct(params, plan, my_batches, total=tfx.distributed.total)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import reduce
from operator import add
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["total"]

T = TypeVar("T")


def total(value: T | Callable[[], T], group: Any = None) -> T:
    """The sum of what every process holds, the same on all of them: of `Statistics`, `Means`, `LeastSquares`.

    Processes are added in their order, so that rows (``measure(..., rows=True)``) stand in it, too. Each process gets
    the values of all, which takes as many times the memory for a moment. Without ``torch.distributed`` at work there is
    one process, and its value is the sum.

    Args:
        value: anything that adds up with ``+`` and can be pickled, or a function without arguments that gives it. What
            such a function raises is raised in its own process, and named in all others, which would wait otherwise. A
            process without batches has neutral statistics, which change nothing: ``measure`` of an empty list.
        group: the process group; by default all processes.

    Raises:
        ValueError: on all processes alike, if some measured other units, parameters or dtypes than others, what is not
            finite, or failed in ``value``: nothing is added then, and they are named with what they have.
        RuntimeError: if a process ended before it came here: its rank.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return _made(value)
    error: Exception | None = None
    mine: Any = None
    try:
        mine = _made(value)
    except Exception as caught:  # whatever it is: the others learn of it before it goes on
        error = caught
    reports = _gathered(_report(mine, error), group)
    if error is not None:
        raise error
    _agree(reports)
    return cast(T, reduce(add, _gathered(mine, group)))


def _gathered(value: Any, group: Any) -> list[Any]:
    """What every process holds, in their order.

    Every process counts in the group's store how often it came here. When a connection breaks, the counts tell who is
    missing, which the text of the backend does not.
    """
    world = torch.distributed.group.WORLD if group is None else group
    size, store = torch.distributed.get_world_size(group), getattr(world, "get_group_store", lambda: None)()
    found: list[Any] = [None] * size
    keys = [f"taylorfx/{rank}" for rank in range(size)]
    count = 0 if store is None else store.add(keys[torch.distributed.get_rank(group)], 1)
    try:
        torch.distributed.all_gather_object(found, value, group=group)
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
    return found


def _made(value: T | Callable[[], T]) -> T:
    return value() if callable(value) else value


def _report(value: Any, error: Exception | None) -> dict[str, str]:
    """What the processes compare before they add up, as text."""
    if error is not None:
        return {"error": f"{type(error).__name__}: {error}"}
    real = [x for x in _tensors(value) if x.is_floating_point() or x.is_complex()]
    finite = all(bool(x.isfinite().all()) for x in real)
    dtypes = " and ".join(sorted({str(x.dtype).removeprefix("torch.") for x in real}))
    networks = " and ".join(getattr(value, "networks", ()))
    neutral = getattr(value, "n", None) == 0
    return {
        "error": "" if finite else f"its {type(value).__name__} is not finite",
        "held": ""
        if neutral
        else f"{type(value).__name__} in {dtypes or 'no'} numbers{f' of {networks}' * bool(networks)}",
    }


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _agree(reports: Sequence[Mapping[str, str]]) -> None:
    """Refuse what failed, and values that have nothing to do with each other; adding them up compares the rest."""
    failed = {rank: report["error"] for rank, report in enumerate(reports) if report["error"]}
    if failed:
        raise ValueError(f"Processes add up what is finite, when none has failed; received {_listed(failed)}")
    held = {rank: report["held"] for rank, report in enumerate(reports) if report["held"]}
    if len(set(held.values())) > 1:
        raise ValueError(
            f"Processes add up what is of the same units, parameters and dtype; received {_listed(held)}. Give all "
            "processes the same parameters, and the coupling of these."
        )


def _listed(held: Mapping[int, str]) -> str:
    return "; ".join(f"process {rank}: {text}" for rank, text in held.items())
