"""The oracle, what forecasts it, and how scores compare with it: laws on random networks in float64."""

import sys

import hypothesis.strategies as st
import numpy as np
import optree
import pytest
import torch
from constructs import CONSTRUCTS, classifier
from hypothesis import assume, example, given
from scipy import stats
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.report.plots import plot_fidelity, plot_frontier
from taylorfx.testing.strategies import network, networks, random_plan
from taylorfx.truth.correlations import correlations

SEEDS = st.integers(0, 2**16)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
SMOOTH = classifier(L.BatchNorm2d(4), L.GELU(), tfx.residual(L.Conv2d(4, 4, 3, padding=1)), L.Tanh(), channels=4)


def pinned(law):
    """The law, run on every construct by name besides the random networks."""
    for spec in CONSTRUCTS.values():
        law = example(network(spec), 1)(law)
    return given(networks(), SEEDS)(law)


def singles(batch):
    """Every example as a batch of one."""
    inputs, targets = batch
    return [({name: x[k : k + 1] for name, x in inputs.items()}, targets[k : k + 1]) for k in range(len(targets))]


def ask(net, **options):
    return tfx.truth.oracle(net.params, net.spec, net.batch, net.coupling, **options)


def random_gates(net, seed):
    return 0.5 + torch.rand(len(net.coupling), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(one, other, **close):
    """Two oracles tell the same, whatever the order in which they were asked about the units."""
    order = [other.units.index(name) for name in one.units]
    assert one.n == other.n
    assert_close(one.loss, other.loss, **CLOSE)
    for field in ("sum", "sum_abs"):
        assert_close(getattr(one, field), getattr(other, field)[:, order], **{**CLOSE, **close})


# The oracle.


@pinned
def test_the_oracle_is_what_the_loss_does_when_a_plan_drops_just_that_unit(net, seed):
    coupling, truth = net.coupling, ask(net)
    wholes = [tfx.cross_entropy(tfx.apply(net.params, net.spec, x), y) for x, y in singles(net.batch)]
    assert_close(truth.loss, sum(wholes)[0], **CLOSE)
    assert truth.units == coupling.names
    for unit in np.flatnonzero(coupling.exact):
        try:
            plan = tfx.Plan(coupling, np.arange(len(coupling)) != unit)
        except tfx.PlanError:  # the last of an axis cannot be cut
            continue
        small = tfx.cut(net.params, plan)
        cuts = [tfx.cross_entropy(tfx.apply(small, plan.spec, x), y) for x, y in singles(net.batch)]
        change = torch.cat(cuts) - torch.cat(wholes)
        assert_close(truth.signed()[unit], change.mean(), **CLOSE)
        assert_close(truth.absolute()[unit], change.mean().abs(), **CLOSE)
        assert_close(truth.mean_absolute()[unit], change.abs().mean(), **CLOSE)
        for half in (0, 1):
            assert_close(truth.signed(half)[unit], change[half::2].mean(), **CLOSE)
            assert_close(truth.mean_absolute(half)[unit], change[half::2].abs().mean(), **CLOSE)


@pinned
def test_the_oracle_is_the_same_in_chunks_in_any_order_and_of_split_batches(net, seed):
    truth, count = ask(net), len(net.coupling)
    order = np.random.default_rng(seed).permutation(count).tolist()
    same(truth, ask(net, units=order, chunk=1 + seed % 4))
    same(ask(net, units=order[:2]), ask(net, units=order[1::-1], chunk=2))
    parts = [tfx.truth.oracle(net.params, net.spec, one, net.coupling) for one in singles(net.batch)]
    same(truth, sum(parts))
    same(truth, parts[0] + (parts[1] + parts[2]))
    back = parts[2] + parts[1] + parts[0]
    assert_close(back.signed(), truth.signed(), **CLOSE)
    assert_close(back.mean_absolute(), truth.mean_absolute(), **CLOSE)


def test_batches_may_come_from_an_iterator():
    net = network(CONSTRUCTS["dense"])
    same(ask(net), tfx.truth.oracle(net.params, net.spec, iter(singles(net.batch)), net.coupling))


def test_losses_of_ones_own_are_asked_example_by_example():
    net = network(CONSTRUCTS["dense"])
    mine = ask(net, loss=lambda outputs, targets: torch.nn.functional.cross_entropy(outputs, targets, reduction="sum"))
    same(ask(net), mine)


def test_the_oracle_follows_single_precision_and_asks_for_no_gradients():
    net = network(CONSTRUCTS["chain"])
    single = tfx.tree.unflatten((path, leaf.float()) for path, leaf in tfx.tree.flatten(net.params).items())
    trained, buffers = tfx.partition(single, net.spec)
    params = tfx.tree.combine(optree.tree_map(torch.Tensor.requires_grad_, trained), buffers)
    batch = ({name: x.float() for name, x in net.batch[0].items()}, net.batch[1])
    truth = tfx.truth.oracle(params, net.spec, batch, net.coupling)
    assert truth.sum.dtype == torch.float32
    assert_close(truth.signed().double(), ask(net).signed(), rtol=1e-3, atol=1e-5)
    forecasts = [
        f(params, net.spec, batch, net.coupling) for f in (tfx.truth.exact_second_order, tfx.truth.path_integral)
    ]
    assert not any(x.requires_grad for x in (truth.sum, truth.loss, *forecasts))


def test_a_progress_bar_is_drawn_on_request_and_needs_rich(monkeypatch):
    net = network(CONSTRUCTS["untracked batch norm"])
    same(ask(net), ask(net, progress=True))
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    same(ask(net), ask(net))
    with pytest.raises(ImportError, match="pip install rich"):
        ask(net, progress=True)


# Derivatives at any gates.


@pinned
def test_gradients_at_any_gates_are_those_of_the_gated_network(net, seed):
    assume(not net.coupling.mixing)
    values = random_gates(net, seed)

    def loss(values, inputs, targets):
        outputs = tfx.apply(net.params, net.spec, inputs, gates=tfx.gates(net.coupling, values))
        return torch.nn.functional.cross_entropy(outputs, targets)

    rows = torch.stack([torch.func.grad(loss)(values, *one) for one in singles(net.batch)])
    given = net.params, net.spec, *net.batch, net.coupling
    assert_close(tfx.truth.gradient(*given, values), rows.sum(0), **CLOSE)
    assert_close(tfx.truth.gradient(*given, values.repeat(3, 1)), rows, **CLOSE)
    losses = torch.stack([loss(values, *one) for one in singles(net.batch)])
    assert_close(tfx.truth.gated_loss(*given, values), losses, **CLOSE)
    whole = torch.ones(3, len(values), dtype=torch.float64)
    assert_close(tfx.truth.gradient(*given, whole), tfx.derivatives(*given)[1], **CLOSE)


@pinned
def test_curvature_is_the_change_of_the_gradient_and_symmetric(net, seed):
    given, values = (net.params, net.spec, *net.batch, net.coupling), random_gates(net, seed)
    generator = torch.Generator().manual_seed(seed)
    one, two = torch.randn(2, len(values), generator=generator, dtype=torch.float64)
    (slope, bend), (_, other) = (tfx.truth.curvature(*given, values, along) for along in (one, two))
    assert_close(slope, tfx.truth.gradient(*given, values), **CLOSE)
    assert_close(two @ bend, one @ other, **CLOSE)

    def change(step):
        ends = [tfx.truth.gradient(*given, values + sign * step * one) for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * step)

    if (change(1e-5) - change(5e-6)).abs().max() < 1e-6:  # else a kink lies within the step
        assert_close(bend, change(1e-5), rtol=1e-5, atol=1e-6)


# Forecasts.


def loss_at(net, values):
    """The mean loss at some gates."""
    losses = [tfx.truth.gated_loss(net.params, net.spec, *one, net.coupling, values) for one in singles(net.batch)]
    return torch.cat(losses).mean()


@pinned
def test_exact_second_order_equals_finite_differences(net, seed):
    scores = tfx.truth.exact_second_order(net.params, net.spec, net.batch, net.coupling, chunk=1 + seed % 5)
    whole = torch.ones(len(net.coupling), dtype=torch.float64)
    middle = loss_at(net, whole)

    def forecast(unit, step):
        up, down = (loss_at(net, whole.index_fill(0, torch.tensor(unit), 1 + s)) for s in (step, -step))
        return (up - 2 * middle + down) / (2 * step**2) - (up - down) / (2 * step)

    for unit in np.random.default_rng(seed).permutation(len(whole))[:4]:
        if (forecast(unit, 1e-3) - forecast(unit, 5e-4)).abs() < 1e-5:  # else a kink lies within the step
            assert_close(scores[unit], forecast(unit, 5e-4), rtol=1e-4, atol=1e-5)


@pinned
def test_the_path_integral_converges_to_the_oracle(net, seed):
    found = tfx.truth.path_integral(net.params, net.spec, net.batch, net.coupling, nodes=16, chunk=1 + seed % 3)
    truth = ask(net).signed()
    assert (found - truth).abs().max() < 0.05 * truth.abs().max() + 5e-3  # kinks leave it that far off, at most


@given(SEEDS)
def test_on_smooth_networks_the_path_integral_is_exact_with_few_nodes(seed):
    net = network(SMOOTH, seed)
    plan = random_plan(net.coupling, torch.Generator().manual_seed(seed))
    found = tfx.truth.path_integral(net.params, net.spec, net.batch, net.coupling, nodes=16)
    assert_close(found, ask(net).signed(), rtol=1e-6, atol=1e-7)
    shares = tfx.truth.plan_path_integral(net.params, net.spec, net.batch, plan, nodes=16)
    keep = torch.tensor(plan.keep)
    assert_close(shares.sum(), loss_at(net, keep.double()) - loss_at(net, torch.ones(len(keep)).double()), **CLOSE)
    assert not shares[keep].any()


@given(SEEDS, st.integers(1, 3))
def test_on_polynomials_in_the_gates_forecasts_are_exact(seed, depth):
    """A linear network in which a unit is read ``depth`` times has a squared error of degree ``2 depth``."""
    blocks = [tfx.residual(L.Linear(4, 4)) for _ in range(depth - 1)]
    net = network(tfx.serial(tfx.Input(3), L.Linear(3, 4), *blocks, L.Linear(4, 2)), seed)
    batch = (net.batch[0], torch.randn(3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    given = (net.params, net.spec, batch)

    def squared(outputs, targets):
        return (outputs - targets).square().sum(1)

    truth = tfx.truth.oracle(*given, net.coupling, loss=squared).signed()
    assert_close(tfx.truth.path_integral(*given, net.coupling, loss=squared, nodes=depth), truth, **CLOSE)
    plan = random_plan(net.coupling, torch.Generator().manual_seed(seed))
    after = squared(tfx.apply(tfx.cut(net.params, plan), plan.spec, batch[0]), batch[1])
    change = (after - squared(tfx.apply(net.params, net.spec, batch[0]), batch[1])).mean()
    assert_close(tfx.truth.plan_path_integral(*given, plan, loss=squared, nodes=depth).sum(), change, **CLOSE)
    if depth == 1:
        assert_close(tfx.truth.exact_second_order(*given, net.coupling, loss=squared), truth, **CLOSE)
        assert_close(tfx.truth.plan_second_order(*given, plan, loss=squared), change, **CLOSE)


@given(networks(), SEEDS)
def test_a_plan_of_one_unit_is_forecast_as_the_unit(net, seed):
    unit = seed % len(net.coupling)
    given = (net.params, net.spec, net.batch)
    try:
        plan = tfx.Plan(net.coupling, np.arange(len(net.coupling)) != unit)
    except tfx.PlanError:
        assume(False)
    second, path = (f(*given, net.coupling)[unit] for f in (tfx.truth.exact_second_order, tfx.truth.path_integral))
    assert_close(tfx.truth.plan_second_order(*given, plan), second, **CLOSE)
    assert_close(tfx.truth.plan_path_integral(*given, plan)[unit], path, **CLOSE)


# Fidelity.


TARGETS = st.sampled_from([tfx.truth.Oracle.signed, tfx.truth.Oracle.absolute, tfx.truth.Oracle.mean_absolute])


@given(networks(), SEEDS, TARGETS)
def test_the_oracles_own_scores_rank_as_the_oracle(net, seed, target):
    truth = ask(net)
    scores = target(truth)
    assume(len(scores.unique()) > 1)
    shuffled = scores[torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))]
    given = {"own": scores, "monotone": torch.exp(3 * scores), "reversed": -scores, "shuffled": shuffled}
    found = tfx.truth.fidelity(given, truth, net.coupling, target=target, resamples=50)
    for name, value in (("own", 1), ("monotone", 1), ("reversed", -1)):
        for kind in (found.spearman, found.kendall):
            assert kind[name] == pytest.approx((value, value, value))
    expected = stats.spearmanr(shuffled, scores).statistic, stats.kendalltau(shuffled, scores).statistic
    assert (found.spearman["shuffled"].value, found.kendall["shuffled"].value) == pytest.approx(expected)
    assert found.spearman["shuffled"].low <= found.spearman["shuffled"].high
    for some in (found, *found.layers.values()):
        assert np.isnan(some.ceiling) or -1 <= some.ceiling <= 1
    assert [len(layer.truth) for layer in found.layers.values()] == net.coupling.sizes.tolist()
    for k, layer in enumerate(found.layers.values()):
        assert_close(layer.truth, scores[torch.from_numpy(net.coupling.scope == k)], **CLOSE)
        assert layer.spearman["own"].value == pytest.approx(1 if len(layer.truth.unique()) > 1 else np.nan, nan_ok=True)


@given(SEEDS, st.integers(2, 40), st.integers(1, 12))
def test_correlations_are_scipys_in_every_resample(seed, count, levels):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(levels, (2, count), generator=generator)
    drawn = torch.randint(count, (5, count), generator=generator)
    rho, tau = correlations(x, y, torch.stack([row.bincount(minlength=count) for row in drawn], 1))
    for k, row in enumerate(drawn):
        if len(x[row].unique()) > 1 and len(y[row].unique()) > 1:
            assert rho[k].item() == pytest.approx(stats.spearmanr(x[row], y[row]).statistic, abs=1e-9)
            assert tau[k].item() == pytest.approx(stats.kendalltau(x[row], y[row]).statistic, abs=1e-9)
        else:
            assert rho[k].isnan()
            assert tau[k].isnan()


def noisy(noise, examples=400, units=200):
    """An oracle whose examples differ from the truth by noise, and the truth."""
    generator = torch.Generator().manual_seed(0)
    spec = tfx.serial(tfx.Input(2), L.Linear(2, units), L.Linear(units, 2))
    coupling = tfx.couple(tfx.init(spec, generator), spec)
    truth = torch.randn(units, generator=generator, dtype=torch.float64)
    changes = truth + noise * torch.randn(examples, units, generator=generator, dtype=torch.float64)
    sums, sizes = (torch.stack([x[half::2].sum(0) for half in (0, 1)]) for x in (changes, changes.abs()))
    return tfx.truth.Oracle(examples, torch.zeros(()), sums, sizes, coupling.names), truth, coupling


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 1.0), (20.0, 0.5), (1e4, 0.0)])
def test_the_noise_ceiling_is_the_oracles_correlation_with_another_of_as_many_examples(noise, expected):
    """With noise as strong as what is to be seen, ``20 / sqrt(400)``, Pearson's reliability is a half."""
    one, truth, coupling = noisy(noise)
    found = tfx.truth.fidelity({"truth": truth}, one, coupling, resamples=10)
    assert found.ceiling == pytest.approx(expected, abs=0.15)
    half = stats.spearmanr(one.signed(0), one.signed(1)).statistic
    assert found.ceiling == pytest.approx(2 * half / (1 + half))
    if 0 < expected < 1:  # the truth without its noise cannot do better than the root of the reliability
        assert found.spearman["truth"].value == pytest.approx(expected**0.5, abs=0.1)


def test_intervals_cover_the_correlation_at_their_level():
    """Of 100 samples of units from a population with a known correlation, most intervals hold it."""
    generator, covered = torch.Generator().manual_seed(0), 0
    mixing, true = 0.6, 6 / np.pi * np.arcsin(0.6 / 2)  # Spearman's rho of a normal with Pearson's .6
    _, _, coupling = noisy(0.0)
    for _ in range(100):
        x, y = torch.randn(2, 200, generator=generator, dtype=torch.float64)
        seen = mixing * x + (1 - mixing**2) ** 0.5 * y
        truth = tfx.truth.Oracle(2, torch.zeros(()), torch.stack([x, x]), torch.stack([x.abs()] * 2), coupling.names)
        interval = tfx.truth.fidelity({"seen": seen}, truth, coupling, resamples=200, level=0.9).spearman["seen"]
        covered += interval.low <= true <= interval.high
    assert 80 <= covered <= 98


def test_fidelity_draws_from_its_generator_and_looks_at_the_oracles_units_alone():
    net = network(CONSTRUCTS["residual stream"])
    scores = {"weight": tfx.criteria.weight_l2(net.params, net.coupling)}
    one, two, other = (
        tfx.truth.fidelity(scores, ask(net), net.coupling, generator=torch.Generator().manual_seed(seed)).spearman[
            "weight"
        ]
        for seed in (0, 0, 1)
    )
    assert one == two
    assert one.value == other.value
    assert one != other
    units = [7, 2, 5, 3, 11]
    some = tfx.truth.fidelity(scores, ask(net, units=units), net.coupling)
    assert_close(some.truth, ask(net).signed()[units], **CLOSE)
    assert torch.equal(some.scores["weight"], scores["weight"][units])


def test_printing_a_fidelity_gives_its_table():
    net = network(CONSTRUCTS["residual stream"])
    truth = ask(net)
    scores = {"weight": tfx.criteria.weight_l2(net.params, net.coupling), "oracle": truth.signed()}
    text = str(tfx.truth.fidelity(scores, truth, net.coupling))
    lines = text.splitlines()
    assert lines[0].startswith("13 units, noise ceiling of Spearman ")
    assert lines[4].split()[:2] == ["oracle", "1.00"]  # the best first
    assert lines[5].split()[0] == "weight"
    assert {line.split()[0] for line in lines[-len(net.coupling.scopes) :]} == set(net.coupling.scopes)


# Plots.


def test_a_fidelity_is_plotted(tmp_path):
    net = network(CONSTRUCTS["residual stream"])
    truth = ask(net)
    scores = {"oracle": truth.signed(), "equal": torch.zeros(13)}
    figure = plot_fidelity(tfx.truth.fidelity(scores, truth, net.coupling), title="a title")
    bars, *panels = figure.axes
    assert [label.get_text() for label in bars.get_yticklabels()] == ["oracle", "equal"]
    assert bars.patches[0].get_width() == pytest.approx(1)
    x, y = panels[0].collections[0].get_offsets().T
    assert sorted(x) == list(range(1, 14))
    assert np.array_equal(x, y)
    figure.savefig(tmp_path / "fidelity.png")
    assert (tmp_path / "fidelity.png").stat().st_size > 10_000


def test_a_frontier_is_plotted_in_the_order_of_costs(tmp_path):
    lines = {
        "one": [(0.5, tfx.truth.Interval(0.9, 0.8, 0.95)), (0.3, tfx.truth.Interval(0.6, 0.5, 0.7))],
        "two": [(0.3, tfx.truth.Interval(0.4, 0.4, 0.4))],
    }
    figure = plot_frontier(lines, whole=0.97, title="a title")
    (axes,) = figure.axes
    assert axes.lines[0].get_xydata().tolist() == [[0.3, 0.6], [0.5, 0.9]]
    assert axes.collections[0].get_datalim(axes.transData).bounds == pytest.approx((0.3, 0.5, 0.2, 0.45))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two", "unpruned"]
    figure.savefig(tmp_path / "frontier.png")


def test_plots_say_that_they_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_frontier({})


# Refusals.


NET = network(CONSTRUCTS["chain"])
OTHER = network(CONSTRUCTS["dense"])
TRUTH = ask(NET)
GOOD = torch.arange(len(NET.coupling)) * 1.0
HOLES = GOOD.index_fill(0, torch.tensor([2, 5]), torch.nan)
INFINITE = tfx.tree.unflatten((path, leaf * torch.inf) for path, leaf in tfx.tree.flatten(NET.params).items())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ask(NET, units=[0, 99]), ["0 to 8", "[99]"]),
        (lambda: ask(NET, units=[1, 1]), ["each once", "1 twice"]),
        (lambda: ask(NET, units=[]), ["at least one"]),
        (lambda: ask(NET, chunk=0), ["chunk=0"]),
        (lambda: tfx.truth.oracle(NET.params, NET.spec, [], NET.coupling), ["no batch"]),
        (lambda: tfx.truth.oracle(NET.params, NET.spec, [NET.batch[0]], NET.coupling), ["pair", "batch 0"]),
        (lambda: tfx.truth.oracle(NET.params, NET.spec, NET.batch, OTHER.coupling), ["Couple again"]),
        (lambda: tfx.truth.oracle(INFINITE, NET.spec, NET.batch, NET.coupling), ["finite", "first 0[0]"]),
        (lambda: TRUTH + ask(NET, units=[0, 1]), ["9 and 2 units"]),
        (lambda: tfx.truth.exact_second_order(NET.params, NET.spec, [], NET.coupling), ["no batch"]),
        (
            lambda: tfx.truth.path_integral(NET.params, NET.spec, NET.batch, NET.coupling, nodes=0),
            ["at least one node"],
        ),
        (
            lambda: tfx.truth.plan_second_order(
                NET.params, OTHER.spec, NET.batch, tfx.Plan(NET.coupling, np.ones(9, bool))
            ),
            ["again"],
        ),
        (lambda: tfx.truth.fidelity({"a": HOLES, "b": GOOD[:3]}, TRUTH, NET.coupling), ["a: 2 of 9", "b: (3,)"]),
        (lambda: tfx.truth.fidelity({}, TRUTH, NET.coupling), ["no scores"]),
        (lambda: tfx.truth.fidelity({"a": GOOD}, ask(OTHER), NET.coupling), ["an oracle of", "does not have"]),
        (lambda: tfx.truth.fidelity({"a": GOOD}, TRUTH, NET.coupling, resamples=0), ["resamples=0"]),
        (lambda: tfx.truth.fidelity({"a": GOOD}, TRUTH, NET.coupling, level=95), ["level=95"]),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(call, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the words are looked at below)
        call()
    for word in words:
        assert word in str(error.value)
