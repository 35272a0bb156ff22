"""taylorfx: functional, JAX-style structured pruning on PyTorch. Couple, measure, select, cut.

params, spec = tfx.prune(params, spec, batch, budget=tfx.Flops(0.5))
"""

import typing

from taylorfx import cost, distributed, layers, repair, tree, truth
from taylorfx.coupling.couple import couple
from taylorfx.coupling.units import Coupling
from taylorfx.cutting.cut import compose, cut, expand
from taylorfx.cutting.plan import Plan, PlanError
from taylorfx.cutting.reorder import balance, reorder
from taylorfx.layers import Input, Layer, ShapeError
from taylorfx.network.build import concat, inline, multihead_attention, residual, serial
from taylorfx.network.parameters import init, partition
from taylorfx.network.run import apply, train
from taylorfx.network.spec import Node, Spec, SpecError
from taylorfx.repair import compensate, recalibrate, reconstruct
from taylorfx.rewrite.folding import fold
from taylorfx.scoring import criteria
from taylorfx.scoring.criteria import fisher, taylor
from taylorfx.scoring.gates import gates
from taylorfx.scoring.losses import cross_entropy
from taylorfx.scoring.measure import derivatives, measure
from taylorfx.scoring.measurement import Measurement
from taylorfx.scoring.statistics import Statistics
from taylorfx.selection import schedule
from taylorfx.selection.budget import (
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
from taylorfx.selection.constraints import Constraints
from taylorfx.selection.joint import expected_change, joint
from taylorfx.selection.select import select
from taylorfx.sentence import iterate, prune
from taylorfx.store import FileError, cut_file, from_json, load, save, to_json
from taylorfx.tree import Params

if typing.TYPE_CHECKING:
    from taylorfx import interop
    from taylorfx.interop import from_torch, to_torch

__version__ = "0.1.0"

__all__ = [
    # the sentence
    "prune", "iterate", "couple", "measure", "select", "joint", "cut",
    # its values
    "Params", "Spec", "Node", "Coupling", "Measurement", "Statistics", "Constraints", "Plan", "Budget", "Flops",
    "Parameters", "Memory", "Latency", "Measured", "Units", "Remove",
    # networks
    "Input", "Layer", "serial", "residual", "concat", "inline", "multihead_attention", "init", "apply", "train",
    "partition", "fold",
    # scores
    "derivatives", "gates", "cross_entropy", "taylor", "fisher", "expected_change",
    # plans and trees
    "expand", "compose", "balance", "reorder", "reconstruct", "compensate", "recalibrate",
    # modules and files
    "from_torch", "to_torch", "save", "load", "cut_file", "to_json", "from_json",
    # errors
    "SpecError", "ShapeError", "SelectionError", "BudgetError", "PlanError", "FileError",
    # namespaces
    "layers", "criteria", "cost", "repair", "schedule", "tree", "truth", "interop", "distributed",
]  # fmt: skip

LAZY = ("from_torch", "to_torch")


def __getattr__(name: str) -> typing.Any:
    """What captures modules, on first use: ``torch.export`` is slow to import."""
    if name in (*LAZY, "interop"):
        import importlib

        interop = importlib.import_module("taylorfx.interop")
        return interop if name == "interop" else getattr(interop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
