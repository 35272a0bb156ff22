"""The matrices of experts, by least squares: a mixture's sum is linear in all of them at once.

Here two of three experts are chosen at each of two positions; ``h`` is what an expert's last matrix ``W`` multiplies,
``w`` the router's weight::

    y[0] = w[0, 0] W0 h[0, 0] + w[0, 1] W2 h[0, 1]       y = A W      A[0] = [w h, 0, w h]     W = [W0]
    y[1] = w[1, 0] W1 h[1, 0] + w[1, 1] W2 h[1, 1]                    A[1] = [0, w h, w h]         [W1]
                                                                                                   [W2]

When experts leave, the router chooses others, and these learn to make up for them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from taylorfx.coupling.mixtures import Mixture, mixtures
from taylorfx.cutting.plan import Plan
from taylorfx.distributed import placed, whole
from taylorfx.distributed import sharing as gathering
from taylorfx.layers.roles import Experts
from taylorfx.network.spec import Node, Spec
from taylorfx.repair.positions import counting
from taylorfx.repair.regression import Halves
from taylorfx.repair.runs import Pair
from taylorfx.tree import Params, flatten, merge

__all__ = ["narrowed", "solved", "summed", "weighted"]

ENTRIES = 2**22
"""How many entries of ``A`` are summed at once; or a quarter of a square of its columns, if more."""


def weighted(plan: Plan) -> Iterator[Mixture]:
    """The mixtures that stay and whose sums are linear in matrices that no other layer has."""
    spec = plan.coupling.spec
    for mixture in mixtures(plan.coupling):
        node, role = mixture.experts, mixture.role
        solvable = mixture.weights is not None and role.slot is not None and node.name in plan.spec.by_name
        if solvable and len(spec.owners[node.path(role.weight)]) == 1:
            yield mixture


def narrowed(plan: Plan) -> set[str]:
    """The layers of experts that lose experts, or channels."""
    experts = (node for node in plan.coupling.spec if node.layer.role(Experts) and node.name in plan.spec.by_name)
    return {node.name for node in experts if node.shapes != plan.spec[node.name].shapes}


def summed(
    params: Params, plan: Plan, small: Params, spec: Spec, mixture: Mixture, runs: Sequence[Pair]
) -> Halves:  # fmt: skip
    """The rows ``A`` and ``y`` of all batches: of the small network, and what the original mixture sums to."""
    node, original, sums = spec[mixture.experts.name], plan.coupling.spec, Halves()
    assert mixture.product is not None
    assert mixture.weights is not None
    path, axis = node.path(mixture.role.weight), 2 if mixture.role.transposed else 1
    writes = torch.from_numpy(plan.alive[plan.coupling.parameters[path][axis]])
    with gathering({"before": params, "after": small}) as trees:
        for before, after, mask in runs:
            inputs = {x: after.value(trees["after"], spec, x) for x in spec.by_name if x in node.inputs}
            weights = after.ahead(trees["after"], spec, mixture.weights)
            products = before.ahead(trees["before"], original, mixture.product)
            sums = _taken(sums, node, [inputs[x] for x in node.inputs], weights, products, writes, mask)
    return sums


def _taken(
    sums: Halves, node: Node, inputs: Sequence[Tensor], weights: Tensor, products: Tensor, writes: Tensor,
    mask: Tensor | None,
) -> Halves:  # fmt: skip
    """The sums with the rows of a batch, some of them at a time, as most entries of ``A`` are zeros."""
    role = node.layer.role(Experts)
    assert role is not None
    assert role.slot is not None
    numbers = role.numbers(*inputs)
    counted = counting(mask, numbers.shape[:-1])
    rows = slice(None) if counted is None else counted
    y = products.reshape(*numbers.shape, -1).sum(-2).flatten(0, -2)[rows][:, writes.to(products.device)]
    x = (inputs[role.slot] * weights.reshape(*numbers.shape, 1)).flatten(0, -3)[rows]
    numbers = numbers.flatten(0, -2)[rows]
    experts, width, _ = role.matrices(x.new_empty(node.shapes[role.weight], device="meta")).shape
    k, half = experts * width, len(y) // 2
    step = max(1, max(ENTRIES, k * k // 4) // k)
    for part, chosen, targets in zip(*(torch.split(each, step) for each in (x, numbers, y)), strict=True):
        a = _spread(part, chosen, experts)
        sums = sums.take(a[:, None], targets[:, None], min(max(half, 0), len(a)))
        half -= len(a)
    return sums


def _spread(x: Tensor, numbers: Tensor, experts: int) -> Tensor:
    """Rows ``(n, K, i)`` at the columns of their experts, ``(n, experts * i)``; a number of -1 is no expert's."""
    a = x.new_zeros(len(x), experts, x.shape[-1])
    places = torch.arange(len(x), device=x.device)[:, None], numbers.clamp(min=0)
    return a.index_put_(places, x * (numbers >= 0).unsqueeze(-1), accumulate=True).flatten(1)


def solved(params: Params, spec: Spec, mixture: Mixture, sums: Halves, ridge: float | None) -> Params:
    """The network with the matrices of all experts of a mixture as the regression has them."""
    role, path, leaves = mixture.role, spec[mixture.experts.name].path(mixture.role.weight), flatten(params)
    weight = whole(leaves[path].detach())
    matrices = role.matrices(weight)
    start = matrices.flatten(0, 1).double()[None]
    chosen = sums.ridge(start, intercept=False) if ridge is None else ridge
    new = sums.whole.solve(start, chosen, intercept=False)[0][0].reshape(matrices.shape)
    return merge(params, {path: placed(role.matrices(new).contiguous().to(weight), leaves[path])})
