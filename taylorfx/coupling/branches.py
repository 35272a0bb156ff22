"""Branches: residual branches as units, beside the channels.

A residual branch is one operand of a sum of two, computed from the other operand, the skip::

    x ---> norm ---> up ---> gelu ---> down ---> + ---> y          x + mlp(norm(x)), without the branch x
     \\-------------------------------------------/

It is a unit of its own scope, with one gate that multiplies its operand of the sum. A gate of zero is the user's own
module with that operand zeroed, so such units are exact wherever the sum stands, also before a norm (BERT) or an
activation (ResNet). What is a branch:

- the sum has two operands, both of the sum's own shape, and the branch's one depends on the other one. Where neither
  depends on the other, as in a ResNet's block with a convolution on the skip, there is no branch: neither operand is
  the network without the other;
- of ``(x + attention(x)) + mlp(x)`` both are branches: the second depends on the skip of the first sum. So they are of
  ``x + (attention(x) + mlp(x))``, whose inner sum has no skip and is used there alone: without one of them it is the
  other one, and without both it leaves. They are one branch together where one of them has no layers of its own;
- layers with parameters leave with it, which may share them with others (ALBERT). A sum within a formula, as in
  ``x + 0.04 x^3``, is no branch.

Without a branch, the nodes and parameters leave that nothing else uses (`taylorfx.coupling.presence`), and the sum
with them: what consumed it consumes the skip. Units along these nodes alone, the branch's heads and hidden channels and
the branches within it, are units as ever; they leave with the branch (`Coupling.settled`). A node's share of a cost is
multiplied by its presence, so what a branch saves is what it still has, and a unit in a branch that left saves nothing.

Several branches are chosen as one by a constraint: ``uniform=[("*.3.self_attn: branch", "*.3.mlp: branch")]``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from taylorfx.coupling.naming import branch_name
from taylorfx.coupling.presence import Branch, Presence
from taylorfx.coupling.units import Coupling, Place
from taylorfx.layers.roles import Noise, Sum
from taylorfx.network.labels import examples
from taylorfx.network.spec import Node, Spec

__all__ = ["with_branches"]


def with_branches(coupling: Coupling) -> Coupling:
    """The same units, and after them every residual branch of the network, in the order of their sums."""
    spec, first = coupling.spec, len(coupling)
    found = _branches(coupling)
    branches = tuple(branch._replace(unit=first + k) for k, (branch, _) in enumerate(found))
    names = _names(spec, found)
    gates = tuple(_place(coupling, branch) for branch in branches)
    return replace(
        coupling,
        scopes=(*coupling.scopes, *names),
        scope=np.append(coupling.scope, len(coupling.scopes) + np.arange(len(branches))),
        index=np.append(coupling.index, np.zeros(len(branches), np.int64)),
        exact=np.append(coupling.exact, np.ones(len(branches), bool)),
        origins={**coupling.origins, **{name: x.node for name, x in zip(names, branches, strict=True)}},
        reads=(*coupling.reads, *gates),
        writes=(*coupling.writes, *gates),
        branches=branches,
    )


class _Found(NamedTuple):
    """A branch that has no number yet, and the parameters that leave with it alone."""

    branch: Branch
    paths: list[str]


def _branches(coupling: Coupling) -> list[_Found]:
    """All branches; for a sum of branches alone those that it is a sum of, where each has parameters of its own."""
    spec, sums, found = coupling.spec, {node.name: node for node in _sums(coupling)}, list[_Found]()
    skips: dict[str, str] = {}  # by sum, the operand to which the branches are added

    def parts(branch: Branch) -> list[_Found]:
        """The branches of an operand: itself, or those that it is a sum of."""
        paths = _parameters(spec, branch)
        inner = sums.get(_before_noise(spec, branch)) if paths else None  # nothing else uses what leaves with it
        if inner is not None and inner.name not in skips:
            several = [parts(Branch(0, inner.name, slot)) for slot in range(2)]
            if all(several):
                return several[0] + several[1]
        return [_Found(branch, paths)] if paths else []

    def stream(x: str) -> Iterator[str]:
        """A value, and those to which the branches on its way were added."""
        yield x
        while x in skips:
            yield (x := skips[x])

    for node in sums.values():
        others = node.inputs[::-1]
        direct = [k for k, x in enumerate(node.inputs) if others[k] in spec.upstream([x])]
        parallel = [k for k, x in enumerate(node.inputs) if not spec.upstream([x]).isdisjoint(stream(others[k]))]
        for slot in direct or parallel[: len(parallel) == 1]:
            skips[node.name] = others[slot]
            found += parts(Branch(0, node.name, slot))
    return found


def _sums(coupling: Coupling) -> Iterator[Node]:
    """The sums of two operands of the sum's own shape."""
    bounds = coupling.bounds
    for node in coupling.spec.nodes:
        if node.layer.role(Sum) is not None and len(node.inputs) == 2 and node.inputs[0] != node.inputs[1]:
            alike = all(bounds[x].shape == bounds[node.name].shape for x in node.inputs)
            if alike and not any(examples(bounds[x].output) is None for x in node.inputs):
                yield node


def _before_noise(spec: Spec, branch: Branch) -> str:
    """The node that gives out what a branch adds, but for noise."""
    name = spec[branch.node].inputs[branch.slot]
    while spec[name].layer.role(Noise) is not None:
        (name,) = spec[name].inputs
    return name


def _parameters(spec: Spec, branch: Branch) -> list[str]:
    """The paths of the parameters of the nodes that leave with a branch alone, but for running statistics."""
    nodes = [spec[name] for name in Presence.of(spec, (branch,)).nodes]
    return [path for node in nodes for leaf, path in node.paths.items() if leaf not in node.layer.buffers]


def _place(coupling: Coupling, branch: Branch) -> Place:
    """Where the gate of a branch lies: at its operand of the sum, as a whole."""
    bound = coupling.bounds[coupling.spec[branch.node].inputs[branch.slot]]
    return Place(
        branch.node, branch.slot, len(bound.shape) - 1, bound.shape, np.array([[branch.unit]]), examples(bound.output)
    )


def _names(spec: Spec, found: Sequence[_Found]) -> list[str]:
    """The names of the scopes of branches, all different: the path that the matrices of each have in common."""
    seen: Counter[str] = Counter()
    names = []
    for branch, paths in found:
        name = branch_name([path for path in paths if len(spec.shapes[path]) > 1] or paths, branch.node)
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names
