"""Reasons: which operators freeze the largest shares of a network, for errors about budgets that cannot be met."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np

from taylorfx.coupling.causes import Cause, cause_of
from taylorfx.coupling.units import Coupling
from taylorfx.layers.axes import products

__all__ = ["held"]

SHOWN = 4
"""How many causes, and nodes of each, are named."""


def held(coupling: Coupling, what: str = "parameters") -> str:
    """Tell which operators keep layers at their width, which share of the network these layers are, and what to do.

    A layer counts by its own parameters (or ``"FLOPs"``), times the share of its channels that cannot leave. The text
    is empty if nothing is frozen.

    Args:
        what: ``"FLOPs"``; anything else means parameters.
    """
    shares: dict[Cause, float] = defaultdict(float)
    nodes: dict[Cause, dict[str, None]] = defaultdict(dict)
    frozen = _frozen_shares(coupling, what)
    for scope, reason in coupling.frozen.items():
        cause, name = cause_of(coupling.spec, reason)
        shares[cause] += frozen[scope]
        nodes[cause][name or scope] = None
    if not shares:
        return ""
    largest = sorted(shares, key=shares.__getitem__, reverse=True)[:SHOWN]
    parts = [f"{shares[cause]:.1%} by {_listed(nodes[cause])} ({cause})" for cause in largest]
    more = f", and less by {len(shares) - SHOWN} other reasons" if len(shares) > SHOWN else ""
    counted = "FLOPs" if what == "FLOPs" else "parameters"
    return (
        f"Frozen are layers with {sum(shares.values()):.1%} of the {counted}: {'; '.join(parts)}{more}. "
        f"{_advice(' '.join(coupling.frozen.values()))}"
    )


def _frozen_shares(coupling: Coupling, what: str) -> dict[str, float]:
    """By frozen scope, the share of the network that its layer is, times the share of its channels that cannot leave.

    A layer with several frozen scopes counts for each of them in equal parts.
    """
    weights = _weights(coupling, what)
    whole = sum(weights.values()) or 1
    writers = {scope: coupling.origins[scope] for scope in coupling.frozen}
    scopes = Counter(writers.values())
    return {
        scope: weights.get(writer, 0) * _frozen_part(coupling, scope, writer) / scopes[writer] / whole
        for scope, writer in writers.items()
    }


def _weights(coupling: Coupling, what: str) -> dict[str, float]:
    """What every node counts; a shared parameter counts at the first node that has it."""
    spec, weights = coupling.spec, dict[str, float]()
    if what == "FLOPs":
        return {
            node.name: float(2 * products(node.layer.multiplies, coupling.bounds[node.name].sizes)) for node in spec
        }
    shapes, counted = spec.shapes, set[str]()
    for node in spec:
        paths = {path for leaf, path in node.paths.items() if leaf not in node.layer.buffers} - counted
        weights[node.name] = sum(math.prod(shapes[path]) for path in paths)
        counted |= paths
    return weights


def _frozen_part(coupling: Coupling, scope: str, writer: str) -> float:
    """The share of a scope's channels that cannot leave: the mean over the axes of its writer that have the scope."""
    if scope not in coupling.scopes or writer not in coupling.letters:
        return 1.0
    number = coupling.scopes.index(scope)
    axes = [coupling.axes[k] for k in coupling.letters[writer].values()]
    parts = [float((axis < 0).all(0).mean()) for axis in axes if number in coupling.scope[axis[axis >= 0]]]
    return float(np.mean(parts)) if parts else 1.0


def _listed(names: dict[str, None]) -> str:
    shown = list(names)[:SHOWN]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _advice(reasons: str) -> str:
    """What to do about these reasons."""
    steps = []
    if "has no axis signature" in reasons:
        steps.append(
            "Give an operator without an axis signature a rule (`tfx.interop.rule` for a captured one, `signature` in "
            "a layer of your own)."
        )
    if "is an output of the network" in reasons:
        steps.append("Outputs of the network keep their size: allow a larger budget, or let other layers lose more.")
    if "rigid" in reasons or "cannot" in reasons or "broadcast" in reasons:
        steps.append(
            "Where an operator needs its whole axis, this keeps its size: replace the operator, or allow a larger "
            "budget."
        )
    return " ".join([*steps, "coupling.frozen tells the reason for every layer."])
