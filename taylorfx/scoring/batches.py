"""Batches, and their targets example by example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import optree
from torch import Tensor

from taylorfx.network.run import Inputs, bind_inputs
from taylorfx.network.spec import Spec

__all__ = [
    "Batch",
    "Batches",
    "Kept",
    "Parted",
    "Split",
    "Targets",
    "by_example",
    "each_batch",
    "one_by_one",
    "size",
    "sliced",
]


Targets = Any
"""What a loss compares outputs with: a tensor, a tree of tensors, or whatever a loss of the user's own takes."""


Batch = tuple[Inputs, Targets]
"""``(inputs, targets)``."""


Batches = Batch | Iterable[Batch]
"""``(inputs, targets)``, or an iterable of such."""


Split = Callable[[Targets, int], Targets]
"""``split(targets, k)``: the targets of example ``k`` as those of a batch of one."""


@dataclass(frozen=True, eq=False)
class Parted:
    """Targets that no slice takes apart, split into those of each example, each as the targets of a batch of one."""

    each: tuple[Targets, ...]

    def __len__(self) -> int:
        return len(self.each)

    def __getitem__(self, some: slice) -> Parted:
        return Parted(self.each[some])


def size(x: object) -> int:
    """Over how many examples a leaf of outputs or targets runs; 0 for what cannot be sliced along them."""
    return len(x) if isinstance(x, Parted) or (isinstance(x, Tensor) and x.ndim) else 0


def by_example(targets: Targets, count: int | None) -> Targets:
    """Targets as they are, if they are tensors; `Parted`, if lists with one entry per example lie among them.

    ::

        {"class": (N,), "box": (N, 4)}      as they are
        [{"boxes": (3, 4)}, {"boxes": (2, 4)}]  of N = 2: Parted(([{"boxes": (3, 4)}], [{"boxes": (2, 4)}]))
    """

    def entries(x: object) -> bool:
        return isinstance(x, (list, tuple)) and _has_entries(x, count)

    leaves = optree.tree_leaves(targets, is_leaf=entries)
    if all(isinstance(x, Tensor) for x in leaves):
        return targets
    strange = sorted({type(x).__name__ for x in leaves if not isinstance(x, (Tensor, np.ndarray)) and not entries(x)})
    sizes = {len(x) if getattr(x, "ndim", 1) else 0 for x in leaves if hasattr(x, "__len__")} | {count}
    if strange or count is None or len(sizes) != 1:
        raise ValueError(
            f"Targets are tensors or lists with one entry per example, here {count}; received "
            f"{', '.join(strange) or f'such of {sorted(map(str, sizes))}'}. Targets of another structure need "
            "split=..., a loss of the whole batch per_example=False."
        )
    return Parted(tuple(optree.tree_map(lambda x, k=k: x[k : k + 1], targets, is_leaf=entries) for k in range(count)))


def _has_entries(x: Sequence[object], count: int | None) -> bool:
    """Whether a list has one entry per example, as detectors have it; it may also hold things that are of all examples.

    ::

        [{"boxes": (3, 4)}, {"boxes": (2, 4)}]    2 examples: a dict is always an example's
        (starts (8,), ends (8,))                  8 examples: tensors of all
        [(2, 4), (2, 4)]                          2 examples: there is no telling
    """
    if count is None or len(x) != count:
        return False
    if all(isinstance(entry, Mapping) for entry in x) or not all(_is_of_all(entry, count) for entry in x):
        return True
    if (
        count > 1
        and len({(type(entry), getattr(entry, "dtype", None), getattr(entry, "shape", None)) for entry in x}) == 1
    ):
        kind = f"{type(x[0]).__name__}s of {len(x[0]) if isinstance(x[0], Sized) else 1}"
        raise ValueError(
            f"A list of targets has an entry for each example, or tensors of all; received {count} {kind} for {count} "
            "examples, which can be either. Give split=..., or tensors of all in a dict."
        )
    return False


def _is_of_all(x: object, count: int) -> bool:
    """Whether something can be of all examples."""
    if isinstance(x, (Tensor, np.ndarray)):
        return bool(x.ndim) and len(x) == count
    if isinstance(x, Mapping):
        return all(_is_of_all(value, count) for value in x.values())
    return isinstance(x, (list, tuple)) and (len(x) == count or all(_is_of_all(value, count) for value in x))


def one_by_one(batch: Batch, spec: Spec) -> list[Batch]:
    """The examples of a parted batch as batches of one."""
    count = len(next(iter(bind_inputs(spec, (batch[0],)).values())))
    return [sliced(batch, slice(k, k + 1)) for k in range(count)]


def sliced(batch: Batch, some: slice) -> Batch:
    """Some examples of a parted batch."""
    whole: Targets = batch
    return cast("Batch", optree.tree_map(lambda x: x[some], whole))


def each_batch(batches: Batches) -> Iterator[Batch]:
    """The batches; a tuple is a single one."""
    for k, batch in enumerate([batches] if isinstance(batches, tuple) else batches):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            kind = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
            raise ValueError(f"A batch is a pair (inputs, targets), several come in a list; batch {k} is a {kind}.")
        yield batch[0], batch[1]


class Kept(Iterable[Batch]):
    """The batches of an iterator, taken when they are first asked for and kept for the next time."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.kept: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        self.kept = [*self.batches] if self.kept is None else self.kept
        return iter(self.kept)
