"""taylorfx: functional, JAX-style structured pruning on PyTorch. Couple, measure, select, cut.

params, spec = tfx.prune(params, spec, batch, budget=tfx.Flops(0.5))
"""

import typing

from taylorfx import layers
from taylorfx.build import concat, inline, multihead_attention, residual, serial
from taylorfx.cost import Cost, flops, parameters
from taylorfx.coupling import Coupling, Place, couple
from taylorfx.criteria import (
    activation_mean,
    activation_std,
    apoz,
    batchnorm_scale,
    compat,
    fisher,
    of_weights,
    per_layer_l2,
    per_layer_max,
    per_layer_mean,
    random,
    second_order,
    signed,
    taylor,
    taylor_squared,
    unnormalized,
    weight_l1,
    weight_l2,
)
from taylorfx.fold import fold
from taylorfx.gates import Moments, Statistics, derivatives, gates, measure
from taylorfx.joint import expected_change, joint
from taylorfx.layers import *
from taylorfx.loss import cross_entropy
from taylorfx.plan import Plan, PlanError, compose, cut, expand
from taylorfx.prune import prune
from taylorfx.selection import Budget, BudgetError, Flops, Parameters, Remove, SelectionError, Units, select
from taylorfx.spec import Node, Spec, SpecError, apply, check, combine, init, partition, train
from taylorfx.store import from_json, load, save, to_json
from taylorfx.tree import Params, flatten, unflatten

if typing.TYPE_CHECKING:
    from taylorfx.interop import CaptureError, LikeError, Value, from_torch, rule, to_torch

__version__ = "0.1.0"

__all__ = [
    "Budget", "BudgetError", "CaptureError", "Cost", "Coupling", "Flops", "LikeError", "Moments", "Node",
    "Parameters", "Params", "Place", "Plan", "PlanError", "Remove", "SelectionError", "Spec", "SpecError",
    "Statistics", "Units", "Value", "activation_mean", "activation_std", "apoz", "apply", "batchnorm_scale",
    "check", "combine", "compat", "compose", "concat", "couple", "cross_entropy", "cut", "derivatives", "expand",
    "expected_change", "fisher", "flatten", "flops", "fold", "from_json", "from_torch", "gates", "init", "inline",
    "joint", "layers", "load", "measure", "multihead_attention", "of_weights", "parameters", "partition",
    "per_layer_l2", "per_layer_max", "per_layer_mean", "prune", "random", "residual", "rule", "save",
    "second_order", "select", "serial", "signed", "taylor", "taylor_squared", "to_json", "to_torch", "train",
    "unflatten", "unnormalized", "weight_l1", "weight_l2",
]  # fmt: skip
__all__ += layers.__all__


def __getattr__(name: str) -> typing.Any:
    """What captures modules, on first use: ``torch.export`` is slow to import."""
    if name in ("CaptureError", "LikeError", "Value", "from_torch", "rule", "to_torch"):
        from taylorfx import interop

        return getattr(interop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
