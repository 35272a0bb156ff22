"""Limits: how large a network may be.

A few lines of a file can describe a network that no machine holds: forty concatenations of an axis with itself give an
axis of 2^40 positions. Such a network is refused where its shapes are inferred, before memory of that size is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from taylorfx.layers import Shape, ShapeError

__all__ = ["ELEMENTS", "LABELS", "NUMBERS", "POSITIONS", "Room", "impossible"]

POSITIONS = 2**31 - 1
"""Every axis has fewer positions."""

ELEMENTS = 2**36
"""A tensor has at most so many elements: 256 GB in single precision."""

NUMBERS = 2**42
"""A network has at most so many parameters."""

LABELS = 2**26
"""The axes of a network have at most so many labels, beside some for its parameters: half a gigabyte."""


def impossible(shape: Iterable[int]) -> str:
    """Why no tensor of a network has this shape, in words; empty if one may have it.

    >>> impossible((64, 3, 2**31))
    'an axis of 2,147,483,648 positions, where tensors have fewer than 2,147,483,647'
    >>> impossible((64, 3, 7, 7))
    ''
    """
    sizes = tuple(shape)
    if min(sizes, default=0) < 0:
        return f"an axis of {min(sizes):,} positions"
    if max(sizes, default=0) >= POSITIONS:
        return f"an axis of {max(sizes):,} positions, where tensors have fewer than {POSITIONS:,}"
    if math.prod(sizes) > ELEMENTS:
        return f"{math.prod(sizes):,} elements, where tensors have at most {ELEMENTS:,}"
    return ""


@dataclass
class Room:
    """What is left of the limits while the shapes of a network are inferred, and which outputs exceed them."""

    labels: int = LABELS
    wrong: list[tuple[str, str]] = field(default_factory=list)
    """The nodes whose outputs no network has, and why."""

    @classmethod
    def beside(cls, shapes: Iterable[Shape]) -> Room:
        """The room of a network with parameters of these shapes: the longer their axes, the more labels it may have."""
        return cls(LABELS + min(8 * sum(map(sum, shapes)), 4 * LABELS))

    def take(self, labels: int) -> None:
        """Take room for so many labels.

        Raises:
            ShapeError: if the network has too many.
        """
        self.labels -= labels
        if self.labels < 0 or labels > LABELS:
            raise ShapeError(f"the axes of a network have at most {LABELS:,} positions together; here there are more")

    def holds(self, name: str, shape: Shape) -> bool:
        """Whether a network may have a node's output of this shape; if not, it is remembered in ``wrong``."""
        if problem := impossible(shape):
            self.wrong.append((name, problem))
        return not problem
