"""taylorfx: functional, JAX-style structured pruning on PyTorch. Couple, measure, select, cut.

params, spec = tfx.prune(params, spec, batch, budget=tfx.Flops(0.5))
"""

import typing

from taylorfx import distributed, layers, schedule
from taylorfx.balance import Order, balance, reorder
from taylorfx.budget import (
    Budget,
    BudgetError,
    Flops,
    Latency,
    Measured,
    Memory,
    Parameters,
    Remove,
    SelectionError,
    Units,
)
from taylorfx.build import concat, inline, multihead_attention, residual, serial
from taylorfx.cost import Cost, Timings, flops, memory, parameters
from taylorfx.coupling import Coupling, Place, couple
from taylorfx.criteria import (
    Needs,
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
from taylorfx.fidelity import Fidelity, Interval, fidelity
from taylorfx.fold import fold
from taylorfx.forecast import exact_second_order, path_integral, plan_path_integral, plan_second_order
from taylorfx.gated import curvature, gated_loss, gradient
from taylorfx.gates import derivatives, gates, measure
from taylorfx.joint import expected_change, joint
from taylorfx.layers import *
from taylorfx.loss import cross_entropy
from taylorfx.oracle import Oracle, oracle
from taylorfx.plan import Plan, PlanError, compose, cut, expand
from taylorfx.prune import iterate, prune
from taylorfx.reconstruct import LeastSquares, reconstruct
from taylorfx.repair import Means, Repair, compensate, means, recalibrate
from taylorfx.selection import select
from taylorfx.spec import Node, Spec, SpecError, apply, check, init, partition, train
from taylorfx.statistics import Moments, Statistics
from taylorfx.store import FileError, cut_file, from_json, load, save, to_json
from taylorfx.tree import Params, combine, flatten, unflatten

if typing.TYPE_CHECKING:
    from taylorfx.interop import CaptureError, LikeError, Value, from_torch, rule, to_torch

__version__ = "0.1.0"

__all__ = [
    "Budget", "BudgetError", "CaptureError", "Cost", "Coupling", "Fidelity", "FileError", "Flops", "Interval",
    "Latency", "LeastSquares", "LikeError", "Means", "Measured", "Memory", "Moments", "Needs", "Node", "Oracle",
    "Order",
    "Parameters", "Params", "Place", "Plan", "PlanError", "Remove", "Repair", "SelectionError", "Spec", "SpecError",
    "Statistics", "Timings", "Units", "Value", "activation_mean", "activation_std", "apoz", "apply", "balance",
    "batchnorm_scale", "check", "combine", "compat", "compensate", "compose", "concat", "couple", "cross_entropy",
    "curvature", "cut", "cut_file", "derivatives", "distributed", "exact_second_order", "expand", "expected_change",
    "fidelity", "fisher", "flatten", "flops", "fold", "from_json", "from_torch", "gated_loss", "gates", "gradient",
    "init", "inline", "iterate", "joint", "layers", "load", "means", "measure", "memory", "multihead_attention",
    "of_weights", "oracle", "parameters", "partition", "path_integral", "per_layer_l2", "per_layer_max",
    "per_layer_mean", "plan_path_integral", "plan_second_order", "prune", "random", "recalibrate", "reconstruct",
    "reorder", "residual", "rule", "save", "schedule", "second_order", "select", "serial", "signed", "taylor",
    "taylor_squared", "to_json", "to_torch", "train", "unflatten", "unnormalized", "weight_l1", "weight_l2",
]  # fmt: skip
__all__ += layers.__all__


def __getattr__(name: str) -> typing.Any:
    """What captures modules, on first use: ``torch.export`` is slow to import."""
    if name in ("CaptureError", "LikeError", "Value", "from_torch", "rule", "to_torch"):
        from taylorfx import interop

        return getattr(interop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
