"""Parameter trees: nested dicts of tensors, a ``state_dict`` split at its dots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Params", "combine", "flatten", "map_paths", "merge", "unflatten"]

Params: TypeAlias = Mapping[str, Any]
"""Nested mappings whose leaves are tensors: ``{"conv1": {"weight": ..., "bias": ...}, "bn1": {...}}``."""


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    """The leaves by dotted path, in the tree's own order.

    >>> flatten({"conv1": {"weight": 1, "bias": 2}})
    {'conv1.weight': 1, 'conv1.bias': 2}
    """
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            leaves.update(flatten(value, f"{path}."))
        else:
            leaves[path] = value
    return leaves


def unflatten(leaves: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Nested dicts from dotted paths (a ``state_dict``, for one).

    >>> unflatten({"conv1.weight": 1, "conv1.bias": 2})
    {'conv1': {'weight': 1, 'bias': 2}}

    Raises:
        ValueError: if two leaves have one path, or one lies below another.
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items() if isinstance(leaves, Mapping) else leaves:
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"A leaf lies where no other does; {path!r} lies below another one.")
        if last in node:
            raise ValueError(f"A leaf lies where no other does; {path!r} is there already.")
        node[last] = leaf
    return tree


def restrict(tree: Params, paths: Iterable[str]) -> dict[str, Any]:
    """The tree of these leaves alone, in their order.

    >>> restrict({"conv1": {"weight": 1, "bias": 2}, "fc": {"weight": 3}}, ["fc.weight"])
    {'fc': {'weight': 3}}
    """
    leaves = flatten(tree)
    return unflatten((path, leaves[path]) for path in paths)


def combine(*trees: Params) -> dict[str, Any]:
    """One tree from several with no leaf in common."""
    return unflatten(item for tree in trees for item in flatten(tree).items())


def merge(tree: Params, leaves: Mapping[str, Tensor], prefix: str = "") -> Params:
    """The tree with some leaves replaced; subtrees without a change are shared."""
    if not any(path.startswith(prefix) for path in leaves):
        return tree
    paths = {key: f"{prefix}{key}" for key in tree}
    return {
        key: merge(value, leaves, f"{paths[key]}.") if isinstance(value, Mapping) else leaves.get(paths[key], value)
        for key, value in tree.items()
    }


def map_paths(function: Callable[[str, Any], Any], tree: Params, prefix: str = "") -> Params:
    """Apply ``function(path, leaf)`` to every leaf; a subtree in which nothing changes is returned as it is."""
    result: dict[str, Any] = {}
    same = True
    for key, value in tree.items():
        path = f"{prefix}{key}"
        new = map_paths(function, value, f"{path}.") if isinstance(value, Mapping) else function(path, value)
        same = same and new is value
        result[key] = new
    return tree if same else result
