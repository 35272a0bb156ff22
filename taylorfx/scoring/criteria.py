"""Criteria: what a unit is worth. One number per unit, ``(units,)``, higher means keep.

A `Criterion` says how units are scored and what that needs; a plain function of the statistics of gate derivatives
``g`` and the coupling is one by itself:

| criterion | score | source |
| --- | --- | --- |
| `taylor` | ``E|g|`` | Molchanov et al. 2016, arXiv 1611.06440, eq. 8 |
| `taylor_squared` | ``E_batches[(E g)^2]`` | Molchanov et al. 2019, arXiv 1906.10771, eq. 8 |
| `fisher` | ``E[g^2] / 2`` | Theis et al. 2018, arXiv 1801.05787, eq. 8 |
| `signed` | ``-E[g]`` | the first-order change of the loss itself |
| `second_order` | ``-E[g] + E[g^2] / 2`` | the change to second order, with the Fisher for the Hessian |

`prune` and `iterate` take any of them, and measure what it needs.

`taylor` sums over a read's positions, so that scores are comparable across layers; ``spatial_mean=True`` takes the mean
as the paper prints it, which needs the paper's normalizer, `per_layer_l2`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from taylorfx.coupling.units import Coupling
from taylorfx.distributed import sharing, whole
from taylorfx.layers.roles import Normalizing
from taylorfx.network.parameters import check
from taylorfx.scoring.criterion import Criterion
from taylorfx.scoring.experts import reap
from taylorfx.scoring.statistics import Moments, Statistics
from taylorfx.tree import Params, flatten

__all__ = [
    "Criterion", "Normalizer", "activation_mean", "activation_std", "apoz", "batchnorm_scale", "compat",
    "fisher", "per_layer_l2", "per_layer_max", "per_layer_mean", "random", "reap",
    "sampled", "second_order", "signed", "taylor", "taylor_squared", "unnormalized", "weight_l1", "weight_l2",
]  # fmt: skip

Normalizer = Callable[[Tensor, Coupling], Tensor]
"""``normalizer(scores, coupling)``: the scores, ``(units,)``, made comparable across scopes."""


def unnormalized(scores: Tensor, coupling: Coupling) -> Tensor:
    """The scores as they are."""
    return scores


def per_layer_l2(scores: Tensor, coupling: Coupling) -> Tensor:
    """Divided by the L2 norm of their scope's scores (Molchanov et al. 2016, eq. 9)."""
    return _divided(scores, coupling, _per_scope(scores.square(), coupling).sqrt())


def per_layer_mean(scores: Tensor, coupling: Coupling) -> Tensor:
    """Divided by the mean magnitude of their scope's scores."""
    sizes = torch.as_tensor(coupling.sizes, device=scores.device)
    return _divided(scores, coupling, _per_scope(scores.abs(), coupling) / sizes)


def per_layer_max(scores: Tensor, coupling: Coupling) -> Tensor:
    """Divided by the largest magnitude among their scope's scores."""
    scope = torch.as_tensor(coupling.scope, device=scores.device)
    largest = scores.new_zeros(len(coupling.scopes)).scatter_reduce(0, scope, scores.abs(), "amax")
    return _divided(scores, coupling, largest)


def _per_scope(values: Tensor, coupling: Coupling) -> Tensor:
    scope = torch.as_tensor(coupling.scope, device=values.device)
    return values.new_zeros(len(coupling.scopes)).index_add(0, scope, values)


def _divided(scores: Tensor, coupling: Coupling, norms: Tensor) -> Tensor:
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))  # a scope of zeros stays zero
    return scores / norms[torch.as_tensor(coupling.scope, device=scores.device)]


def _own(stats: Statistics, coupling: Coupling) -> None:
    if not isinstance(stats, Statistics):
        raise ValueError(
            f"This criterion is of the statistics that `measure` gives; received {type(stats).__name__}. A function "
            "that calls it is of statistics, too, and not a tfx.criteria.Criterion of weights."
        )
    if stats.units != coupling.names:
        raise ValueError(
            f"Statistics are scored with the coupling that they were measured with; received those of "
            f"{len(stats.sum)} units and another coupling, of {len(coupling)}. Measure again with this one."
        )
    if not stats.n:
        raise ValueError("Statistics of no batch say nothing about any unit. Was the iterator already used up?")


def taylor(
    stats: Statistics, coupling: Coupling, *, spatial_mean: bool = False, normalizer: Normalizer = unnormalized
) -> Tensor:
    """``E|g|``: the mean over examples of the absolute gate derivative (Molchanov et al. 2016, eq. 8)."""
    _own(stats, coupling)
    return normalizer((stats.sum_abs_mean if spatial_mean else stats.sum_abs) / stats.n, coupling)


def taylor_squared(stats: Statistics, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """``E_batches[(E g)^2]``: the squared derivative of each minibatch's mean loss (Molchanov et al. 2019, eq. 8).

    Squared per example instead, it is twice the `fisher`.
    """
    _own(stats, coupling)
    return normalizer(stats.sum_batch_sq / stats.batches, coupling)


def fisher(stats: Statistics, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """``E[g^2] / 2``: the loss change if the network is at a minimum (Theis et al. 2018, eq. 8)."""
    _own(stats, coupling)
    return normalizer(stats.sum_sq / (2 * stats.n), coupling)


def sampled(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Labels for `cross_entropy`, drawn from the distributions that a network's scores are: ``(N, ...)``.

    ::

        batches = [(x, sampled(tfx.apply(params, spec, x), generator)) for x, _ in batches]

    Measured with these, `fisher` estimates half the diagonal of the network's Fisher information, and `joint` takes its
    Gram matrix for the curvature; with given labels it is the "empirical" one (Kunstner et al. 2019, arXiv 1905.12558).
    No labels are needed, and derivatives do not vanish where all examples are classified well.

    Args:
        scores: ``(N, classes, ...)``, as `cross_entropy` takes them.

    >>> sampled(torch.tensor([[0.0, 99.0], [99.0, 0.0]]), torch.Generator().manual_seed(0))
    tensor([1, 0])
    """
    probabilities = scores.detach().movedim(1, -1).softmax(-1)
    drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return drawn.reshape(probabilities.shape[:-1])


def signed(stats: Statistics, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """``-E[g]``: the first-order change of the loss; units whose removal would lower it come out negative."""
    _own(stats, coupling)
    return normalizer(-stats.sum / stats.n, coupling)


def second_order(stats: Statistics, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """``-E[g] + E[g^2] / 2``: the change of the loss to second order, the Hessian approximated by the Fisher."""
    _own(stats, coupling)
    return normalizer(-stats.sum / stats.n + stats.sum_sq / (2 * stats.n), coupling)


@partial(Criterion, at_writes=True, training=True)
def compat(stats: Statistics, coupling: Coupling) -> Tensor:
    """The arithmetic of the original PyTorch implementation, for the record.

    Sums over the batch and space first, takes the absolute value after, and divides by the scope's L2 norm. Measure
    with ``measure(..., at_writes=True, training=True)``, as `prune` does: at the convolutions' outputs, in training
    mode. Behind such an output a batch norm ignores the scale, so that the sum is zero but for rounding: see the
    README.
    """
    _own(stats, coupling)
    return per_layer_l2(stats.sum_batch_abs, coupling)


def _moments(stats: Statistics, coupling: Coupling) -> Moments:
    _own(stats, coupling)
    if stats.moments is None:
        raise ValueError(
            "This criterion looks at activations, of which the statistics say nothing; measure(..., moments=True). A "
            "function of your own that looks at them says so to `prune`: tfx.criteria.Criterion(function, "
            "moments=True)."
        )
    return stats.moments


@partial(Criterion, moments=True)
def activation_mean(stats: Statistics, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """The mean activation at the reads."""
    moments = _moments(stats, coupling)
    return normalizer(moments.sum / moments.count.clamp(min=1), coupling)


@partial(Criterion, moments=True)
def activation_std(stats: Statistics, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """The standard deviation of the activations at the reads."""
    moments = _moments(stats, coupling)
    count = moments.count.clamp(min=1)
    variance = moments.sum_sq / count - (moments.sum / count).square()
    return normalizer(variance.clamp(min=0).sqrt(), coupling)


@partial(Criterion, moments=True)
def apoz(stats: Statistics, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """One minus the share of zeros among the activations at the reads (Hu et al. 2016, arXiv 1607.03250, eq. 1)."""
    moments = _moments(stats, coupling)
    return normalizer(1 - moments.zeros / moments.count.clamp(min=1), coupling)


@partial(Criterion, of="weights")
def weight_l1(params: Params, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """The L1 norm of the weights that write the unit (Li et al. 2017, arXiv 1608.08710)."""
    return normalizer(_weights(params, coupling, 1), coupling)


@partial(Criterion, of="weights")
def weight_l2(params: Params, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """The L2 norm of the weights that write the unit."""
    return normalizer(_weights(params, coupling, 2).sqrt(), coupling)


def _weights(params: Params, coupling: Coupling, power: int) -> Tensor:
    _parameters(params, coupling)
    if coupling.branches:
        scopes = ", ".join(coupling.scopes[coupling.scope[branch.unit]] for branch in coupling.branches)
        raise ValueError(
            f"A norm is that of the weights that write a unit, and none writes a branch; received {scopes}. Take a "
            "criterion of statistics, or couple without branches."
        )
    with sharing(params) as own:
        return _written(flatten(own), coupling, power)


def _written(leaves: Mapping[str, Tensor], coupling: Coupling, power: int) -> Tensor:
    """Of every unit, the sum of powers of the weights that write it."""
    device = next(iter(leaves.values())).device
    total = torch.zeros(len(coupling) + 1, dtype=torch.float64, device=device)
    seen: set[str] = set()
    for node in coupling.spec:
        signature = coupling.signature(node)
        if signature is None:
            continue
        for leaf, pattern in signature.parameters.items():
            path = node.path(leaf)
            for axis, named in enumerate(pattern):
                if len(pattern) > 1 and path not in seen and {*named[0]} & {*signature.written}:
                    powers = whole(leaves[path]).detach().to(torch.float64).abs().pow(power)
                    weight = powers.movedim(axis, 0).flatten(1).sum(1)
                    for row in coupling.unit_ids(path, axis):
                        total.index_add_(0, torch.as_tensor(row % len(total), device=total.device), weight)
            seen.add(path)
    return total[:-1]


def _parameters(params: Params, coupling: Coupling) -> None:
    if isinstance(params, Statistics):
        raise ValueError(
            "This criterion is of the parameters; received statistics. A function of your own that calls it is "
            'tfx.criteria.Criterion(function, of="weights"): it is then called with (params, coupling), and nothing is '
            "measured."
        )
    check(params, coupling.spec)


@partial(Criterion, of="weights")
def batchnorm_scale(params: Params, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """The mean magnitude of the scales of the batch norms that a unit passes (Liu et al. 2017, arXiv 1708.06519).

    Raises:
        ValueError: if units pass no batch norm; all their scopes are listed.
    """
    _parameters(params, coupling)
    with sharing(params) as own:
        leaves = flatten(own)  # where vectors are whole
    scales = [node.path(role.scale) for node in coupling.spec if (role := node.layer.role(Normalizing))]
    total = torch.zeros(2, len(coupling) + 1, dtype=torch.float64)
    for path in dict.fromkeys(scales):
        scale = leaves[path].detach().to("cpu", torch.float64).abs()
        for row in coupling.unit_ids(path, 0):
            index = torch.as_tensor(row % total.shape[1])
            total.index_add_(1, index, torch.stack([scale, torch.ones_like(scale)]))
    without = np.unique(coupling.scope[(total[1, :-1] == 0).numpy()])
    if len(without):
        named = ", ".join(coupling.scopes[k] for k in without)
        raise ValueError(
            f"Every unit has to pass a batch norm with a scale; units of {named} pass none. Take another criterion."
        )
    return normalizer(total[0, :-1] / total[1, :-1], coupling)


@partial(Criterion, of="units")
def random(coupling: Coupling, generator: torch.Generator) -> Tensor:
    """Uniform numbers: the control that every criterion has to beat."""
    return torch.rand(len(coupling), generator=generator, device=generator.device)
