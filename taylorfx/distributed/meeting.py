"""How processes meet, tell each other what they have, and add it up; or all of them raise an error."""

from __future__ import annotations

import io
import json
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]

__all__ = ["Same", "Total", "agreed", "alone", "total"]

T = TypeVar("T")


class Total(Protocol):
    """What adds up: `total`, or a ``functools.partial`` of it with another process group."""

    def __call__(self, value: Callable[[], T], /) -> T:
        """The sum of what the function gives in every process."""


@dataclass(frozen=True)
class Same:
    """What has to be the same in all processes, as text: it adds up with itself only."""

    text: str

    def __add__(self, other: Same) -> Same:
        if self != other:
            raise ValueError(f"Processes go on with the same; received {self.text} and {other.text}.")
        return self


def total(value: T | Callable[[], T], group: ProcessGroup | None = None) -> T:
    """The sum of what every process holds, the same on all of them: of `Statistics`, `Means`, `LeastSquares`.

    Values are added in the order of the ranks, so that rows (``measure(..., rows=True)``) stand in it. Each process
    receives the values of all, which takes as many times the memory for a moment. Where ``torch.distributed`` is not
    initialized there is one process, and its value is the sum.

    Args:
        value: anything that adds up with ``+`` and can be pickled, or a function without arguments that gives it. What
            such a function raises is raised in its own process, and named in all others, which would wait otherwise. It
            may call `total` in its turn. A process without batches measures an empty list, which gives neutral
            statistics: they change no sum.
        group: the process group; by default all processes.

    Raises:
        ValueError: on all processes alike, if some measured other units, parameters, dtypes or networks than others,
            what is not finite, or failed in ``value``: nothing is added then, and they are named with what they have.
            Also in a process that is not in the group.
        RuntimeError: on all processes alike, naming those that did not come within the timeout that
            ``init_process_group`` was given: they ended, hang, or are late.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return alone(value)
    if torch.distributed.get_rank(group) < 0:
        raise ValueError("The processes of a group add up; this one is not in the group. Call it in those only.")
    try:
        mine = alone(value)
        report, packed = _Report.of(mine), _packed(mine)
    except Exception as error:
        if not _is_known(error):
            with suppress(ValueError, RuntimeError):  # which is what the others raise
                _meet(_Report(error=f"{type(error).__name__}: {error}"), group)
            _make_known(error)
        raise
    _meet(report, group)
    if isinstance(mine, Same):
        return mine
    try:
        parts = [packed] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(parts, packed, group=group)
    except RuntimeError as error:
        _meet(_Report(error=f"the exchange of values broke off: {error}"), group)
        raise
    # What comes from the other processes of this program is no file: it may be of any class, as in all_gather_object.
    device = next((x.device for x in _tensors(mine)), torch.device("cpu"))
    values: list[T] = [torch.load(io.BytesIO(part), map_location=device, weights_only=False) for part in parts]
    return reduce(operator.add, values)


def _packed(value: object) -> bytes:
    """A value as bytes, from which every process makes one on its own device."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def alone(value: T | Callable[[], T], /) -> T:
    """The total of a single process: the value, or that of a function without arguments."""
    return value() if callable(value) else value


def agreed(total: Total | None, make: Callable[[], T], tell: Callable[[T], str]) -> T:
    """What every process makes for itself, once it is known that all have made the same.

    Args:
        total: what adds up over the processes; ``None`` for a single one.
        make: what raises in one process raises in all of them. It may call ``total``.
        tell: a text that differs if what is made does.
    """
    if total is None:
        return make()
    results: list[T] = []

    def told() -> Same:
        results.append(make())
        return Same(tell(results[0]))

    total(told)
    return results[0]


@dataclass(frozen=True)
class _Report:
    """What the processes tell each other before they exchange values.

    Attributes:
        error: what has failed, empty if nothing has.
        kind: of what they add up.
        holds: what has to be the same in all of them; empty if the value changes no sum.
    """

    error: str = ""
    kind: str = ""
    holds: str = ""

    @staticmethod
    def of(value: object) -> _Report:
        kind = type(value).__name__
        if isinstance(value, Same):
            return _Report(kind=kind, holds=value.text)
        tensors = [*_tensors(value)]
        real = [x for x in tensors if x.is_floating_point() or x.is_complex()]
        finite = all(bool(x.isfinite().all()) for x in real)
        dtypes = " and ".join(sorted({str(x.dtype).removeprefix("torch.") for x in real}))
        networks = " and ".join(getattr(value, "networks", ()))
        holds = f"{kind} in {dtypes or 'no'} numbers{f' of {networks}' * bool(networks)}"
        neutral = getattr(value, "n", None) == 0 or (is_dataclass(value) and not tensors)
        return _Report("" if finite else f"its {kind} is not finite", kind, "" if neutral else holds)


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


# How processes meet.


PAUSE = 0.05
"""Seconds between two looks at the store, at most."""

FAREWELL = 5.0
"""Seconds that a process stays for others to read why all of them stop: the store may end with it."""


@dataclass(frozen=True)
class _Place:
    """Where processes meet for the ``point``-th time: keys of the group's store, which all of them read and write."""

    store: Store
    size: int
    point: int

    def key(self, what: str | int) -> str:
        """That of a process's report, or of what all of them share."""
        return f"taylorfx/{self.point}/{what}"

    def missing(self) -> list[int]:
        """The processes that have not reported."""
        return [rank for rank in range(self.size) if not self.store.check([self.key(rank)])]

    def reports(self) -> list[_Report]:
        return [_Report(**json.loads(x)) for x in self.store.multi_get([self.key(rank) for rank in range(self.size)])]

    def leave(self, rank: int) -> None:
        """Remove what nobody reads any more: all are at the next place."""
        for key in [self.key(rank), *([self.key("verdict")] if rank == 0 else [])]:
            self.store.delete_key(key)


def _meet(mine: _Report, group: ProcessGroup | None) -> None:
    """Wait for the reports of all processes, and raise on all of them if one does not come or they do not agree."""
    world = torch.distributed.group.WORLD if group is None else group
    assert world is not None
    size, rank, store = torch.distributed.get_world_size(group), torch.distributed.get_rank(group), _store(world)
    problem: Exception | None
    try:
        place = _Place(store, size, store.add(f"taylorfx/point of {rank}", 1))
        store.set(place.key(rank), json.dumps(asdict(mine)))
        missing = _absent(place)
        problem = _absence(missing, size) if missing else _disagreement(place.reports())
        if problem is None:
            replace(place, point=place.point - 1).leave(rank)
            return
        _part(place, size - len(missing))
    except RuntimeError as error:
        problem = RuntimeError(
            "Processes meet in the store of their group; process 0, or the launcher, which keeps it, has ended. Look "
            "at its own error."
        )
        problem.__cause__ = error
    raise _make_known(problem)


def _absent(place: _Place) -> list[int]:
    """Who has not come when all have come, or when the first has waited for as long as the timeout.

    Who sees either first writes it down, once and for all: the others do as it says, so that all stop or none does.
    """
    store, pause = place.store, PAUSE / 64
    end = time.monotonic() + store.timeout.total_seconds()  # type: ignore[attr-defined]
    while not store.check([place.key("verdict")]):
        late = time.monotonic() > end
        if late or store.check([place.key(rank) for rank in range(place.size)]):
            store.compare_set(place.key("verdict"), "", json.dumps(place.missing()))
        else:
            time.sleep(pause)
            pause = min(2 * pause, PAUSE)
    missing: list[int] = json.loads(store.get(place.key("verdict")))
    return missing


def _part(place: _Place, readers: int) -> None:
    """Wait until so many processes have read the verdict: what keeps the store may end now."""
    end, more = time.monotonic() + FAREWELL, 1
    with suppress(RuntimeError):  # it has ended, because all have read it
        while place.store.add(place.key("readers"), more) < readers and time.monotonic() < end:
            more = 0
            time.sleep(PAUSE)


def _store(group: ProcessGroup) -> Store:
    store: Store = group.get_group_store()
    return store


def _absence(missing: Sequence[int], size: int) -> Exception:
    return RuntimeError(
        f"Processes add up when all of them come to the sum; process {', '.join(map(str, missing))} of {size} did not "
        "within the timeout of the process group. Look at its own error: it ended, hangs, or is late."
    )


def _disagreement(reports: Sequence[_Report]) -> Exception | None:
    """Failures, and values of other networks or dtypes; adding them up compares the rest."""
    failed = {rank: report.error for rank, report in enumerate(reports) if report.error}
    if failed:
        return ValueError(f"Processes add up what is finite, when none has failed; received {_listed(failed)}")
    holds = {rank: report.holds or report.kind for rank, report in enumerate(reports)}
    told = {report.holds for report in reports if report.holds}
    if len(told) > 1 or len({report.kind for report in reports}) > 1:
        return ValueError(
            f"Processes add up what is of the same units, parameters and dtype; received {_listed(holds)}. Give all "
            "processes the same network, parameters and options, and the coupling of these."
        )
    return None


def _listed(texts: Mapping[int, str]) -> str:
    return "; ".join(f"process {rank}: {text}" for rank, text in texts.items())


def _make_known(error: Exception) -> Exception:
    """The error, marked as one that all processes know of: a `total` around this one has nothing to report any more."""
    error.__dict__["known_to_all"] = True
    return error


def _is_known(error: BaseException | None) -> bool:
    """Whether all processes know of an error, or of the one that it comes from."""
    while error is not None and not error.__dict__.get("known_to_all"):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error is not None
