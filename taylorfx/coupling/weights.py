"""Computed weights: the reads of a network that read a weight, not an activation.

A weight may be the result of nodes of its own: a standardized one, a normalized one, one divided by its largest
singular value. The axes of such a weight are tied to those of the activations that it is applied to:

    W -> W / |W| -> convolve(x, W / |W|)      the norm reads the channels of W, the convolution those of x

Silencing a channel of ``x`` leaves the norm as it is; cutting the channel changes the norm. So a read of a weight gets
no gate, and the units along it are inexact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from taylorfx.network.labels import Bound, Labeled, is_example
from taylorfx.network.spec import Spec

__all__ = ["of_weights"]


def of_weights(spec: Spec, bounds: Mapping[str, Bound], units: Callable[[Labeled], set[int]]) -> dict[int, set[int]]:
    """Find the reads of weights: along units that activations have, too, where the weight is applied to them.

    Args:
        bounds: every node's signature, bound to labels.
        units: the units of an axis.

    Returns:
        The units of each such read, by the identity of its `Site`.
    """
    varies = {name: any(map(is_example, bound.output)) for name, bound in bounds.items()}
    reads = (site for bound in bounds.values() for site in bound.reads if site.slot >= 0)
    sites = [(site, spec.by_name[site.node].inputs[site.slot]) for site in reads]
    sites = [(site, source) for site, source in sites if not varies[source]]
    if not sites:
        return {}
    applied = _applied(spec, varies)
    along: dict[str, set[int]] = {}
    for name in set[str]().union(*applied.values()):
        along[name] = set[int]().union(*(units(axis) for axis in bounds[name].letters.values()))
    along_units = [(id(site), units(site.labels), applied[source]) for site, source in sites]
    return {site: read for site, read, names in along_units if read and any(read <= along[name] for name in names)}


def _applied(spec: Spec, varies: Mapping[str, bool]) -> dict[str, set[str]]:
    """For every value that is the same for all examples, the nodes that apply it to activations as their weight.

    w -> norm -> divide -> convolve(x, divide)      w, norm and divide are applied by convolve
    """
    applied: dict[str, set[str]] = {name: set() for name, changes in varies.items() if not changes}
    for node in spec.nodes:
        if node.layer.multiplies and node.inputs and varies[node.inputs[0]]:
            waiting = [x for x in node.inputs[1:] if x in applied]
            waiting += [one.name for path in node.paths.values() for one in spec.owners[path] if one.name in applied]
            while waiting:  # from the weight back to all that it is computed from
                name = waiting.pop()
                if node.name not in applied[name]:
                    applied[name].add(node.name)
                    waiting += [x for x in spec.by_name[name].inputs if x in applied]
    for name, nodes in applied.items():  # a statistic of a weight that is used elsewhere belongs to it as well
        if inputs := spec.by_name[name].inputs:
            nodes |= set.intersection(*(applied.get(x, set()) for x in inputs))
    return applied
