"""Reconstruct: let every layer that lost reads compute again what it computed, by least squares, without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from taylorfx.coupling.mixtures import Mixture
from taylorfx.cutting.cut import cut
from taylorfx.cutting.plan import Plan
from taylorfx.distributed import Total, agreed, alone, placed, refuse_alone, whole
from taylorfx.distributed import sharing as gathering
from taylorfx.layers.roles import Mixing
from taylorfx.network.run import Inputs
from taylorfx.network.spec import Node, Spec
from taylorfx.progress import LOG, bar
from taylorfx.repair.batches import Batches, inputs_of, refuse_none, told
from taylorfx.repair.experts import narrowed, solved, summed, weighted
from taylorfx.repair.positions import Positions, counting, mask_of
from taylorfx.repair.readers import kept_channels, lost, sharing, shifted, takes_shift
from taylorfx.repair.regression import Halves
from taylorfx.repair.runs import Pair, Run
from taylorfx.tree import Params, flatten, merge

__all__ = ["reconstruct"]

WINDOWS = 2**22
"""How many numbers the windows that are summed at once may have; or a quarter of a square of inputs, if more."""


def reconstruct(
    params: Params,
    plan: Plan,
    batches: Batches,
    *,
    ridge: float | None = None,
    biases: bool = True,
    positions: Positions | None = None,
    total: Total | None = None,
    progress: bool = False,
) -> tuple[Params, Spec]:
    """Cut, and choose the kept weights and biases so that every layer again computes what the original layer computed.

    Layer after layer: the targets are the original network's, the inputs those of the smaller network as repaired so
    far, so that each layer also makes up for what the layers before it could not (He et al. 2017, arXiv 1707.06168; a
    convolution reads unfolded windows). The solution is closed (`LeastSquares`), batches are only summed over. Both
    networks run once, side by side, from layer to layer. Held are, for all batches, the activations that layers ahead
    consume. Of one layer at a time, with ``k = channels * window`` inputs, there are in double precision some copies of
    its weight and either all rows, where they are at most ``k / 2``, or at most two squares ``(k, k)``.

    The last matrices of a mixture's experts are solved for together, so that the sum over the experts that the router
    now chooses is what it was: those that stay make up for those that left. Its ``k`` is experts times inputs. Experts
    that have biases, or whose outputs are not just weighted and summed, stay as they are.

    Layers that share their weight share the solution (both networks are run anew for them); a weight that an
    `Embedding` uses, too, stays as it is.

    Args:
        params: the original parameters.
        batches: ``(inputs, targets)``, or an iterable of such; the targets are not looked at.
        ridge: how strongly weights are held where they were, in units of the mean variance of what is read; above 0. By
            default chosen for every layer (of 0.001 to 10): half of the rows of each batch are solved for, and the
            ridge with the least error on the others is taken. Few examples, or ones that say little of a layer, then
            leave its weights about where they were.
        biases: let layers gain a bias. Without, a layer that has none, and no batch norm that takes up a shift, is
            solved for its weights alone: a class whose layers have no biases, as a Llama, then holds the result.
        positions: a function of the inputs that gives a mask ``(N, T)`` of the positions that count, as padding does
            not: ``lambda inputs: inputs["attention_mask"]``. It chooses among the rows of layers whose outputs have
            these axes first (or the channels in between), or both as one; of others (pooled) all count.
        total: adds up the sums of several processes that each have batches of their own (`distributed.total`).
        progress: draw a progress bar over the layers (needs rich).

    Returns:
        Parameters and spec of the smaller network.

    Raises:
        ValueError: for no batches, no positions that count, or a ridge that is not above 0.
        ImportError: if a progress bar is asked for without rich.
    """
    if ridge is not None and not ridge > 0:
        raise ValueError(
            f"A ridge is above 0, as dead inputs would leave their weights undetermined; received {ridge}."
        )
    if total is None:
        refuse_alone(params)
    inputs = agreed(total, lambda: _masked(batches, positions), lambda _: told(params, plan))
    original, small, spec = plan.coupling.spec, cut(params, plan), plan.spec
    runs = [(Run(original, x), Run(spec, x), mask) for x, mask in inputs]
    mended = _mended(plan)
    with bar(progress, "reconstruct", len(mended)) as advance:
        for names, layers in mended:
            rows: Callable[..., Halves] = summed if isinstance(layers, Mixture) else _summed
            sums = (total or alone)(partial(rows, params, plan, small, spec, layers, runs))
            refuse_none(sums.n)
            if isinstance(layers, Mixture):
                small = solved(small, spec, layers, sums, ridge)
            else:
                small, spec = _solved(small, spec, names, sums, ridge, biases or takes_shift(spec, names))
            LOG.info("reconstruct: %s", ", ".join(names))
            advance(1)
    return small, spec


def _mended(plan: Plan) -> list[tuple[list[str], Sequence[tuple[Node, Mixing]] | Mixture]]:
    """The layers that are solved for, in order, by the names of their nodes: those that lose inputs, and all behind."""
    original, spec = plan.coupling.spec, plan.spec
    losers = lost(plan) | narrowed(plan)
    losers |= {branch.node for branch in plan.coupling.branches if not plan.keep[branch.unit]}
    solvable: list[tuple[list[str], Sequence[tuple[Node, Mixing]] | Mixture]] = [
        *(([node.name for node, _ in x], x) for x in sharing(original, "weight", spec) if _joint(spec, x)),
        *(([mixture.experts.name], mixture) for mixture in weighted(plan)),
    ]
    places = {name: k for k, name in enumerate(original.by_name)}
    mended = [(names, layers) for names, layers in solvable if losers & original.upstream(names)]
    return sorted(mended, key=lambda x: places[x[0][0]])


def _masked(batches: Batches, positions: Positions | None) -> list[tuple[Inputs, Tensor | None]]:
    """The inputs of every batch, and which of their positions count."""
    return [(inputs, mask_of(positions, inputs)) for inputs in inputs_of(batches)]


def _summed(
    params: Params, plan: Plan, small: Params, spec: Spec, group: Sequence[tuple[Node, Mixing]], runs: Sequence[Pair]
) -> Halves:
    """The rows of all batches: what layers of the small network consume, what those of the original give out."""
    original, sums = plan.coupling.spec, Halves()
    with gathering({"before": params, "after": small}) as trees:
        for before, after, mask in runs:
            if len(group) > 1:  # later places consume what is not solved yet, which must not stay
                before, after = Run(original, before.inputs), Run(spec, after.inputs)
            for node, role in group:
                x = after.value(trees["after"], spec, spec[node.name].inputs[0])
                y = before.value(trees["before"], original, node.name)
                writes = kept_channels(plan, node, role)[1]
                y = y.movedim(role.axis, 0)[writes.to(y.device)].movedim(0, role.axis)
                sums = _taken(sums, spec[node.name], x, y, mask)
    return sums


def _taken(sums: Halves, node: Node, x: Tensor, y: Tensor, mask: Tensor | None) -> Halves:
    """The sums with the rows of a batch: windows of what a small layer consumes, and what it should give out.

    A few examples at a time, as the windows of all of them may take more memory than the sums.
    """
    role = node.layer.role(Mixing)
    assert role is not None
    targets = role.rows(y)
    chosen = counting(mask, y.movedim(role.axis, -1).shape[:-1])
    half = (len(targets) if chosen is None else int(chosen.sum())) // 2
    count, (g, o) = len(targets) // len(y), targets.shape[1:]
    k = math.prod(node.layer.shapes()[role.weight]) // (g * o)
    step = max(1, max(WINDOWS, g * k * k // 4) // (count * g * k)) if len(x) == len(y) else len(y)
    for first in range(0, len(y), step):
        part = slice(first * count, (first + step) * count)
        rows = role.windows(x[first : first + step] if step < len(y) else x), targets[part]
        if chosen is not None:
            rows = rows[0][chosen[part]], rows[1][chosen[part]]
        sums = sums.take(*rows, min(max(half, 0), len(rows[0])))
        half -= len(rows[0])
    return sums


def _solved(
    params: Params, spec: Spec, names: Sequence[str], sums: Halves, ridge: float | None, intercept: bool
) -> tuple[Params, Spec]:
    """The network with the weight and the bias that these nodes share as the regression has them."""
    node, leaves = spec[names[0]], flatten(params)
    role = node.layer.role(Mixing)
    assert role is not None
    path = node.path(role.weight)
    weight = whole(leaves[path].detach())
    start = role.matrix(weight).double()
    chosen = sums.ridge(start, intercept=intercept) if ridge is None else ridge
    matrix, bias = sums.whole.solve(start, chosen, intercept=intercept)
    past = whole(leaves[node.path(role.bias)].detach()) if role.has_bias else 0.0
    params = merge(params, {path: placed(role.as_weight(matrix, weight), leaves[path])})
    if not intercept:
        return params, spec
    return shifted(params, spec, names, bias.flatten() - past)


def _joint(spec: Spec, group: Sequence[tuple[Node, Mixing]]) -> bool:
    """Layers of a group are one layer at several places, and nothing else uses their weight."""
    node, role = group[0]
    used = [owner.name for owner in spec.owners[node.path(role.weight)]]
    kinds = {(type(node.layer), role.has_bias, node.path(role.bias)) for node, role in group}
    return used == [node.name for node, _ in group] and len(kinds) == 1
