"""What holds a network: the operators that freeze the largest shares of it, for the errors that ask to do something."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict

import numpy as np

from taylorfx.coupling.units import Coupling
from taylorfx.layers.axes import products
from taylorfx.network.spec import Node

__all__ = ["held"]

SHOWN = 4
"""How many groups of operators, and nodes of each, are named."""


def held(coupling: Coupling, what: str = "parameters") -> str:
    """In words: which operators hold layers at their width, the share of the network in these layers, what to do.

    A layer counts by its own parameters (or ``"FLOPs"``), with the share of its channels that cannot leave. Nothing if
    nothing is frozen.

    Args:
        what: ``"FLOPs"``; anything else means parameters.
    """
    weights = _weights(coupling, what)
    whole = sum(weights.values()) or 1
    shares: dict[tuple[str, str], float] = defaultdict(float)
    nodes: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    writers = {scope: _writer(coupling, scope) for scope in coupling.frozen}
    scopes = Counter(writers.values())  # a layer of several scopes is shared out among them
    for scope, reason in coupling.frozen.items():
        key, name = _operator(coupling, reason)
        writer = writers[scope]
        shares[key] += weights.get(writer, 0) * _part(coupling, scope, writer) / scopes[writer] / whole
        nodes[key][name or scope] = None
    if not shares:
        return ""
    largest = sorted(shares, key=shares.__getitem__, reverse=True)[:SHOWN]
    said = [
        f"{shares[key]:.1%} by {_listed(nodes[key])} ({reason})"
        for key, reason in ((key, ": ".join(filter(None, key))) for key in largest)
    ]
    more = f", and less by {len(shares) - SHOWN} other reasons" if len(shares) > SHOWN else ""
    counted = "FLOPs" if what == "FLOPs" else "parameters"
    return (
        f"Frozen are layers with {sum(shares.values()):.1%} of the {counted}: {'; '.join(said)}{more}. "
        f"{_advice(' '.join(coupling.frozen.values()))}"
    )


def _weights(coupling: Coupling, what: str) -> dict[str, float]:
    """What every node counts; shared parameters count at their first owner."""
    spec, weights = coupling.spec, dict[str, float]()
    if what == "FLOPs":
        return {
            node.name: float(2 * products(node.layer.multiplies, coupling.bounds[node.name].sizes)) for node in spec
        }
    shapes, seen = spec.shapes, set[str]()
    for node in spec:
        own = {path for leaf, path in node.paths.items() if leaf not in node.layer.buffers} - seen
        weights[node.name] = sum(math.prod(shapes[path]) for path in own)
        seen |= own
    return weights


def _writer(coupling: Coupling, scope: str) -> str:
    """The node that writes a scope: one of a layer's several scopes adds a letter to its name."""
    return scope if scope in coupling.letters else scope.rpartition(".")[0]


def _part(coupling: Coupling, scope: str, writer: str) -> float:
    """The share of a scope's channels that cannot leave."""
    if scope not in coupling.scopes or writer not in coupling.letters:
        return 1.0
    number = coupling.scopes.index(scope)
    axes = [coupling.axes[k] for k in coupling.letters[writer].values()]
    parts = [float((axis < 0).all(0).mean()) for axis in axes if number in coupling.scope[axis[axis >= 0]]]
    return float(np.mean(parts)) if parts else 1.0


NODE = (r"(\S+): ", r"(\S+) is an output", r".* at (?!a product)(\S+)")
"""Where a reason names a node."""


def _operator(coupling: Coupling, reason: str) -> tuple[tuple[str, str], str]:
    """A reason as its operator and the rest without the name of its node, and that name; like reasons are the same."""
    for pattern in NODE:
        match = re.match(pattern, reason)
        if match and match[1] in coupling.letters:
            return _without(coupling.spec[match[1]], reason), match[1]
    return ("", reason), ""


def _without(node: Node, reason: str) -> tuple[str, str]:
    rest = reason.removeprefix(f"{node.name}: ").removeprefix(f"{node.name} is ").removesuffix(f" at {node.name}")
    rest = rest.replace(f" at {node.name} ", " there ")
    return ("", rest) if rest.startswith(node.layer.title) else (node.layer.title, rest)


def _listed(names: dict[str, None]) -> str:
    shown = list(names)[:SHOWN]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _advice(reasons: str) -> str:
    """What to do, for the reasons that there are."""
    steps = []
    if "has no axis signature" in reasons:
        steps.append(
            "Give an operator without an axis signature a rule (`tfx.interop.rule` for a captured one, `signature` in "
            "a layer of your own)."
        )
    if "is an output of the network" in reasons:
        steps.append("Outputs keep their size: other layers have to make up for them.")
    if "rigid" in reasons or "cannot" in reasons or "broadcast" in reasons:
        steps.append("Where an operator needs its whole axis, take it out of what is pruned, or ask for no less.")
    return " ".join([*steps, "coupling.frozen says it of every layer."])
