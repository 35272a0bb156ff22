"""Where the parameters of a network lie in a tree, prepared once, so that a run finds them without building paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from taylorfx.tree import Params

__all__ = ["Layout"]


class Layout(NamedTuple):
    """The leaves of a tree in the order in which a network needs them, and the walk that reaches them.

    The walk numbers the subtrees: 0 is the tree itself, and every further one lies in one with a smaller number::

        paths                  subtrees            places
        stem.weight            0  (the tree)       1, "weight"
        body.0.weight          1  0, "stem"        3, "weight"
        body.0.bias            2  0, "body"        3, "bias"
                               3  2, "0"

    Attributes:
        paths: the path of every leaf.
        subtrees: for all subtrees but the first, the number of the one in which it lies, and its key there.
        places: for every leaf the number of its subtree, and its key there.
        widths: how many entries every subtree has.
    """

    paths: tuple[str, ...]
    subtrees: tuple[tuple[int, str], ...]
    places: tuple[tuple[int, str], ...]
    widths: list[int]

    @classmethod
    def of(cls, paths: Iterable[str]) -> Layout:
        """The layout of a tree with these leaves.

        >>> layout = Layout.of(["stem.weight", "body.0.weight", "body.0.bias"])
        >>> layout.subtrees, layout.places
        (((0, 'stem'), (0, 'body'), (2, '0')), ((1, 'weight'), (3, 'weight'), (3, 'bias')))
        >>> layout.widths
        [2, 1, 1, 2]
        """
        paths = tuple(dict.fromkeys(paths))
        numbers: dict[tuple[int, str], int] = {}
        places = []
        for path in paths:
            *parents, leaf = path.split(".")
            subtree = 0
            for key in parents:
                subtree = numbers.setdefault((subtree, key), len(numbers) + 1)
            places.append((subtree, leaf))
        widths = [0] * (len(numbers) + 1)
        for subtree, _ in (*numbers, *places):
            widths[subtree] += 1
        return cls(paths, tuple(numbers), tuple(places), widths)

    def walk(self, tree: Params) -> list[Params]:
        """The subtrees of a tree, by their numbers."""
        subtrees: list[Any] = [tree]
        for parent, key in self.subtrees:
            subtrees.append(subtrees[parent][key])
        return subtrees

    def leaves(self, subtrees: list[Params]) -> list[Tensor]:
        """The leaves that lie in these subtrees, in the order of ``paths``."""
        return [subtrees[subtree][key] for subtree, key in self.places]

    def complete(self, subtrees: list[Params]) -> bool:
        """Whether these are dicts that hold what the network needs, and nothing else."""
        return [*map(len, subtrees)] == self.widths and all(
            issubclass(kind, Mapping) for kind in {*map(type, subtrees)}
        )
