"""Sizes that a module has written down: attributes that hold whole numbers, and what they may become.

Nothing is known of a class. What an attribute may become follows from the parameters around it, whose axes changed:

    attention       q.weight (32, 32) -> (24, 32)      k.weight (16, 32) -> (12, 32)
    .all_heads = 32     the size of an axis                                     24
    .heads = 8          an axis' size divided by a constant, 32 / 4             6
    .groups = 2         the quotient of two axes, 32 / 16                       2

Several are possible for most, and which is right is found out by trying (`taylorfx.interop.search`). Parts of one class
whose parameters had the same shapes are parts of repeated blocks: what an attribute follows is the same in all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from taylorfx.layers import Shape

__all__ = ["Group", "Read", "Resized", "Slot", "groups_of", "guesses", "recorded", "tensors_of"]

CANDIDATES = 16
"""How many values are tried for an attribute at most, the simplest explanations first."""

BASE = frozenset(vars(nn.Module()))
"""What every module has: no sizes."""


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a module; those that are tied under each of their names."""
    buffers = module.named_buffers(remove_duplicate=False)
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(buffers)}


class Slot(NamedTuple):
    """An attribute that holds a whole number; with an index, one entry of a tuple or list of them."""

    part: str
    name: str
    entry: int | None = None

    def get(self, module: nn.Module) -> int:
        """The number."""
        value = vars(module.get_submodule(self.part))[self.name]
        number: int = value if self.entry is None else value[self.entry]
        return number

    def rest(self, module: nn.Module) -> int:
        """The sum of the other entries."""
        return 0 if self.entry is None else sum(vars(module.get_submodule(self.part))[self.name]) - self.get(module)

    def set(self, module: nn.Module, number: int) -> None:
        """Write the number; a tuple or list is replaced, not written into: it may be shared."""
        part = module.get_submodule(self.part)
        value = vars(part)[self.name]
        if self.entry is not None:
            entries = [*value[: self.entry], number, *value[self.entry + 1 :]]
            setattr(part, self.name, entries if isinstance(value, list) else tuple(entries))
        else:
            setattr(part, self.name, number)


class Read(NamedTuple):
    """A slot's attribute is read, at this line."""

    part: str
    name: str
    file: str
    line: int


Axes = Mapping[str, tuple[int, int]]
"""The old and the new size of parameters' axes, by their paths from some submodule on: ``q.weight.0``."""


Axis = tuple[int, tuple[int, ...]]
"""The old size of an axis, and its new size in each of several parts."""


@dataclass(frozen=True)
class Resized:
    """The shapes of all tensors of a module, by path, before and after."""

    old: Mapping[str, Shape]
    new: Mapping[str, Shape]

    def below(self, part: str) -> Axes:
        """The axes of the tensors of a submodule and of all in it."""
        prefix = f"{part}." if part else ""
        return {
            f"{path[len(prefix) :]}.{k}": sizes
            for path in self.old
            if path.startswith(prefix)
            for k, sizes in enumerate(zip(self.old[path], self.new[path], strict=True))
        }

    def around(self, part: str) -> Axes:
        """Those of the submodule, and of the two smallest ones around it in which an axis changes."""
        axes: dict[str, tuple[int, int]] = {}
        levels = 0
        while levels < 2:
            below = self.below(part)
            levels += any(old != new for old, new in below.values())
            axes |= {f"{levels}:{path}": sizes for path, sizes in below.items()}
            if not part:
                break
            part = part.rpartition(".")[0]
        return axes


@dataclass(frozen=True)
class Group:
    """The same attribute in parts of one class whose parameters had the same shapes.

    Attributes:
        slots: one for every part.
        candidates: for each way to explain the number, what it becomes in every slot; the first leaves it as it is.
        causes: for each axis that explains the number, by its old size and its new ones, what it becomes in every slot.
        alone: for each slot, what the number may become there, whatever it becomes in the others; as it is first.
        changed: for each slot, the old and the new sizes of the axes around its part that change.
    """

    slots: tuple[Slot, ...]
    candidates: tuple[tuple[int, ...], ...]
    causes: Mapping[Axis, tuple[int, ...]]
    alone: tuple[tuple[int, ...], ...]
    changed: tuple[frozenset[tuple[int, int]], ...]


def groups_of(module: nn.Module, resized: Resized, known: frozenset[str]) -> list[Group]:
    """All attributes that may have to change.

    Args:
        known: the submodules whose attributes are known already.
    """
    members: dict[object, list[tuple[Slot, Axes]]] = {}
    for part, child in module.named_modules():
        slots = [] if part in known else [*_slots(part, child)]
        if not slots:
            continue
        axes = resized.around(part)
        form = type(child), tuple((path, old) for path, (old, _) in axes.items())
        for slot in slots:
            members.setdefault((form, slot.name, slot.entry, slot.get(module)), []).append((slot, axes))
    groups = []
    for each in members.values():
        slots, sizes = [slot for slot, _ in each], [axes for _, axes in each]
        vectors = {path: (old, tuple(axes[path][1] for axes in sizes)) for path, (old, _) in sizes[0].items()}
        number = slots[0].get(module)
        causes = dict(_causes(number, slots[0].rest(module), list(dict.fromkeys(vectors.values()))))
        quotients = _quotients(number, list(dict.fromkeys(vectors.values())))
        unchanged = (number,) * len(slots)
        candidates = tuple(dict.fromkeys((unchanged, *causes.values(), *quotients)))[:CANDIDATES]
        alone = tuple(
            tuple(dict.fromkeys((*together, *_factors(number, axes.values()))))
            for together, axes in zip(zip(*candidates, strict=True), sizes, strict=True)
        )
        if any(len(numbers) > 1 for numbers in alone):
            changed = tuple(frozenset(pair for pair in axes.values() if pair[0] != pair[1]) for axes in sizes)
            groups.append(Group(tuple(slots), candidates, causes, alone, changed))
    return groups


def _slots(name: str, part: nn.Module) -> Iterator[Slot]:
    for key, value in vars(part).items():
        if key in BASE:
            continue
        if _whole(value):
            yield Slot(name, key)
        elif isinstance(value, (tuple, list)) and value and all(map(_whole, value)):
            yield from (Slot(name, key, k) for k in range(len(value)))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _causes(number: int, rest: int, axes: Iterable[Axis]) -> Iterator[tuple[Axis, tuple[int, ...]]]:
    """What a number becomes in each of several parts if it follows one of these axes, the simplest explanation first.

    Args:
        rest: the sum of the other entries of its tuple.

    >>> dict(_causes(8, 0, [(32, (24, 16)), (16, (12, 12)), (5, (4, 4))]))  # 8 heads of 4, or of 2, in both parts
    {(32, (24, 16)): (6, 4), (16, (12, 12)): (6, 6)}
    """
    changed = [(old, new) for old, new in axes if any(n != old for n in new)]
    for old, new in sorted(changed, key=lambda axis: axis[0] != number):
        if old % number == 0 and all(n * number % old == 0 for n in new):
            yield (old, new), tuple(n * number // old for n in new)
        elif number % old == 0:
            yield (old, new), tuple(n * (number // old) for n in new)
        elif rest and old == number + rest and all(n > rest for n in new):
            yield (old, new), tuple(n - rest for n in new)


def _quotients(number: int, axes: Sequence[Axis]) -> Iterator[tuple[int, ...]]:
    """What a number becomes if it is the quotient of two axes: of the queries' and the keys', for example."""
    for a_old, a_new in axes:
        for b_old, b_new in axes:
            whole = all(n % m == 0 for n, m in zip(a_new, b_new, strict=True))
            if a_old == number * b_old and whole and (a_old, a_new) != (b_old, b_new):
                yield tuple(n // m for n, m in zip(a_new, b_new, strict=True))


def _factors(number: int, axes: Iterable[tuple[int, int]]) -> Iterator[int]:
    """What a factor of an axis may become if the other factor changes, too; neither becomes greater.

    >>> [*_factors(8, [(32, 21)])]  # 4 heads of 8 become 21 numbers: 3 of 7
    [7]
    """
    for old, new in axes:
        if old != new and old % number == 0:
            yield from (n for n in range(number, 0, -1) if new % n == 0 and new // n <= old // number)


def guesses(module: nn.Module, groups: Sequence[Group], resized: Resized) -> dict[Slot, int]:
    """The sizes of the parts' own parameters and of their children's, where all axes of the old size changed alike."""
    found: dict[Slot, int] = {}
    for slot in (slot for group in groups for slot in group.slots):
        near = {path: sizes for path, sizes in resized.below(slot.part).items() if path.count(".") <= 2}
        number = slot.get(module)
        new = {n for old, n in near.values() if old == number}
        if len(new) == 1:
            found[slot] = new.pop()
    return found


@contextmanager
def recorded(module: nn.Module, groups: Sequence[Group]) -> Iterator[list[Read]]:
    """The reads of these groups' attributes, in their order. Parts whose class has no subclasses are left out."""
    reads: list[Read] = []
    names: dict[str, set[str]] = {}
    for slot in (slot for group in groups for slot in group.slots):
        names.setdefault(slot.part, set()).add(slot.name)
    classes: list[tuple[Any, type]] = []
    try:
        for name, wanted in names.items():
            part = module.get_submodule(name)
            classes.append((part, type(part)))
            part.__class__ = _reader(type(part), name, wanted, reads)
        yield reads
    finally:
        for part, cls in classes:
            part.__class__ = cls


def _reader(cls: Any, part: str, wanted: set[str], reads: list[Read]) -> Any:
    """A subclass that notes which of these attributes are read."""

    def __getattribute__(self: object, name: str) -> object:
        if name in wanted and (frame := inspect.currentframe()) and frame.f_back:
            reads.append(Read(part, name, frame.f_back.f_code.co_filename, frame.f_back.f_lineno))
        return cls.__getattribute__(self, name)

    members = {"__getattribute__": __getattribute__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), members)
