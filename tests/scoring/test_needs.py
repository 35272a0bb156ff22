"""Criteria, constraints, repairs: whatever is wrong with them is said before a batch is measured, and what is right
works in `prune` and `iterate` alike."""

import functools

import pytest
import torch
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L

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
    criterion = tfx.criteria.of_weights(lambda params, coupling: late)
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

        needs = tfx.criteria.Needs(rows=True)

        def __call__(self, stats, coupling):
            return stats.rows.abs().amax(0)

    class Methods:
        @tfx.criteria.Needs(moments=True)
        def silent(self, stats, coupling):
            return tfx.criteria.apoz(stats, coupling)

    stats = tfx.measure(PARAMS, SPEC, BATCH, COUPLING, rows=True)
    expected = tfx.select(Steepest()(stats, COUPLING), COUPLING, budget=tfx.Units(9)).spec
    assert pruned(budget=tfx.Units(9), criterion=Steepest())[1] == expected
    silent = pruned(budget=tfx.Units(9), criterion=tfx.criteria.apoz)[1]
    assert pruned(budget=tfx.Units(9), criterion=Methods().silent)[1] == silent
    plain = functools.partial(lambda stats, coupling: tfx.criteria.apoz(stats, coupling))
    assert pruned(budget=tfx.Units(9), criterion=plain, moments=True)[1] == silent
    with pytest.raises(ValueError, match=r"tfx\.criteria\.Needs\(moments=True\)"):
        pruned(budget=tfx.Units(9), criterion=plain)


def test_criteria_of_one_thing_say_so_when_they_receive_another():
    with pytest.raises(ValueError, match=r"of the parameters; received statistics.*tfx\.criteria\.of_weights"):
        pruned(criterion=lambda params, coupling: tfx.criteria.weight_l2(params, coupling))
    with pytest.raises(ValueError, match="of the statistics that `measure` gives; received dict"):
        pruned(criterion=tfx.criteria.of_weights(lambda params, coupling: tfx.taylor(params, coupling)))
    for wrong in ({"of": "weight"}, {"of": "weights", "moments": True}):
        with pytest.raises(ValueError, match="A criterion is of statistics, weights, units, network"):
            tfx.criteria.Needs(**wrong)


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
