"""Weights that are computed: which reads look at a weight rather than at what it is applied to.

A weight may be the result of nodes of its own: a standardized one, a normalized one, one divided by its largest
singular value. Where it meets activations it carries their units, and its statistics read along those axes:

    W -> W / |W| -> convolve(x, W / |W|)      the norm reads the channels of W, the convolution those of x

Silencing a channel is silencing what the convolution reads; the statistic stays as it is. So no gate lies at such a
read, and a unit that has one is inexact: when it leaves, the statistic changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from taylorfx.network.labels import Bound, Labeled, is_example
from taylorfx.network.spec import Spec

__all__ = ["of_weights"]


def of_weights(spec: Spec, bounds: Mapping[str, Bound], units: Callable[[Labeled], set[int]]) -> dict[int, set[int]]:
    """The reads that look at a weight along axes whose units activations carry where the weight meets them.

    Args:
        bounds: every node's signature, bound to labels.
        units: the units of an axis.

    Returns:
        The units of each such read, by the identity of its `Site`.
    """
    nodes = {node.name: node for node in spec.nodes}
    varies = {name: any(map(is_example, bound.output)) for name, bound in bounds.items()}
    sites = [(site, nodes[site.node].inputs[site.slot]) for bound in bounds.values() for site in bound.reads]
    sites = [(site, source) for site, source in sites if not varies[source]]
    if not sites:
        return {}
    meets = _meets(spec, varies)
    carried: dict[str, set[int]] = {}
    for name in set[str]().union(*meets.values()):
        carried[name] = set[int]().union(*(units(axis) for axis in bounds[name].letters.values()))
    read = [(id(site), units(site.labels), meets[source]) for site, source in sites]
    return {site: found for site, found, met in read if found and any(found <= carried[name] for name in met)}


def _meets(spec: Spec, varies: Mapping[str, bool]) -> dict[str, set[str]]:
    """For every value that is the same for all examples, the nodes in which it meets activations as their weight."""
    nodes, holders = {node.name: node for node in spec.nodes}, dict[str, list[str]]()
    for node in spec.nodes:
        for path in node.paths.values():
            holders.setdefault(path, []).append(node.name)
    meets: dict[str, set[str]] = {name: set() for name, changes in varies.items() if not changes}
    for node in spec.nodes:
        if node.layer.multiplies and node.inputs and varies[node.inputs[0]]:
            waiting = [x for x in node.inputs[1:] if x in meets]
            waiting += [x for path in node.paths.values() for x in holders[path] if x in meets]
            while waiting:
                name = waiting.pop()
                if node.name not in meets[name]:
                    meets[name].add(node.name)
                    waiting += nodes[name].inputs
    for name, found in meets.items():  # what is computed from a weight alone is of it, too
        if nodes[name].inputs:
            found |= set.intersection(*(meets.get(x, set()) for x in nodes[name].inputs))
    return meets
