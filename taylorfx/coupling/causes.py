"""Causes: what freezes layers. Like reasons at several nodes have one cause."""

from __future__ import annotations

import re
from typing import NamedTuple

from taylorfx.network.spec import Node, Spec

__all__ = ["Cause", "cause_of"]

NODE = (r"(\S+): ", r"(\S+) is an output", r".* at (?!a product)(\S+)")
"""Where a reason names a node."""


class Cause(NamedTuple):
    """A reason without the node that it names: the kind of the node's layer, unless the rule begins with it."""

    operator: str
    rule: str

    def __str__(self) -> str:
        return ": ".join(filter(None, self))


def cause_of(spec: Spec, reason: str) -> tuple[Cause, str]:
    """The cause of a reason, and the node that the reason names (empty where it names none).

    >>> from taylorfx import Input, serial
    >>> from taylorfx.layers import Softmax
    >>> cause_of(serial(Input((4,)), mix=Softmax(1)), "mix: Softmax holds input 0, axis 1 rigid")
    (Cause(operator='', rule='Softmax holds input 0, axis 1 rigid'), 'mix')
    """
    for pattern in NODE:
        match = re.match(pattern, reason)
        if match and match[1] in spec.by_name:
            return _without(spec[match[1]], reason), match[1]
    return Cause("", reason), ""


def _without(node: Node, reason: str) -> Cause:
    """A reason without the name of its node."""
    rule = reason.removeprefix(f"{node.name}: ").removeprefix(f"{node.name} is ").removesuffix(f" at {node.name}")
    rule = rule.replace(f" at {node.name} ", " there ")
    return Cause("" if rule.startswith(node.layer.title) else node.layer.title, rule)
