"""The search for the attributes of a smaller module: set sizes, call it, compare with the network, until all is equal.

A run that fails, or gives other numbers, says two things: how many values of the network it computed before, and which
attributes it read. Of what those may become, the value that leads furthest is kept; a group of parts that are the same
in every block of a network changes at once. Nothing is believed: what comes out is equal on all calls, or is refused.
"""

from __future__ import annotations

import inspect
import linecache
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, product
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taylorfx.interop.attributes import Group, Read, Slot, recorded
from taylorfx.interop.proof import Call, Truth, differs, truth
from taylorfx.layers import ShapeError
from taylorfx.network.spec import Spec
from taylorfx.tree import Params

__all__ = ["LikeError", "settle"]

LIMIT = 2000
"""How many values are tried for one step of the search at most."""

Values = dict[Slot, int]


class LikeError(ValueError):
    """A module whose own ``forward`` cannot work with smaller layers; the message says why."""


@dataclass(frozen=True, eq=False)
class Run:
    """What one call of the smaller module led to.

    Attributes:
        wrong: how its outputs differ from the network's, or why there are none; empty if they are equal.
        failed: it raised an error.
        reached: how many values of the network it computed, twice as much in their own shape, and how many functions of
            torch it called.
        place: the line of the module's own code where it failed, or after which it computed no value of the network.
        reads: the attributes that it read.
    """

    wrong: str
    failed: bool
    reached: tuple[int, int]
    place: str
    reads: Sequence[Read]


class _Watch(TorchFunctionMode):
    """Counts results that the network has, too, and remembers the line that made the first one after the last such."""

    def __init__(self, expected: Truth) -> None:
        super().__init__()
        self.expected = expected
        self.matched = self.done = 0
        self.place = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.done += 1
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 1:
                if known := self.expected.knows(x):
                    self.matched, self.place = self.matched + known, ""
                elif not self.place:
                    self.place = _line(inspect.currentframe())
        return result


def _line(frame: FrameType | None) -> str:
    """The innermost line that is not torch's, nor of this package."""
    while frame is not None and not _theirs(frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else _written(frame.f_code.co_filename, frame.f_lineno)


HERE, TORCH = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)


def _theirs(file: str) -> bool:
    return not file.startswith((HERE, TORCH))


def _written(file: str, line: int) -> str:
    return f"{file}:{line}: {linecache.getline(file, line).strip()}"


def _attempt(module: nn.Module, call: Call, expected: Truth, spec: Spec, groups: Sequence[Group]) -> Run:
    """Call the module once."""
    watch = _Watch(expected)
    with recorded(module, groups) as reads:
        try:
            with watch:
                results = call.outputs(module)
        except Exception as error:  # whatever the module's own code raises
            frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
            theirs = [frame for frame in frames if _theirs(frame[0])] or frames[-1:]
            place = _written(*theirs[-1])
            return Run(f"{type(error).__name__}: {error}", True, (watch.matched, watch.done), place, reads)
    wrong = differs(results, expected, call, spec)
    return Run(wrong, False, (watch.matched, watch.done), watch.place, reads)


def settle(
    module: nn.Module,
    params: Params,
    spec: Spec,
    groups: Sequence[Group],
    calls: Iterable[Call],
    certain: Callable[[Call], bool],
    before: Sequence[tuple[Call, Truth]] = (),
) -> list[tuple[Call, Truth]]:
    """Write into the module the sizes with which it computes on all calls what the network does.

    Args:
        groups: the attributes that may change.
        calls: the first one is that of the network itself.
        certain: whether the whole module gives on a call what its network gives; asked where the smaller one does not.
        before: calls that are right already, and stay so.

    Returns:
        All calls, with what they have to give.

    Raises:
        LikeError: if there are no such sizes.
    """
    passed = [*before]
    for call in calls:
        try:
            expected = truth(params, spec, call)
        except ShapeError:
            if not passed:
                raise
            continue
        run = _attempt(module, call, expected, spec, groups)
        if run.wrong and passed and not certain(call):  # then it has to run, and no more
            expected = replace(expected, outputs={}, buffers={})
            run = _attempt(module, call, expected, spec, groups)
        tries = _Tries(module, spec, groups, [*passed, (call, expected)])
        while run.wrong:
            better = tries.better(run)
            if better is None:
                raise LikeError(_refusal(module, call, run))
            run = better
        passed.append((call, expected))
    return passed


@dataclass(eq=False)
class _Tries:
    """The search for one call: it has to become right, and those before it to stay right."""

    module: nn.Module
    spec: Spec
    groups: Sequence[Group]
    calls: Sequence[tuple[Call, Truth]]
    count: int = 0

    def better(self, run: Run) -> Run | None:
        """The run after the change of values that leads furthest; none if all lead less far."""
        self.count = 0
        for moves in (chain(self._together(run), self._by_axis(run)), self._in_pairs(run), self._part_by_part(run)):
            best, chosen = run, Values()
            for values in moves:
                self.count += 1
                before = {slot: slot.get(self.module) for slot in values}
                self._write(values)
                new = _attempt(self.module, *self.calls[-1], self.spec, self.groups)
                right = not new.wrong or new.reached > best.reached
                right = right and all(not self._again(*call).wrong for call in self.calls[:-1])
                if right and not new.wrong:
                    return new
                if right:
                    best, chosen = new, values
                self._write(before)
                if self.count >= LIMIT:
                    return None
            if chosen:
                self._write(chosen)
                return best
        return None

    def _again(self, call: Call, expected: Truth) -> Run:
        return _attempt(self.module, call, expected, self.spec, ())

    def _write(self, values: Values) -> None:
        for slot, number in values.items():
            slot.set(self.module, number)

    def _together(self, run: Run) -> Iterator[Values]:
        """Every group that was read, the last one first, with all that it may become."""
        for group in self._read(run):
            yield from self._moves(group)

    def _by_axis(self, run: Run) -> Iterator[Values]:
        """All groups of the same parts that one axis explains, as it explains them: heads, and all their dimensions."""
        read = self._read(run)
        for slots in dict.fromkeys(tuple(slot.part for slot in group.slots) for group in read):
            groups = [group for group in self.groups if tuple(slot.part for slot in group.slots) == slots]
            for axis in dict.fromkeys(axis for group in groups for axis in group.causes):
                explained = [group for group in groups if axis in group.causes]
                for some in (explained, [group for group in explained if group in read]):
                    pairs = [zip(group.slots, group.causes[axis], strict=True) for group in some]
                    yield {slot: n for each in pairs for slot, n in each}

    def _in_pairs(self, run: Run) -> Iterator[Values]:
        """Two groups of the same parts at once."""
        for one, other in combinations(self._read(run), 2):
            if [slot.part for slot in one.slots] == [slot.part for slot in other.slots]:
                for first, second in product(self._moves(one), self._moves(other)):
                    yield {**first, **second}

    def _part_by_part(self, run: Run) -> Iterator[Values]:
        """Every part for itself, then two attributes of it at once: heads and their dimensions."""
        order = {(read.part, read.name): k for k, read in enumerate(run.reads)}
        slots = [
            (slot, numbers)
            for group in self.groups
            for slot, numbers in zip(group.slots, group.alone, strict=True)
            if (slot.part, slot.name) in order and len(numbers) > 1
        ]
        slots.sort(key=lambda each: -order[each[0].part, each[0].name])
        for slot, numbers in slots:
            yield from ({slot: n} for n in numbers if n != self._now(slot))
        tuples: dict[tuple[str, str], list[tuple[Slot, tuple[int, ...]]]] = {}
        for slot, numbers in slots:
            tuples.setdefault((slot.part, slot.name), []).append((slot, numbers))
        for entries in tuples.values():
            yield from self._splits(entries)
        for (one, firsts), (other, seconds) in combinations(slots, 2):
            if one.part == other.part:
                for n, m in product(firsts, seconds):
                    if n != self._now(one) and m != self._now(other):
                        yield {one: n, other: m}

    def _splits(self, entries: Sequence[tuple[Slot, tuple[int, ...]]]) -> Iterator[Values]:
        """All entries of a tuple that adds up to an axis' old size: such that they add up to its new one."""
        slots = [slot for slot, _ in entries]
        pairs = [pair for group in self.groups for pair in zip(group.slots, group.changed, strict=True)]
        changed = {sizes for slot, axes in pairs if slot in slots for sizes in axes}
        before = sum(numbers[0] for _, numbers in entries)
        wanted = {new for old, new in changed if old == before}
        for numbers in product(*(numbers for _, numbers in entries)) if wanted and len(entries) > 1 else ():
            if sum(numbers) in wanted:
                yield dict(zip(slots, numbers, strict=True))

    def _read(self, run: Run) -> list[Group]:
        order = {(read.part, read.name): k for k, read in enumerate(run.reads)}
        last = {k: max(order.get((x.part, x.name), -1) for x in group.slots) for k, group in enumerate(self.groups)}
        return [self.groups[k] for k in sorted(last, key=lambda k: -last[k]) if last[k] >= 0]

    def _moves(self, group: Group) -> Iterator[Values]:
        now = tuple(map(self._now, group.slots))
        for numbers in group.candidates:
            if numbers != now:
                yield dict(zip(group.slots, numbers, strict=True))

    def _now(self, slot: Slot) -> int:
        return slot.get(self.module)


def _refusal(module: nn.Module, call: Call, run: Run) -> str:
    """Why the module is refused, and where it has an old size."""
    kind = type(module).__name__
    what = "does not run" if run.failed else "computes something else"
    place = f"\n  {run.place}\n" if run.place else " "
    other = f" unchanged=[{call.method!r}] gives up the method." if call.method != "forward" else ""
    return (
        f"The {call.method} of {kind} {what} with smaller layers, {call.title}:{place}{run.wrong}\n"
        "It has their old sizes written down, and no attribute of whole numbers makes up for it. to_torch without "
        "`like` gives a module that has not; taylorfx.interop.holdable says which units the class can lose."
        f"{other}"
    )
