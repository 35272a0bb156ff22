"""How large a network may be. A few lines of a file can describe a network that no machine holds.

Forty joins of an axis to itself make 2^40 positions. Such a network is refused where its sizes are told, before
anything of its size is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from taylorfx.layers import Shape, ShapeError

__all__ = ["ELEMENTS", "LABELS", "NUMBERS", "POSITIONS", "Room", "impossible"]

POSITIONS = 2**31 - 1
"""No axis is as long."""

ELEMENTS = 2**36
"""No tensor has more numbers: 256 GB in single precision."""

NUMBERS = 2**42
"""No network has more parameters."""

LABELS = 2**26
"""So many positions its axes may have together beside those of its parameters: half a gigabyte of labels."""


def impossible(shape: Iterable[int]) -> str:
    """What of a shape no tensor of a network has, in words; nothing where it may have it.

    >>> impossible((64, 3, 2**31))
    'an axis of 2,147,483,648 positions, where tensors have less than 2,147,483,647'
    """
    sizes = tuple(shape)
    if min(sizes, default=0) < 0:
        return f"an axis of {min(sizes):,} positions"
    if max(sizes, default=0) >= POSITIONS:
        return f"an axis of {max(sizes):,} positions, where tensors have less than {POSITIONS:,}"
    if math.prod(sizes) > ELEMENTS:
        return f"{math.prod(sizes):,} numbers, where tensors have at most {ELEMENTS:,}"
    return ""


@dataclass
class Room:
    """What is left of the limits while a network's sizes are told."""

    labels: int = LABELS
    wrong: list[tuple[str, str]] = field(default_factory=list)
    """The nodes whose outputs no network has, and what of them."""

    @classmethod
    def beside(cls, shapes: Iterable[Shape]) -> Room:
        """The room of a network with parameters of these shapes, for which there is room where they are."""
        return cls(LABELS + min(8 * sum(map(sum, shapes)), 4 * LABELS))

    def take(self, labels: int) -> None:
        """Make room for the labels of so many positions.

        Raises:
            ShapeError: if the network has too many.
        """
        self.labels -= labels
        if self.labels < 0 or labels > LABELS:
            raise ShapeError(f"the axes of a network have at most {LABELS:,} positions together; here they get more")

    def holds(self, name: str, shape: Shape) -> bool:
        """A node's output is one that a network may have; otherwise it is remembered."""
        if problem := impossible(shape):
            self.wrong.append((name, problem))
        return not problem
