"""Errors: each says the rule, what was received, where, and what to do; a refused call changes nothing.

The table below is the specification: one line of it per mistake, with the words that its maker reads.
"""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import optree
import pytest
import torch

import taylorfx as tfx
from taylorfx import layers as L


def world() -> SimpleNamespace:
    """A network of 14 units in two scopes, another one of 6 units, and everything that is made of them."""

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    w = SimpleNamespace(generator=generator())
    w.spec = tfx.serial(
        tfx.Input((1, 6, 6)),
        conv1=L.Conv2d(1, 6, 3),
        bn=L.BatchNorm2d(6),
        relu=L.ReLU(),
        conv2=L.Conv2d(6, 8, 3),
        flat=L.Flatten(),
        drop=L.Dropout(0.5),
        fc=L.Linear(32, 3),
    )
    w.params = tfx.init(w.spec, generator())
    w.x, w.y = torch.randn(5, 1, 6, 6, generator=generator()), torch.tensor([0, 1, 2, 0, 1])
    w.coupling = tfx.couple(w.params, w.spec)
    w.stats = tfx.measure(w.params, w.spec, (w.x, w.y), w.coupling)
    w.scores = tfx.taylor(w.stats, w.coupling)
    w.plan = tfx.select(w.scores, w.coupling, budget=tfx.Units(9))
    w.other = tfx.serial(tfx.Input((1, 6, 6)), conv1=L.Conv2d(1, 6, 3), flat=L.Flatten(), fc=L.Linear(96, 3))
    w.other_params = tfx.init(w.other, generator())
    w.other_coupling = tfx.couple(w.other_params, w.other)
    w.other_stats = tfx.measure(w.other_params, w.other, (w.x, w.y), w.other_coupling)
    w.unfit = {
        "conv1": {"weight": torch.zeros(6, 2, 3, 3)},
        "bn": w.params["bn"],
        "conv2": w.params["conv2"],
        "fc": {**w.params["fc"], "scale": torch.zeros(1)},
        "head": 3.0,
    }
    w.nan = w.scores.clone()
    w.nan[2], w.nan[7] = torch.nan, torch.inf
    return w


W = world()


def contents(w: SimpleNamespace) -> list[Any]:
    """Everything in the world that a call could change, by value."""
    values = {
        k: v for k, v in vars(w).items() if k not in ("coupling", "other_coupling", "plan", "stats", "other_stats")
    }
    values["generator"] = w.generator.get_state()
    values["plan"] = torch.from_numpy(w.plan.keep.copy())
    values["units"] = [torch.from_numpy(axis.copy()) for axis in w.coupling.axes]
    values["stats"] = {k: v for k, v in vars(w.stats).items() if v is not None}
    return optree.tree_leaves(copy.deepcopy(values))


def measure(**options: Any) -> Any:
    """`tfx.measure` of the world's network, with something wrong."""
    given = {"params": W.params, "spec": W.spec, "batches": (W.x, W.y), "coupling": W.coupling, **options}
    return tfx.measure(**given)


NINE = tfx.Units(9)


def select(scores: Any = W.scores, budget: Any = NINE, **options: Any) -> Any:
    return tfx.select(scores, W.coupling, budget=budget, **options)


PARAMETERS = """Parameters have to fit the network; received:
  conv1.bias: missing, expected (6,)
  conv1.weight: expected (6, 1, 3, 3), received (6, 2, 3, 3)
  fc.scale: the network has no such parameter
  head: the network has no such parameter"""

CHANNELS = """Layers and their inputs have to fit; received:
  conv1: Conv2d takes 1 at input 0, axis 1; received 3
(with inputs of shape input (5, 3, 6, 6))"""

DTYPES = """Inputs and parameters have to agree in dtype and device; received:
  torch.float64 on cpu: input input
  torch.float32 on cpu: conv1.weight, conv1.bias, bn.weight, bn.bias, ...
first noticed at conv1 (Conv2d); convert one of them, x.to(...)."""

DEVICES = """Inputs and parameters have to agree in dtype and device; received:
  torch.float32 on meta: input input
  torch.float32 on cpu: conv1.weight, conv1.bias, bn.weight, bn.bias, ...
first noticed at bn (BatchNorm2d); convert one of them, x.to(...)."""

CUT = """A plan cuts trees like its own network's parameters; received:
  fc.weight: expected (3, 32), received (3, 96)"""

EXPANDED = """A plan expands what it has cut of its own network's parameters; received:
  conv1.weight: expected (3, 1, 3, 3), received (6, 1, 3, 3)
  conv1.bias: expected (3,), received (6,)
  fc.weight: expected (3, 24), received (3, 96)"""

GRAPH = """A network is a graph of named nodes without cycles; received:
  two nodes are named 'a'; give each node a name of its own
  'b' consumes 'nowhere', which no node is named
  the output 'end' is no node
  the nodes 'c', 'd' lie on or behind a cycle"""

GLOBS = (
    "Globs name scopes of the network, or parameters; {} received 'conx*', 'y', which match nothing. Near them are "
    "conv2, conv1. The scopes are conv1, conv2, fc."
)

BUDGET = (
    "A budget says what may remain: a share, a float above 0 and up to 1.0, or a number, an int above 0; received {}."
)

LEAST = (
    "The budget is {}; the constraints allow no less than {}. Loosen floor, most, multiple, uniform or protect, or ask "
    "for no less. Frozen are layers with {}: {} by fc (Linear: an output of the network). Outputs of the network "
    "keep their size: allow a larger budget, or let other layers lose more. coupling.frozen tells the reason for every "
    "layer."
)

STATISTICS = (
    "Statistics add up when they are of the same units, with or without moments and rows alike; received {}. "
    "Measure both with one coupling and the same options."
)

N = tfx.Node

# What is wrong: (the call, the error, its words).
CASES: dict[str, tuple[Any, type[Exception], str]] = {
    # batches
    "an empty batch": (
        lambda: measure(batches=(W.x[:0], W.y[:0])),
        ValueError,
        "A batch has one or more examples, as many inputs as targets; received [0].",
    ),
    "no batch": (
        lambda: measure(batches=iter([])),
        ValueError,
        "There is nothing to measure: received no batch. Was the iterator already used up?",
    ),
    "more targets than inputs": (
        lambda: measure(batches=(W.x, torch.cat([W.y, W.y]))),
        ValueError,
        "A batch has one or more examples, as many inputs as targets; received [5, 10]. Targets of another structure "
        "need split=..., a loss of the whole batch per_example=False.",
    ),
    "a list of tensors for a batch": (
        lambda: measure(batches=[W.x, W.y]),
        ValueError,
        "A batch is a pair (inputs, targets), several come in a list; batch 0 is a Tensor of 5.",
    ),
    "wrong channel count": (lambda: tfx.apply(W.params, W.spec, W.x.expand(5, 3, 6, 6)), tfx.ShapeError, CHANNELS),
    "wrong channel count, measured": (
        lambda: measure(batches=(W.x.expand(5, 3, 6, 6), W.y)),
        tfx.ShapeError,
        CHANNELS,
    ),
    "mixed dtypes": (lambda: tfx.apply(W.params, W.spec, W.x.double()), tfx.ShapeError, DTYPES),
    "mixed dtypes, measured": (lambda: measure(batches=(W.x.double(), W.y)), tfx.ShapeError, DTYPES),
    "mixed devices": (lambda: tfx.apply(W.params, W.spec, W.x.to("meta")), tfx.ShapeError, DEVICES),
    "mixed devices, measured": (lambda: measure(batches=(W.x.to("meta"), W.y)), tfx.ShapeError, DEVICES),
    "arrays for tensors, measured": (
        lambda: measure(batches=(W.x.numpy(), W.y)),
        tfx.ShapeError,
        "A network takes tensors; received: input is ndarray.",
    ),
    "arrays for tensors": (
        lambda: tfx.apply(W.params, W.spec, W.x.numpy()),
        tfx.ShapeError,
        "A network takes tensors; received: input is ndarray.",
    ),
    "two inputs for one": (
        lambda: tfx.apply(W.params, W.spec, W.x, W.x),
        tfx.ShapeError,
        "Inputs are as many as the network's Input nodes, 1 (input); received 2.",
    ),
    "an input of another name": (
        lambda: tfx.apply(W.params, W.spec, {"image": W.x}),
        tfx.ShapeError,
        "Inputs are named as the network's Input nodes, input; received image.",
    ),
    "targets beyond the classes": (
        lambda: measure(batches=(W.x, W.y + 1)),
        ValueError,
        "Targets are classes, 0 to 2; received 1 to 3.",
    ),
    "targets below zero": (
        lambda: measure(batches=(W.x, W.y - 1)),
        ValueError,
        "Targets are classes, 0 to 2; received -1 to 1.",
    ),
    "targets of another shape": (
        lambda: measure(batches=(W.x, W.y[:, None])),
        ValueError,
        "Targets are classes of shape (5,), or their probabilities of shape (5, 3), on cpu as the outputs; "
        "received torch.int64 of shape (5, 1) on cpu.",
    ),
    "targets on another device": (
        lambda: measure(batches=(W.x, W.y.to("meta"))),
        ValueError,
        "Targets are classes of shape (5,), or their probabilities of shape (5, 3), on cpu as the outputs; "
        "received torch.int64 of shape (5,) on meta.",
    ),
    "a loss that is not finite": (
        lambda: measure(batches=[(W.x, W.y), (W.x * torch.nan, W.y)]),
        ValueError,
        "Losses have to be finite; that of batch 1 is not. Check its inputs and the parameters. A loss that compares "
        "examples has to be measured of the whole batch, per_example=False.",
    ),
    "a loss of several numbers": (
        lambda: measure(loss=lambda outputs, targets: outputs),
        ValueError,
        "A loss is a tensor with one number per example; received shape (1, 3). Sum or average it.",
    ),
    "a loss that is no tensor": (
        lambda: measure(loss=lambda outputs, targets: 1.0),
        ValueError,
        "A loss is a tensor with one number per example; received float. Sum or average it.",
    ),
    # parameters and networks
    "unfit parameters to apply": (lambda: tfx.apply(W.unfit, W.spec, W.x), tfx.SpecError, PARAMETERS),
    "unfit parameters to train": (lambda: tfx.train(W.unfit, W.spec, W.x), tfx.SpecError, PARAMETERS),
    "unfit parameters to couple": (lambda: tfx.couple(W.unfit, W.spec), tfx.SpecError, PARAMETERS),
    "unfit parameters to measure": (lambda: measure(params=W.unfit), tfx.SpecError, PARAMETERS),
    "unfit parameters to prune": (
        lambda: tfx.prune(W.unfit, W.spec, (W.x, W.y), budget=tfx.Flops(0.5)),
        tfx.SpecError,
        PARAMETERS,
    ),
    "unfit parameters to a criterion": (lambda: tfx.criteria.weight_l1(W.unfit, W.coupling), tfx.SpecError, PARAMETERS),
    "a parameter that is no tensor": (
        lambda: tfx.apply({**W.params, "fc": {"weight": 1.0, "bias": W.params["fc"]["bias"]}}, W.spec, W.x),
        tfx.SpecError,
        "Parameters have to fit the network; received:\n  fc.weight: expected a tensor, received float",
    ),
    "freshly initialized parameters of another network": (
        lambda: tfx.apply(tfx.init(W.other, torch.Generator()), tfx.serial(conv1=L.Conv2d(1, 8, 3, bias=False)), W.x),
        tfx.SpecError,
        "Parameters have to fit the network; received:\n"
        "  conv1.weight: expected (8, 1, 3, 3), received (6, 1, 3, 3)\n"
        "  conv1.bias: the network has no such parameter\n"
        "  fc.weight: the network has no such parameter\n"
        "  fc.bias: the network has no such parameter",
    ),
    "arguments in another order": (
        lambda: tfx.apply(W.spec, W.params, W.x),
        tfx.SpecError,
        "Parameters are nested dicts of tensors and come first, then the network, a Spec; received Spec, dict.",
    ),
    "shared parameters of two shapes": (
        lambda: tfx.init(
            tfx.Spec((N("in", tfx.Input(3)), N("a", L.Linear(3, 4), "in"), N("b", L.Linear(4, 4), "a", "a"))),
            W.generator.clone_state(),
        ),
        tfx.SpecError,
        "Nodes share parameters of one shape; received:\n  a.weight: b expects (4, 4), a node before it (4, 3)",
    ),
    "two leaves at one path": (
        lambda: tfx.tree.combine(W.params, {"fc": {"bias": W.y}}),
        ValueError,
        "Every leaf of a tree has a path of its own; 'fc.bias' is there already.",
    ),
    "a leaf below a leaf": (
        lambda: tfx.tree.unflatten({"fc": W.x, "fc.bias": W.y}),
        ValueError,
        "Every leaf of a tree has a path of its own; 'fc.bias' lies below another one.",
    ),
    "a graph with everything wrong": (
        lambda: tfx.Spec(
            (
                N("in", tfx.Input(3)),
                N("a", L.Linear(3, 4), "in"),
                N("a", L.ReLU(), "in"),
                N("b", L.ReLU(), "nowhere"),
                N("c", L.Add(), ("d", "a")),
                N("d", L.ReLU(), "c"),
            ),
            "end",
        ),
        tfx.SpecError,
        GRAPH,
    ),
    "no nodes": (
        lambda: tfx.Spec(()),
        tfx.SpecError,
        "A network is a graph of named nodes without cycles; received:\n"
        "  a network has at least one node; received none",
    ),
    "a class for a layer": (
        lambda: tfx.serial(L.Linear(3, 4), L.ReLU),
        tfx.SpecError,
        "A part is a layer or a network, ReLU() and not ReLU; received <class 'taylorfx.layers.activation.ReLU'> for "
        "'1'.",
    ),
    "one name for two parts": (
        lambda: tfx.serial(L.Linear(3, 4), **{"0": L.ReLU()}),
        tfx.SpecError,
        "Each part has a name of its own; received the name '0' for the part of that number.",
    ),
    "an input of unknown shape": (
        lambda: tfx.couple({"0": W.params["fc"]}, tfx.serial(L.Linear(32, 3))),
        tfx.ShapeError,
        "Layers and their inputs have to fit; received:\n"
        "  input: the shape of the input is not known; declare it, Input((channels, height, width)), or use "
        "spec.at(shape)",
    ),
    "too few shapes": (
        lambda: W.spec.at(),
        tfx.SpecError,
        "Shapes are as many as the network's Input nodes, 1 (input); received 0.",
    ),
    "a layer class that is not known": (
        lambda: tfx.from_json(tfx.to_json(W.spec).replace('"Conv2d"', '"Conv9d"').replace('"ReLU"', '"mine.ReLU"')),
        tfx.FileError,
        "This document does not describe a network:\n"
        "  nodes[1].layer: unknown: 'Conv9d'. Import the module of its class, or update taylorfx\n"
        "  nodes[3].layer: unknown: 'mine.ReLU'. Import the module of its class, or update taylorfx\n"
        "  nodes[4].layer: unknown: 'Conv9d'. Import the module of its class, or update taylorfx",
    ),
    "dropout without a generator": (
        lambda: tfx.train(W.params, W.spec, W.x),
        tfx.ShapeError,
        "drop: Dropout draws random numbers in training; received no generator. Pass generator=...",
    ),
    "dropout without a generator, measured": (
        lambda: measure(training=True),
        tfx.ShapeError,
        "drop: Dropout draws random numbers in training; received no generator. Pass generator=...",
    ),
    # what was made for another network
    "a coupling of another network": (
        lambda: measure(coupling=W.other_coupling),
        ValueError,
        "Units are those of the network itself; received a coupling of another one, of 6 units. Couple again: "
        "couple(params, spec).",
    ),
    "statistics of different units": (
        lambda: W.stats + W.other_stats,
        ValueError,
        STATISTICS.format("14 units and 6 units"),
    ),
    "statistics with and without moments": (
        lambda: sum([W.stats, measure(moments=True)]),
        ValueError,
        STATISTICS.format("14 units and 14 units with moments"),
    ),
    "statistics of another coupling": (
        lambda: tfx.criteria.second_order(W.stats, W.other_coupling),
        ValueError,
        "Statistics are scored with the coupling that they were measured with; received those of 14 units and another "
        "coupling, of 6. Measure again with this one.",
    ),
    "a plan for another network, cut": (lambda: tfx.cut(W.other_params, W.plan), tfx.PlanError, CUT),
    "a plan for another network, expanded": (lambda: tfx.expand(W.other_params, W.plan), tfx.PlanError, EXPANDED),
    "a plan for another network, composed": (
        lambda: tfx.compose(W.plan, W.plan),
        tfx.PlanError,
        "Plans compose if the second is of the network that the first one leaves; received one of another network. "
        "Select it for couple(cut(params, first), first.spec).",
    ),
    "an unknown leaf, cut": (
        lambda: tfx.cut({"head": {"weight": W.x}, "fc": {"bias": None}}, W.plan),
        tfx.PlanError,
        "A plan cuts trees like its own network's parameters; received:\n"
        "  head.weight: the network has no such parameter\n"
        "  fc.bias: expected (3,), received NoneType",
    ),
    "gates of wrong length": (
        lambda: tfx.gates(W.coupling, torch.ones(3)),
        ValueError,
        "Gates are one per unit, (14,), or so for each example, (N, 14); received values of shape (3,).",
    ),
    "gates of another network": (
        lambda: tfx.apply(W.other_params, W.other, W.x, gates=W.plan.gates),
        tfx.SpecError,
        "Gates lie at the reads of their own network; received some at conv2, which this one does not have. Make them "
        "from its own coupling or plan.",
    ),
    "gates of another number of examples": (
        lambda: tfx.apply(W.params, W.spec, W.x, gates=tfx.gates(W.coupling, torch.ones(3, 14))),
        tfx.ShapeError,
        "conv2: Gates fit what is read, (5, 6, 4, 4); received gates (3, 6, 1, 1).",
    ),
    "a mask of wrong length": (
        lambda: tfx.Plan(W.coupling, np.ones(3, bool)),
        tfx.PlanError,
        "A plan decides on 14 units; received a mask of shape (3,).",
    ),
    "a mask that keeps nothing of a layer": (
        lambda: tfx.Plan(W.coupling, np.arange(14) >= 6),
        tfx.PlanError,
        "Every layer keeps at least one channel; nothing would stay at conv1.weight, conv1.bias, bn.weight, bn.bias, "
        "bn.running_mean, bn.running_var, conv2.weight.",
    ),
    # criteria
    "batch norm's scale where there is none": (
        lambda: tfx.criteria.batchnorm_scale(W.params, W.coupling),
        ValueError,
        "Every unit has to pass a batch norm with a scale; units of conv2 pass none. Take another criterion.",
    ),
    "activations that were not measured": (
        lambda: tfx.criteria.apoz(measure(), W.coupling),
        ValueError,
        "This criterion looks at activations, of which the statistics say nothing; measure(..., moments=True). A "
        "function of your own that looks at them says so to `prune`: tfx.criteria.Criterion(function, moments=True).",
    ),
    # scores, constraints, budgets
    "scores that are not finite": (
        lambda: select(W.nan),
        tfx.SelectionError,
        "Scores have to be finite; received conv1[2] = nan, conv2[1] = inf. Look at the criterion and its data.",
    ),
    "scores of wrong length": (
        lambda: select(W.scores[:4]),
        tfx.SelectionError,
        "Scores are a tensor of one real number per unit, (14,); received torch.float32 of shape (4,).",
    ),
    "scores that are no tensor": (
        lambda: select(W.scores.tolist()),
        tfx.SelectionError,
        "Scores are a tensor of one real number per unit, (14,); received list.",
    ),
    "an unknown glob in protect": (
        lambda: select(protect=["conx*", "conv1", "y"]),
        tfx.SelectionError,
        GLOBS.format("protect"),
    ),
    **{
        f"an unknown glob in {word}": (
            lambda word=word: select(**{word: {"conx*": 1, "conv1": 1, "y": 1}}),
            tfx.SelectionError,
            GLOBS.format(word),
        )
        for word in ("floor", "most", "multiple", "uniform")
    },
    "scopes of different size made uniform": (
        lambda: select(uniform=["conv*"]),
        tfx.SelectionError,
        "uniform takes scopes of as many units; received for 'conv*' conv1 of 6, conv2 of 8. Give each size a glob of "
        "its own.",
    ),
    **{
        f"a floor of {floor}": (
            lambda floor=floor: select(floor=floor),
            tfx.SelectionError,
            f"floor is at least 1; received {floor} for '*'.",
        )
        for floor in (0, -1)
    },
    "a floor of no unit for one layer": (
        lambda: select(floor={"conv1": 0, "conv2": 2}),
        tfx.SelectionError,
        "floor is at least 1; received 0 for 'conv1'.",
    ),
    **{
        f"a {what} of {value!r}": (
            lambda what=what, value=value: select(**{what: value}),
            tfx.SelectionError,
            f"{what} is {rule}; received {value!r} for '*'.",
        )
        for what, value, rule in (
            ("floor", 2.5, "a whole number, at least 1"),
            ("floor", True, "a whole number, at least 1"),
            ("multiple", "8", "a whole number, at least 1"),
            ("most", None, "a number, at least 0 and at most 1"),
        )
    },
    "several constraints that are wrong": (
        lambda: select(protect="y", floor=0, most=2.0),
        tfx.SelectionError,
        "floor is at least 1; received 0 for '*'. most is at least 0 and at most 1; received 2.0 for '*'. Globs name "
        "scopes of the network, or parameters; protect received 'y', which match nothing. The scopes are conv1, conv2, "
        "fc.",
    ),
    "a glob that is no string": (
        lambda: select(protect=[3]),
        tfx.SelectionError,
        "protect takes a glob or several, strings like 'layer1.*'; received [3].",
    ),
    "no budget": (
        lambda: select(budget=[]),
        tfx.BudgetError,
        "A budget, or several, say what may remain; received none.",
    ),
    "a most above one": (
        lambda: select(most={"conv1": 1.5}),
        tfx.SelectionError,
        "most is at least 0 and at most 1; received 1.5 for 'conv1'.",
    ),
    "a multiple of zero": (
        lambda: select(multiple=0),
        tfx.SelectionError,
        "multiple is at least 1; received 0 for '*'.",
    ),
    **{
        f"a budget of {amount!r}": (
            lambda amount=amount: select(budget=amount),
            tfx.BudgetError,
            BUDGET.format(f"Units({amount!r})"),
        )
        for amount in (0, 0.0, -1, -0.5, 1.5, float("nan"), True, "half", None)
    },
    "a budget of no FLOPs": (lambda: tfx.Flops(0.0), tfx.BudgetError, BUDGET.format("Flops(0.0)")),
    "a budget below the reachable": (
        lambda: select(budget=tfx.Flops(0.05)),
        tfx.BudgetError,
        LEAST.format("at most 5.0% of the FLOPs, a limit of 269 in 5,376", "384", "3.6% of the FLOPs", "3.6%"),
    ),
    "a number where a share was meant": (
        lambda: select(budget=tfx.Flops(1)),
        tfx.BudgetError,
        LEAST.format("1 FLOPs, a limit of 1 in 5,376", "384", "3.6% of the FLOPs", "3.6%"),
    ),
    "several budgets of which two are below the reachable": (
        lambda: select(budget=(tfx.Flops(0.05), tfx.Units(0.5), tfx.Parameters(5))),
        tfx.BudgetError,
        LEAST.format(
            "at most 5.0% of the FLOPs, a limit of 269 in 5,376; the constraints allow no less than 384, and 5 "
            "parameters, a limit of 5 in 611",
            "37",
            "3.6% of the FLOPs",
            "3.6%",
        ),
    ),
    "a measure that is no number": (
        lambda: select(budget=tfx.Measured(0.5, lambda spec: float("nan"))),
        tfx.BudgetError,
        "A cost is a finite number; received nan from <lambda>.",
    ),
    "a budget below the floor": (
        lambda: select(budget=tfx.Units(9), floor=5),
        tfx.BudgetError,
        LEAST.format("9 units, a limit of 9 in 14", "10", "16.2% of the parameters", "16.2%"),
    ),
    "more units than there are": (
        lambda: select(budget=tfx.Units(15)),
        tfx.BudgetError,
        "The budget is 15 units, exactly 15 to stay; the constraints allow 14 as the nearest.",
    ),
    "a number of units between multiples": (
        lambda: select(multiple=4),
        tfx.BudgetError,
        "The budget is 9 units, exactly 9 to stay; the constraints allow 8 or 12 as the nearest.",
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_it_says_what_is_wrong_and_changes_nothing(what: str) -> None:
    call, kind, words = CASES[what]
    before = contents(W)
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == words
    assert type(caught.value) is kind
    after = contents(W)
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other


def test_the_right_calls_pass() -> None:
    """The control of the table: what its calls are mistakes of is accepted."""
    tfx.apply(W.params, W.spec, W.x, gates=W.plan.gates)
    tfx.train(W.params, W.spec, W.x, generator=torch.Generator())
    tfx.expand(tfx.cut(W.params, W.plan), W.plan)
    assert sum([W.stats, measure()]).n == 10
    assert select(W.scores, tfx.Units(9), protect="conv1", floor=2, most=0.9).keep.sum() == 9
    assert select(W.scores, tfx.Units(8), multiple=4).keep.sum() == 8
    measure(loss=lambda outputs, targets: (outputs.square().sum() * targets).sum())
    tfx.criteria.apoz(measure(moments=True), W.coupling)


def test_every_error_is_a_value_error() -> None:
    """One except clause catches them all."""
    for kind in (tfx.SpecError, tfx.PlanError, tfx.SelectionError, tfx.BudgetError, tfx.ShapeError):
        assert issubclass(kind, ValueError)
