"""Criteria, constraints, repairs: whatever is wrong with them is said before a batch is measured, and what is right
works in `prune` and `iterate` alike."""

import functools
import inspect
import pickle
import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.scoring.criteria import Criterion

SPEC = tfx.serial(
    tfx.Input((1, 6, 6)), conv1=L.Conv2d(1, 6, 3), bn=L.BatchNorm2d(6), relu=L.ReLU(),
    conv2=L.Conv2d(6, 8, 3), bn2=L.BatchNorm2d(8), flat=L.Flatten(), fc=L.Linear(32, 3),
)  # fmt: skip
PARAMS = tfx.init(SPEC, torch.Generator().manual_seed(0))
BATCH = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1])
COUPLING = tfx.couple(PARAMS, SPEC)
HALF = tfx.Flops(0.5)


class Watched:
    """Batches that count how often they are looked at."""

    def __init__(self):
        self.count = 0

    def __iter__(self):
        self.count += 1
        yield BATCH


def pruned(batches=None, **options):
    return tfx.prune(PARAMS, SPEC, batches or [BATCH], **{"budget": HALF, **options})


def iterated(batches=None, budget=HALF, **options):
    return list(tfx.iterate(PARAMS, SPEC, batches or [BATCH], budgets=[budget], **options))[-1][:2]


BOTH = pytest.mark.parametrize("run", [pruned, iterated])


class Weighs(tfx.Units):
    """A kind of budget whose cost is a plain function."""

    def cost(self, coupling):
        return lambda keep: float(keep.sum())


class Custom(tfx.Flops):
    def cost(self, coupling):
        return lambda keep: float(keep.sum())


def one(stats):
    return stats.sum


WRONG = {
    "an unknown scope": ({"protect": ["zzz"]}, "protect received 'zzz'"),
    "an unknown scope in a floor": ({"floor": {"zzz": 2}}, "floor received 'zzz'"),
    "no floor": ({"floor": 0}, "floor is at least 1; received 0"),
    "no multiple": ({"multiple": 0}, "multiple is at least 1"),
    "too much": ({"most": 1.5}, "most is at least 0 and at most 1"),
    "unequal scopes": ({"uniform": "conv*"}, "uniform takes scopes of as many units"),
    "a budget out of reach": ({"budget": tfx.Flops(0.01)}, "allow no less than"),
    "a budget below the floor": ({"budget": tfx.Units(3), "floor": 4}, "allow no less than 8"),
    "a budget without prices": ({"budget": Custom(0.5)}, "the cost of Custom is another function"),
    "a criterion by its name": ({"criterion": "taylor"}, "received str 'taylor'"),
    "scores for a criterion": ({"criterion": torch.rand(14)}, "go to `select`"),
    "a criterion of one argument": ({"criterion": one}, "received one: too many positional arguments"),
    "a criterion of the coupling": ({"criterion": lambda a, b, c: a}, "missing a required argument: 'c'"),
    "a repair by its name": ({"repair": "reconstruct"}, "A repair is a function of"),
    "folding as a repair": ({"repair": tfx.fold}, "received fold: too many positional arguments"),
    "means as a repair": ({"repair": tfx.repair.means}, "received means: missing a required argument: 'coupling'"),
}


@BOTH
@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_before_a_batch_is_looked_at(run, what):
    options, words = WRONG[what]
    batches = Watched()
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        run(batches, **options)
    assert batches.count == 0


def test_the_right_calls_do_look_at_batches():
    """The control of the test above."""
    batches = Watched()
    pruned(batches, protect=["conv1"], floor=2, multiple=1, most=0.9)
    assert batches.count > 0


def test_constraints_with_a_wrong_name_are_refused():
    stats = tfx.measure(PARAMS, SPEC, BATCH, COUPLING, rows=True)
    for call in (
        lambda: tfx.iterate(PARAMS, SPEC, BATCH, budgets=[HALF], protct="conv1"),
        lambda: tfx.joint(stats, COUPLING, budget=HALF, protct="conv1"),
    ):
        with pytest.raises(tfx.SelectionError, match=r"The constraints are protect, floor, .*; received protct"):
            call()


def test_globs_may_be_any_iterable():
    stats = tfx.measure(PARAMS, SPEC, BATCH, COUPLING, rows=True)
    expected = tfx.joint(stats, COUPLING, budget=tfx.Flops(0.7), protect=["conv1"])
    for globs in ("conv1", {"conv1"}, iter(["conv1"])):
        assert tfx.joint(stats, COUPLING, budget=tfx.Flops(0.7), protect=globs) == expected
    steps = [tfx.Flops(0.8), tfx.Flops(0.7)]
    *_, (_, spec, _) = tfx.iterate(PARAMS, SPEC, BATCH, budgets=steps, protect=iter(["conv1"]))
    assert spec["conv1"].layer.out_channels == 6


# Which units stay may decide whether a budget can be met; then it is not refused beforehand.
SLICED = tfx.Spec(
    (
        tfx.Node("x", tfx.Input((4,))),
        tfx.Node("a", L.Linear(4, 8), "x"),
        tfx.Node("head", L.Slice(1, 0, 4), "a"),
        tfx.Node("wide", L.Linear(4, 50), "head"),
        tfx.Node("tail", L.Slice(1, 4, 8), "a"),
        tfx.Node("thin", L.Linear(4, 2), "tail"),
    ),
    ("wide", "thin"),
)


def test_a_budget_that_only_some_scores_can_meet_is_left_to_them():
    params = tfx.init(SLICED, torch.Generator().manual_seed(0))
    coupling = tfx.couple(params, SLICED)
    late = torch.arange(8.0)  # what stays is the tail
    options = {"budget": tfx.Parameters(150), "floor": 5, "per_cost": False}
    with pytest.raises(tfx.BudgetError):
        tfx.select(torch.zeros(8), coupling, **options)
    plan = tfx.select(late, coupling, **options)
    criterion = tfx.criteria.Criterion(lambda params, coupling: late, of="weights")
    _, spec = tfx.prune(params, SLICED, [], criterion=criterion, steps=1, **options)
    assert spec == plan.spec


# Criteria state what they need.
STATISTICS = {
    "taylor": {}, "taylor_squared": {}, "fisher": {}, "signed": {}, "second_order": {},
    "activation_mean": {"moments": True}, "activation_std": {"moments": True}, "apoz": {"moments": True},
    "compat": {"at_writes": True, "training": True},
}  # fmt: skip
CRITERIA = [*STATISTICS, "weight_l1", "weight_l2", "batchnorm_scale", "random", "exact_second_order", "path_integral"]


def named(name):
    return getattr(tfx.criteria, name, None) or getattr(tfx.truth, name)


def by_hand(name):
    criterion = named(name)
    if name in STATISTICS:
        return criterion(tfx.measure(PARAMS, SPEC, BATCH, COUPLING, **STATISTICS[name]), COUPLING)
    if name == "random":
        return criterion(COUPLING, torch.Generator().manual_seed(0))
    if name in ("exact_second_order", "path_integral"):
        return criterion(PARAMS, SPEC, BATCH, COUPLING)
    return criterion(PARAMS, COUPLING)


@BOTH
@pytest.mark.parametrize("name", CRITERIA)
def test_prune_takes_every_criterion_as_it_is_written_out(run, name):
    plan = tfx.select(by_hand(name), COUPLING, budget=tfx.Units(9))
    found = run(budget=tfx.Units(9), criterion=named(name))
    assert found[1] == plan.spec
    for one, other in zip(*map(tfx.tree.flatten, (found[0], tfx.cut(PARAMS, plan))), strict=True):
        assert one == other
    assert all(
        torch.equal(tfx.tree.flatten(found[0])[p], x) for p, x in tfx.tree.flatten(tfx.cut(PARAMS, plan)).items()
    )


@pytest.mark.parametrize("name", ["taylor", "apoz", "weight_l2", "batchnorm_scale"])
def test_a_criterion_with_options_filled_in_is_the_criterion(name):
    filled = functools.partial(named(name), normalizer=tfx.criteria.per_layer_l2)
    plan = tfx.select(tfx.criteria.per_layer_l2(by_hand(name), COUPLING), COUPLING, budget=tfx.Units(9))
    assert pruned(budget=tfx.Units(9), criterion=filled)[1] == plan.spec
    assert pruned(budget=tfx.Units(9), criterion=functools.partial(filled))[1] == plan.spec


def test_what_is_filled_in_stays():
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        filled = functools.partial(tfx.criteria.random, generator=generator)
        return generator, pruned(budget=tfx.Units(9), criterion=filled, generator=torch.Generator())[1]

    before = torch.Generator().manual_seed(3).get_state()
    generator, spec = drawn(3)
    assert not torch.equal(generator.get_state(), before)
    scores = tfx.criteria.random(COUPLING, torch.Generator().manual_seed(3))
    assert spec == tfx.select(scores, COUPLING, budget=tfx.Units(9)).spec

    def other(outputs, targets):
        return outputs[:, 0].mean()

    scores = tfx.truth.exact_second_order(PARAMS, SPEC, BATCH, COUPLING, loss=other)
    expected = tfx.select(scores, COUPLING, budget=tfx.Units(9)).spec
    criterion = functools.partial(tfx.truth.exact_second_order, loss=other)
    assert pruned(budget=tfx.Units(9), criterion=criterion)[1] == expected
    assert pruned(budget=tfx.Units(9), criterion=tfx.truth.exact_second_order, loss=other)[1] == expected


def test_random_draws_from_the_generator_that_is_given():
    specs = [
        pruned(budget=tfx.Units(9), criterion=tfx.criteria.random, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (7, 7, 8)
    ]
    first, again, other = (tfx.tree.flatten(params)["conv2.weight"] for params in specs)
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_criteria_of_your_own_state_what_they_need():
    class Steepest:
        """The largest derivative of any example."""

        def __call__(self, stats, coupling):
            return stats.rows.abs().amax(0)

        def silent(self, stats, coupling):
            return tfx.criteria.apoz(stats, coupling)

    stats = tfx.measure(PARAMS, SPEC, BATCH, COUPLING, rows=True)
    expected = tfx.select(Steepest()(stats, COUPLING), COUPLING, budget=tfx.Units(9)).spec
    assert pruned(budget=tfx.Units(9), criterion=Criterion(Steepest(), rows=True))[1] == expected
    silent = pruned(budget=tfx.Units(9), criterion=tfx.criteria.apoz)[1]
    assert pruned(budget=tfx.Units(9), criterion=Criterion(Steepest().silent, moments=True))[1] == silent
    plain = functools.partial(lambda stats, coupling: tfx.criteria.apoz(stats, coupling))
    assert pruned(budget=tfx.Units(9), criterion=plain, moments=True)[1] == silent
    with pytest.raises(ValueError, match=r"tfx\.criteria\.Criterion\(function, moments=True\)"):
        pruned(budget=tfx.Units(9), criterion=plain)


def test_a_criterion_is_called_looks_and_is_pickled_as_its_function():
    @functools.partial(Criterion, of="weights")
    def largest(params, coupling, *, scale=1.0):
        """The largest weight."""
        return scale * torch.arange(len(coupling))

    assert torch.equal(largest(PARAMS, COUPLING, scale=2.0), 2.0 * torch.arange(14))
    assert (largest.__name__, largest.__doc__) == ("largest", "The largest weight.")
    assert str(inspect.signature(largest)) == "(params, coupling, *, scale=1.0)"
    assert pickle.loads(pickle.dumps(tfx.criteria.apoz)) is tfx.criteria.apoz
    copied = pickle.loads(pickle.dumps(Criterion(tfx.fisher, rows=True)))
    assert copied == Criterion(tfx.fisher, rows=True)
    assert copied != Criterion(tfx.fisher)


def test_criteria_of_one_thing_say_so_when_they_receive_another():
    with pytest.raises(ValueError, match=r"of the parameters; received statistics.*of=\"weights\""):
        pruned(criterion=lambda params, coupling: tfx.criteria.weight_l2(params, coupling))
    with pytest.raises(ValueError, match="of the statistics that `measure` gives; received dict"):
        pruned(criterion=Criterion(lambda params, coupling: tfx.taylor(params, coupling), of="weights"))
    for wrong in ({"of": "weight"}, {"of": "weights", "moments": True}):
        with pytest.raises(ValueError, match="A criterion is of statistics, weights, units, network"):
            Criterion(lambda params, coupling: params, **wrong)
    with pytest.raises(ValueError, match=r"criterion of weights is a function of .*received one: too many positional"):
        Criterion(one, of="weights")


@pytest.mark.parametrize("options", [{}, {"per_example": False}, {"split": lambda y, k: y[k : k + 1]}])
def test_a_criterion_of_the_network_hears_what_the_loss_is_a_function_of(options):
    heard = {}

    @functools.partial(Criterion, of="network")
    def criterion(params, spec, batches, coupling, **how):
        heard.update(how)
        return torch.arange(float(len(coupling)))

    pruned(budget=tfx.Units(9), criterion=criterion, **options)
    assert heard == {"loss": tfx.cross_entropy, **options}

    def of_examples(params, spec, batches, coupling, *, loss):
        return torch.arange(float(len(coupling)))

    if options:
        with pytest.raises(ValueError, match="received of_examples: got an unexpected keyword"):
            pruned(budget=tfx.Units(9), criterion=Criterion(of_examples, of="network"), **options)


# Choices of your own.
def at_random(worth, coupling, *, budget, constraints, per_cost):
    """Random units leave until the budget is met; protected ones stay, and one of every scope."""
    rules, order = constraints.on(coupling), torch.randperm(len(coupling), generator=torch.Generator().manual_seed(1))
    keep, whole = np.ones(len(coupling), bool), np.ones(len(coupling), bool)
    for unit in order.tolist():
        if all(one.cost(coupling)(keep) <= one.limit(one.cost(coupling)(whole)) for one in budget):
            break
        scope = coupling.scope == coupling.scope[unit]
        if not rules.protected[unit] and keep[scope].sum() > max(1, rules.floors[coupling.scope[unit]]):
            keep[unit] = False
    return tfx.Plan(coupling, keep)


@BOTH
@pytest.mark.parametrize("criterion", [None, tfx.fisher, tfx.criteria.weight_l2])
def test_a_function_from_outside_chooses(run, criterion):
    worths = []

    def choose(worth, coupling, **asked):
        worths.append(worth)
        return at_random(worth, coupling, **asked)

    budget = tfx.Flops(0.6) if run is iterated else (tfx.Flops(0.6), tfx.Parameters(0.7))
    params, spec = run(budget=budget, criterion=criterion, choose=choose, protect="conv1", floor=2)
    assert spec["conv1"].layer.out_channels == 6
    assert 2 <= spec["conv2"].layer.out_channels < 8
    assert tfx.cost.flops(tfx.couple(params, spec)).total <= 0.6 * tfx.cost.flops(COUPLING).total
    for worth in worths:
        assert worth.rows is not None if criterion is None else isinstance(worth, torch.Tensor)


@BOTH
def test_joint_and_select_are_the_choices_that_are_made_anyway(run):
    together = functools.partial(tfx.joint, cautious=True)
    assert run(choose=together)[1] == run()[1]
    assert run(choose=tfx.select, criterion=tfx.fisher)[1] == run(criterion=tfx.fisher)[1]
    plain = functools.partial(tfx.select, per_cost=False)  # what is filled in stays
    expected = run(criterion=tfx.taylor, per_cost=False)[1]
    assert run(choose=plain, criterion=tfx.taylor)[1] == expected != run(criterion=tfx.taylor)[1]


CHOICES = {
    "a choice by its name": ({"choose": "joint"}, "received str 'joint': it is not called"),
    "a choice of scores alone": ({"choose": one}, "received one: too many positional arguments"),
    "a choice without constraints": (
        {"choose": lambda worth, coupling, *, budget, per_cost: worth},
        "got an unexpected keyword argument 'constraints'",
    ),
    "joint by scores": ({"choose": tfx.joint, "criterion": tfx.fisher}, "`joint` chooses by statistics"),
    "select without scores": ({"choose": functools.partial(tfx.select)}, "`select` chooses by scores"),
}


@BOTH
@pytest.mark.parametrize("what", CHOICES)
def test_what_cannot_choose_is_refused_before_a_batch_is_looked_at(run, what):
    options, words = CHOICES[what]
    batches = Watched()
    with pytest.raises(tfx.SelectionError, match=words):
        run(batches, **options)
    assert batches.count == 0


def everything(worth, coupling, **asked):
    return tfx.Plan(coupling, np.ones(len(coupling), bool))


def three_fewer(worth, coupling, **asked):
    return tfx.Plan(coupling, np.arange(len(coupling)) >= 3)  # of conv1


@BOTH
def test_a_plan_that_misses_its_budget_or_constraints_is_refused(run):
    missed = r"plan of everything does not meet at most \d\d\.\d% of the FLOPs.*it costs"  # that of its step
    with pytest.raises(tfx.BudgetError, match=missed):
        run(choose=everything)
    loose = {"budget": tfx.Flops(0.99), "choose": three_fewer}
    assert run(**loose)[1]["conv1"].layer.out_channels == 3
    for rules, words in {
        "conv1[0] has to stay": {"protect": "conv1"},
        "conv1 keeps 3 of 6, fewer than 4": {"floor": 4},
        "conv1 keeps 3 of 6, fewer than 5": {"most": 0.3},
        "conv1 keeps 3, no multiple of 2": {"multiple": {"conv1": 2}},
    }.items():
        with pytest.raises(tfx.SelectionError, match=re.escape(rules)):
            run(**loose, **words)
    with pytest.raises(tfx.SelectionError, match="gives a Plan of the coupling; at_odds gave a ndarray"):
        run(choose=at_odds)


def at_odds(worth, coupling, **asked):
    return np.ones(len(coupling), bool)


# Values and their keywords.
MEASURED = {"loss": lambda outputs, targets: outputs[:, 0].mean(), "micro_batch": 2}
RULES = {"protect": ["conv1"], "multiple": 2}


@BOTH
def test_a_value_says_what_its_keywords_say(run):
    constraints, measurement = tfx.Constraints(**RULES), tfx.Measurement(**MEASURED)
    expected = run(**MEASURED, **RULES)
    assert expected[1] != run()[1]
    for options in (
        {"constraints": constraints, "measurement": measurement},
        {"constraints": constraints, **MEASURED},
        {"measurement": measurement, **RULES},
    ):
        params, spec = run(**options)
        assert spec == expected[1]
        for path, leaf in tfx.tree.flatten(params).items():
            assert torch.equal(leaf, tfx.tree.flatten(expected[0])[path])


def test_measuring_and_selecting_take_the_values_too():
    measurement = tfx.Measurement(rows=True, **MEASURED)
    stats = tfx.measure(PARAMS, SPEC, BATCH, COUPLING, measurement=measurement)
    assert torch.equal(stats.rows, tfx.measure(PARAMS, SPEC, BATCH, COUPLING, rows=True, **MEASURED).rows)
    given = tfx.derivatives(PARAMS, SPEC, *BATCH, COUPLING, measurement=measurement)
    assert torch.equal(given.summed, stats.rows)
    scores = tfx.fisher(stats, COUPLING)
    value = tfx.Constraints(**RULES)
    assert tfx.select(scores, COUPLING, budget=HALF, constraints=value) == tfx.select(
        scores, COUPLING, budget=HALF, **RULES
    )
    assert tfx.joint(stats, COUPLING, budget=HALF, constraints=value) == tfx.joint(
        stats, COUPLING, budget=HALF, **RULES
    )


def test_a_value_beside_its_keywords_is_refused_before_a_batch_is_looked_at():
    batches, value, how = Watched(), tfx.Constraints(), tfx.Measurement()
    both = "takes a tfx.Constraints, with no such keyword beside it; received a Constraints and floor"
    for call in (
        lambda: pruned(batches, constraints=value, floor=2),
        lambda: iterated(batches, constraints=value, floor=2),
        lambda: tfx.select(torch.rand(14), COUPLING, budget=HALF, constraints=value, floor=2),
        lambda: tfx.joint(None, COUPLING, budget=HALF, constraints=value, floor=2),
    ):
        with pytest.raises(tfx.SelectionError, match=both):
            call()
    with pytest.raises(tfx.SelectionError, match="received a dict"):
        pruned(batches, constraints={"floor": 2})
    for call in (
        lambda: pruned(batches, measurement=how, rows=True),
        lambda: tfx.measure(PARAMS, SPEC, batches, COUPLING, measurement=how, rows=True),
    ):
        with pytest.raises(TypeError, match=r"takes a tfx\.Measurement, .*received a Measurement and rows"):
            call()
    with pytest.raises(TypeError, match=r"The options of a measurement are loss, .*; received row"):
        tfx.measure(PARAMS, SPEC, batches, COUPLING, row=True)
    with pytest.raises(ValueError, match="around the means of one network"):
        pruned(batches, around={("conv2", 0, 1): torch.zeros(6, 1, 1)})
    assert batches.count == 0


def test_balance_measures_what_its_criterion_needs():
    spec = tfx.serial(
        tfx.Input((4, 5, 5)), L.Conv2d(4, 16, 3), L.ReLU(), L.Conv2d(16, 8, 3, groups=4), L.ReLU(),
        L.Flatten(), L.Linear(8, 3),
    )  # fmt: skip
    params = tfx.init(spec, torch.Generator().manual_seed(0))
    batch = torch.randn(6, 4, 5, 5), torch.arange(6) % 3
    assert tfx.balance(params, spec, batch, criterion=tfx.criteria.apoz).ranks
    with pytest.raises(ValueError, match="received weight_l2, one of weights"):
        tfx.balance(params, spec, batch, criterion=tfx.criteria.weight_l2)


# Budgets of your own.
def test_a_budget_of_your_own_has_prices_or_says_that_it_has_none():
    class Priced(tfx.Budget):
        def cost(self, coupling):
            return tfx.cost.flops(coupling)

    scores = tfx.fisher(tfx.measure(PARAMS, SPEC, BATCH, COUPLING), COUPLING)
    options = {"per_cost": True}
    assert tfx.select(scores, COUPLING, budget=Priced(0.5), **options) == tfx.select(
        scores, COUPLING, budget=HALF, **options
    )
    for budget in (Custom(0.5), [HALF, Custom(0.5)]):
        with pytest.raises(tfx.BudgetError, match=r"the cost of Custom is another function.*per_cost=False"):
            tfx.select(scores, COUPLING, budget=budget, **options)
    assert tfx.select(scores, COUPLING, budget=Custom(0.5)).keep.sum() == 7
    assert pruned(budget=Custom(0.5), per_cost=False, criterion=tfx.fisher)[1] != SPEC


def test_a_cost_that_is_no_number_is_refused():
    class Broken(tfx.Flops):
        def cost(self, coupling):
            return lambda keep: float("nan")

    with pytest.raises(tfx.BudgetError, match="A cost is a finite number; received nan"):
        tfx.select(torch.rand(14), COUPLING, budget=Broken(0.5))


# Repairs.
@BOTH
@pytest.mark.parametrize("name", ["reconstruct", "compensate", "recalibrate"])
def test_every_repair_is_one_of_prune(run, name):
    plan = tfx.select(by_hand("weight_l2"), COUPLING, budget=tfx.Units(9))
    options = {"budget": tfx.Units(9), "criterion": tfx.criteria.weight_l2}
    repair = getattr(tfx, name)
    expected = repair(PARAMS, plan, [BATCH])
    for chosen in (repair, functools.partial(repair), lambda params, plan, batches: repair(params, plan, batches)):
        params, spec = run(repair=chosen, **options)
        assert spec == expected[1]
        for path, leaf in tfx.tree.flatten(params).items():
            assert_close(leaf, tfx.tree.flatten(expected[0])[path])


def test_recalibrating_a_plan_is_recalibrating_what_it_cuts():
    plan = tfx.select(by_hand("weight_l2"), COUPLING, budget=tfx.Units(9))
    params, spec = tfx.recalibrate(PARAMS, plan, BATCH)
    expected = tfx.tree.flatten(tfx.recalibrate(tfx.cut(PARAMS, plan), plan.spec, BATCH))
    assert spec == plan.spec
    assert all(torch.equal(leaf, expected[path]) for path, leaf in tfx.tree.flatten(params).items())
    assert not torch.equal(expected["bn.running_mean"], tfx.tree.flatten(tfx.cut(PARAMS, plan))["bn.running_mean"])


def test_an_iterator_of_batches_is_enough_for_pruning_and_refused_where_a_repair_would_find_it_empty():
    options = {"budget": tfx.Units(9), "criterion": tfx.fisher, "repair": tfx.compensate}
    assert pruned(iter([BATCH]), **options)[1] == pruned([BATCH], **options)[1]
    with pytest.raises(ValueError, match="received an iterator, which measuring uses up"):
        iterated(iter([BATCH]), **options)


@BOTH
def test_a_repair_that_gives_something_else_is_named(run):
    def careless(params, plan, batches):
        return tfx.cut(params, plan)

    with pytest.raises(ValueError, match=r"gives \(params, spec\).*careless gave a dict"):
        run(repair=careless)


# What is frozen.
@pytest.mark.parametrize("budget", [tfx.Parameters(0.5), tfx.Flops(0.5), tfx.Units(0.5), tfx.Remove(1)])
def test_without_units_the_error_says_what_freezes_them(budget):
    spec = tfx.serial(
        tfx.Input((4, 6, 6)), conv=L.Conv2d(4, 10, 3), soft=L.Softmax(1), conv2=L.Conv2d(10, 5, 3),
        soft2=L.Softmax(1), flat=L.Flatten(), fc=L.Linear(20, 3),
    )  # fmt: skip
    params = tfx.init(spec, torch.Generator().manual_seed(0))
    batches = Watched()
    with pytest.raises(tfx.BudgetError, match="The network has no unit that could leave") as caught:
        tfx.prune(params, spec, batches, budget=budget)
    assert batches.count == 0
    # By hand: conv 4 * 9 * 10 + 10 = 370, conv2 10 * 9 * 5 + 5 = 455, fc 63, of 888; FLOPs 2 * (5760 + 1800 + 60).
    shares = "99.2%", "0.8%" if isinstance(budget, tfx.Flops) else ""
    said = str(caught.value)
    if isinstance(budget, tfx.Flops):
        assert f"{shares[0]} by soft, soft2 (Softmax holds input 0, axis 1 rigid)" in said
    else:
        assert "92.9% by soft, soft2 (Softmax holds input 0, axis 1 rigid); 7.1% by fc (Linear: an output" in said


def test_an_operator_without_a_rule_is_named_with_what_to_do():
    class Cumulated(tfx.Layer):
        def apply(self, params, *inputs):
            return inputs[0].cumsum(1)

    spec = tfx.serial(tfx.Input((4,)), a=L.Linear(4, 30), sum=Cumulated(), b=L.Linear(30, 6), c=L.Linear(6, 2))
    params = tfx.init(spec, torch.Generator().manual_seed(0))
    with pytest.raises(tfx.BudgetError) as caught:
        tfx.prune(params, spec, [], budget=tfx.Parameters(0.2))
    assert "42.9% by sum (Cumulated has no axis signature)" in str(caught.value)  # 150 of 150 + 186 + 14 = 350
    assert "`tfx.interop.rule`" in str(caught.value)
