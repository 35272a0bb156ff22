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
- of ``(x + attention(x)) + mlp(x)`` both are branches: the second depends on the skip of the first sum. Of
  ``x + (attention(x) + mlp(x))`` there is one, both together: without either the inner sum would have no value;
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

import numpy as np

from taylorfx.coupling.naming import branch_name
from taylorfx.coupling.presence import Branch, Presence
from taylorfx.coupling.units import Coupling, Place
from taylorfx.layers.roles import Sum
from taylorfx.network.labels import examples
from taylorfx.network.spec import Spec

__all__ = ["with_branches"]


def with_branches(coupling: Coupling) -> Coupling:
    """The same units, and after them every residual branch of the network, in the order of their sums."""
    spec, first = coupling.spec, len(coupling)
    found = [(branch, paths) for branch in _sums(coupling) if (paths := _parameters(spec, branch))]
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


def _sums(coupling: Coupling) -> Iterator[Branch]:
    """The sums of two operands of which one is computed from the other, or from its skip, with the slot of that one."""
    spec, bounds = coupling.spec, coupling.bounds
    skips: dict[str, str] = {}

    def stream(x: str) -> Iterator[str]:
        """A value, and those to which the branches on its way were added."""
        yield x
        while x in skips:
            yield (x := skips[x])

    for node in spec.nodes:
        if node.layer.role(Sum) is None or len(node.inputs) != 2 or node.inputs[0] == node.inputs[1]:
            continue
        alike = all(bounds[x].shape == bounds[node.name].shape for x in node.inputs)
        if not alike or any(examples(bounds[x].output) is None for x in node.inputs):
            continue
        others = node.inputs[::-1]
        direct = [k for k, x in enumerate(node.inputs) if others[k] in spec.upstream([x])]
        parallel = [k for k, x in enumerate(node.inputs) if not spec.upstream([x]).isdisjoint(stream(others[k]))]
        for slot in direct or parallel[: len(parallel) == 1]:
            skips[node.name] = others[slot]
            yield Branch(0, node.name, slot)


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


def _names(spec: Spec, found: Sequence[tuple[Branch, Sequence[str]]]) -> list[str]:
    """The names of the scopes of branches, all different: the path that the matrices of each have in common."""
    seen: Counter[str] = Counter()
    names = []
    for branch, paths in found:
        name = branch_name([path for path in paths if len(spec.shapes[path]) > 1] or paths, branch.node)
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names
