"""Parameter trees: nested dicts of tensors, a ``state_dict`` split at its dots.

Leaves may be anything; the functions here never look at them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Params", "Tree", "combine", "flatten", "map_paths", "merge", "restrict", "unflatten"]

Params: TypeAlias = Mapping[str, Any]
"""Nested mappings whose leaves are tensors: ``{"conv1": {"weight": ..., "bias": ...}, "bn1": {...}}``."""

Tree: TypeAlias = dict[str, Any]
"""The same as nested dicts, which a function here built and the caller owns."""


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    """The leaves by dotted path, in the order of the tree.

    >>> flatten({"conv1": {"weight": 1, "bias": 2}})
    {'conv1.weight': 1, 'conv1.bias': 2}
    """
    leaves: Tree = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            leaves.update(flatten(value, f"{path}."))
        else:
            leaves[path] = value
    return leaves


def unflatten(leaves: Mapping[str, object] | Iterable[tuple[str, object]]) -> Tree:
    """The tree with these leaves, given by dotted path, as in a ``state_dict``.

    >>> unflatten({"conv1.weight": 1, "conv1.bias": 2})
    {'conv1': {'weight': 1, 'bias': 2}}

    Raises:
        ValueError: if two leaves have the same path, or if one path continues that of another leaf.
    """
    tree: Tree = {}
    for path, leaf in leaves.items() if isinstance(leaves, Mapping) else leaves:
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"Every leaf of a tree has a path of its own; {path!r} lies below another one.")
        if last in node:
            raise ValueError(f"Every leaf of a tree has a path of its own; {path!r} is there already.")
        node[last] = leaf
    return tree


def restrict(tree: Params, paths: Iterable[str]) -> Tree:
    """The tree of some of the leaves, in the order of ``paths``.

    >>> restrict({"conv1": {"weight": 1, "bias": 2}, "fc": {"weight": 3}}, ["fc.weight"])
    {'fc': {'weight': 3}}
    """
    leaves = flatten(tree)
    return unflatten((path, leaves[path]) for path in paths)


def combine(*trees: Params) -> Tree:
    """One tree from several that have no leaf in common.

    >>> combine({"bn": {"weight": 1}}, {"bn": {"running_mean": 2}})
    {'bn': {'weight': 1, 'running_mean': 2}}

    Raises:
        ValueError: if two trees have a leaf at the same path, or one has a leaf where another has a subtree.
    """
    return unflatten(item for tree in trees for item in flatten(tree).items())


def merge(tree: Params, leaves: Mapping[str, Tensor]) -> Params:
    """The tree with some leaves replaced, given by path. Subtrees without a new leaf are shared, not copied.

    >>> merge({"conv1": {"weight": 1, "bias": 2}}, {"conv1.bias": 3})
    {'conv1': {'weight': 1, 'bias': 3}}
    """
    return _merged(tree, unflatten(leaves)) if leaves else tree


def _merged(tree: Params, new: Params) -> Params:
    return {
        key: value if key not in new else _merged(value, new[key]) if isinstance(value, Mapping) else new[key]
        for key, value in tree.items()
    }


def map_paths(function: Callable[[str, Any], object], tree: Params, prefix: str = "") -> Params:
    """The tree with ``function(path, leaf)`` for every leaf. A subtree in which nothing changes is returned as it is.

    >>> map_paths(lambda path, leaf: f"{leaf} at {path}", {"conv1": {"weight": 1}})
    {'conv1': {'weight': '1 at conv1.weight'}}
    """
    result: Tree = {}
    same = True
    for key, value in tree.items():
        path = f"{prefix}{key}"
        new = map_paths(function, value, f"{path}.") if isinstance(value, Mapping) else function(path, value)
        same = same and new is value
        result[key] = new
    return tree if same else result
