"""Reconstruct: let every layer that lost reads compute again what it computed, by least squares, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from taylorfx.cutting.cut import cut
from taylorfx.cutting.plan import Plan
from taylorfx.layers.roles import Mixing
from taylorfx.network.run import Inputs, apply, bind_inputs, fitted
from taylorfx.network.spec import Node, Spec
from taylorfx.progress import LOG, bar
from taylorfx.repair.batches import Batches, inputs_of
from taylorfx.repair.readers import kept_channels, lost, sharing, shifted
from taylorfx.tree import Params, flatten, merge, restrict, unflatten

__all__ = ["LeastSquares", "reconstruct"]


@dataclass(frozen=True)
class LeastSquares:
    """The sums of a linear regression with intercept, in ``g`` groups: additive, so that it streams and distributes.

    Attributes:
        n: the number of rows.
        x, y: their sums, ``(g, k)`` and ``(g, o)``.
        xx, xy: the sums of their products, ``(g, k, k)`` and ``(g, k, o)``.
    """

    n: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor

    @staticmethod
    def of(x: Tensor, y: Tensor) -> LeastSquares:
        """The sums of one batch of rows, ``(rows, g, k)`` and ``(rows, g, o)``, kept in double precision."""
        x, y = x.detach().transpose(0, 1).double(), y.detach().transpose(0, 1).double()
        return LeastSquares(x.shape[1], x.sum(1), y.sum(1), x.mT @ x, x.mT @ y)

    def __add__(self, other: LeastSquares) -> LeastSquares:
        return LeastSquares(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def solve(self, start: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """The weights ``W`` ``(g, k, o)`` and intercepts ``(g, o)`` of the least ``|y - x W - b|^2``, near ``start``.

        Added is ``ridge`` times the mean variance of ``x`` times ``|W - start|^2``. So a large ridge leaves the weights
        alone and moves the intercept only, which is what `compensate` does.
        """
        x, y = self.x / self.n, self.y / self.n
        variance = self.xx / self.n - x[:, :, None] * x[:, None]
        residual = self.xy / self.n - x[:, :, None] * y[:, None] - variance @ start
        spread, size = (m.diagonal(dim1=1, dim2=2).mean(1) for m in (variance, self.xx / self.n))
        least = (1e-12 * size).clamp(min=torch.finfo(size.dtype).tiny)  # or constant inputs are solved for by rounding
        penalty = torch.maximum(ridge * spread, least)[:, None, None] * torch.eye(x.shape[1]).to(x)
        weights = start + torch.linalg.solve(variance + penalty, residual)
        return weights, y - (x[:, None] @ weights)[:, 0]


def reconstruct(
    params: Params,
    plan: Plan,
    batches: Batches,
    *,
    ridge: float = 1e-2,
    total: Callable[[LeastSquares], LeastSquares] | None = None,
    progress: bool = False,
) -> tuple[Params, Spec]:
    """Cut, and choose the kept weights and biases so that every layer again computes what the original layer computed.

    Layer after layer: the targets are the original network's, the inputs those of the smaller network as repaired so
    far, so that each layer also makes up for what the layers before it could not (He et al. 2017, arXiv 1707.06168; a
    convolution reads unfolded windows). The solution is closed (`LeastSquares`), batches are only summed over. Both
    networks run once, side by side, from layer to layer. Held are, for all batches, the activations that layers ahead
    consume, and, one after the other, a batch's windows and a layer's ``(channels * window)^2`` products of inputs in
    double precision.

    Layers that share their weight share the solution (both networks are run anew for them); a weight that an
    `Embedding` uses, too, stays as it is.

    Args:
        params: the original parameters.
        batches: ``(inputs, targets)``, or an iterable of such; the targets are not looked at.
        ridge: how strongly weights are held where they were, in units of the mean variance of what is read; above 0.
        total: adds up the sums of several processes that each have batches of their own (`distributed.total`).
        progress: draw a progress bar over the layers (needs rich).

    Returns:
        Parameters and spec of the smaller network.

    Raises:
        ValueError: for no batches or a ridge that is not above 0.
        ImportError: if a progress bar is asked for without rich.
    """
    if not ridge > 0:
        raise ValueError(
            f"A ridge is above 0, as dead inputs would leave their weights undetermined; received {ridge}."
        )
    batch_inputs = list(inputs_of(batches))
    original, small, spec = plan.coupling.spec, cut(params, plan), plan.spec
    losers = lost(plan) | {branch.node for branch in plan.coupling.branches if not plan.keep[branch.unit]}
    old, new = ([_Run(network, inputs) for inputs in batch_inputs] for network in (original, spec))
    shared = [([node.name for node, _ in group], group) for group in sharing(original, "weight", spec)]
    mended = [(names, x) for names, x in shared if _joint(spec, x) and losers & original.upstream(names)]
    with bar(progress, "reconstruct", len(mended)) as advance:
        for names, group in mended:
            sums: LeastSquares | None = None
            for inputs, before, after in zip(batch_inputs, old, new, strict=True):
                if len(names) > 1:  # later places consume what is not solved yet, which must not stay
                    before, after = _Run(original, inputs), _Run(spec, inputs)
                for node, role in group:
                    x = after.value(small, spec, spec[node.name].inputs[0])
                    y = before.value(params, original, node.name)
                    part = _rows(plan, spec[node.name], node, role, x, y)
                    sums = part if sums is None else sums + part
            assert sums is not None
            small, spec = _solved(small, spec, names, sums if total is None else total(sums), ridge)
            LOG.info("reconstruct: %s", ", ".join(names))
            advance(1)
    return small, spec


def _rows(plan: Plan, small: Node, node: Node, role: Mixing, x: Tensor, y: Tensor) -> LeastSquares:
    """The sums of a batch: windows of what the small layer consumes, rows of what stays of the original's output."""
    smaller = small.layer.role(Mixing)
    assert smaller is not None
    writes, axis = kept_channels(plan, node, role)[1], role.axis
    y = y.movedim(axis, 0)[writes.to(y.device)].movedim(0, axis)
    return LeastSquares.of(smaller.windows(x), smaller.rows(y))


def _solved(params: Params, spec: Spec, names: Sequence[str], sums: LeastSquares, ridge: float) -> tuple[Params, Spec]:
    """The network with the weight and the bias that these nodes share as the regression has them."""
    node, leaves = spec[names[0]], flatten(params)
    role = node.layer.role(Mixing)
    assert role is not None
    path = node.path(role.weight)
    matrix, bias = sums.solve(role.matrix(leaves[path].detach()).double(), ridge)
    past = leaves[node.path(role.bias)].detach() if role.has_bias else 0.0
    params = merge(params, {path: role.as_weight(matrix, leaves[path])})
    return shifted(params, spec, names, bias.flatten() - past)


class _Run:
    """A network on one batch, as far as it has been asked for; what no later node consumes is not kept."""

    def __init__(self, spec: Spec, inputs: Inputs) -> None:
        self.inputs = inputs
        self.values: dict[str, Tensor] = bind_inputs(spec, (inputs,))
        self.done = 0

    def value(self, params: Params, spec: Spec, name: str) -> Tensor:
        """What a node gives out, without derivatives; nodes are asked for in their order."""
        place = [*spec.by_name].index(name) + 1
        if place > self.done:
            names = [node.name for node in spec.nodes[self.done : place]]
            later = {name, *(x for node in spec.nodes[place:] for x in node.inputs)}
            wanted = [x for x in names if x in later]
            part = fitted(spec, self.inputs).part(names, wanted, keys=wanted)
            leaves = restrict(params, part.shapes)
            detached = unflatten((path, leaf.detach()) for path, leaf in flatten(leaves).items())
            new = apply(detached, part, {x: self.values[x] for x in part.input_layers})
            self.values = {x: value for x, value in self.values.items() if x in later} | new
            self.done = place
        return self.values[name]


def _joint(spec: Spec, group: Sequence[tuple[Node, Mixing]]) -> bool:
    """Layers of a group are one layer at several places, and nothing else uses their weight."""
    node, role = group[0]
    used = [owner.name for owner in spec.owners[node.path(role.weight)]]
    kinds = {(type(node.layer), role.has_bias, node.path(role.bias)) for node, role in group}
    return used == [node.name for node, _ in group] and len(kinds) == 1
