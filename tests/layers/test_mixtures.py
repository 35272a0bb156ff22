"""Mixtures of experts: an expert whose gate is zero is one that the router does not know, and so is one that is cut."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.layers.roles import Experts
from taylorfx.network.run import evaluate
from taylorfx.testing.strategies import random_params

TOKENS, WIDTH, HIDDEN = 4, 5, 3


def mixture(experts, top_k, score="softmax", biased=False):
    """A network of one mixture of gated experts between two linear layers; the largest weights are not normalized.

    With a bias, the router chooses by the sum with it, and the experts' outputs have biases of their own.
    """
    spread, shift = (1, TOKENS, 1, WIDTH), ("shift",) * biased
    down = [
        tfx.Node("down", L.ExpertLinear(experts, HIDDEN, WIDTH, top_k, score), ("ones", "router", "hidden", *shift))
    ]
    if biased:
        down = [
            tfx.Node("turned", L.ExpertLinear(experts, HIDDEN, WIDTH, top_k, score, transposed=True),
                     ("ones", "router", "hidden", "shift")),
            tfx.Node("bias", L.ExpertBias(experts, WIDTH, top_k, score), ("ones", "router", "shift")),
            tfx.Node("down", L.Add(), ("turned", "bias")),
        ]  # fmt: skip
    nodes = [
        tfx.Node("x", L.Input((TOKENS, 6))),
        tfx.Node("stream", L.Linear(6, WIDTH), ("x",)),
        tfx.Node("router", L.Linear(WIDTH, experts), ("stream",)),
        tfx.Node("ones", L.Ones(), ("router",)),
        *[tfx.Node("shift", L.Parameter((experts,)))] * biased,
        tfx.Node("weights", L.TopKWeights(top_k, score), ("ones", "router", *shift)),
        tfx.Node("thin", L.View(spread), ("stream",)),
        tfx.Node("rows", L.Expand((-1, -1, top_k, -1)), ("thin",)),
        tfx.Node("gate", L.ExpertLinear(experts, WIDTH, HIDDEN, top_k, score), ("ones", "router", "rows", *shift)),
        tfx.Node("up", L.ExpertLinear(experts, WIDTH, HIDDEN, top_k, score), ("ones", "router", "rows", *shift)),
        tfx.Node("silu", L.SiLU(), ("gate",)),
        tfx.Node("hidden", L.Multiply(), ("silu", "up")),
        *down,
        tfx.Node("column", L.View((1, TOKENS, top_k, 1)), ("weights",)),
        tfx.Node("weighted", L.Multiply(), ("down", "column")),
        tfx.Node("sum", L.Reduce("sum", (2,)), ("weighted",)),
        tfx.Node("add", L.Add(), ("stream", "sum")),
        tfx.Node("head", L.Linear(WIDTH, 2), ("add",)),
        tfx.Node("mean", L.Reduce("mean", (1,)), ("head",)),
    ]
    return tfx.Spec(tuple(nodes), ("mean",))


def by_hand(params, x, top_k, without=(), score="softmax", gates=None):
    """The mixture with loops over tokens and experts, some of which are not there."""
    stream = F.linear(x, params["stream"]["weight"], params["stream"]["bias"])
    logits = F.linear(stream, params["router"]["weight"], params["router"]["bias"])
    if gates is not None:  # each multiplies its expert's number of the softmax, or its sigmoid
        p = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        logits = logits + (gates * (1 - p) / (1 - gates * p)).log()
    others = [e for e in range(logits.shape[-1]) if e not in without]
    total = stream.clone()
    for place in np.ndindex(x.shape[:2]):
        left = logits[place][others]
        scores = left.softmax(0) if score == "softmax" else left.sigmoid()
        rank = scores + params["shift"][others] if "shift" in params else scores
        for k in rank.argsort(descending=True)[:top_k].tolist():
            e = others[k]
            gate, up = (params[name]["weight"][e] @ stream[place] for name in ("gate", "up"))
            hidden = F.silu(gate) * up
            if "down" in params:
                y = params["down"]["weight"][e] @ hidden
            else:
                y = hidden @ params["turned"]["weight"][e] + params["bias"]["bias"][e]
            total[place] += scores[k] * y
    return F.linear(total, params["head"]["weight"], params["head"]["bias"]).mean(1)


def case(experts, top_k, seed, *kind):
    generator = torch.Generator().manual_seed(seed)
    spec = mixture(experts, top_k, *kind)
    params = random_params(spec, generator)
    x = torch.randn(3, TOKENS, 6, generator=generator, dtype=torch.float64)
    return params, spec, x, tfx.couple(params, spec)


KINDS = st.tuples(st.sampled_from(["softmax", "sigmoid"]), st.booleans())


@given(st.data(), st.integers(2, 6), st.integers(1, 3), st.integers(0, 2**16), KINDS)
def test_what_is_cut_is_what_is_gated_and_what_a_router_without_these_experts_does(data, experts, top_k, seed, kind):
    top_k = min(top_k, experts)
    params, spec, x, coupling = case(experts, top_k, seed, *kind)
    assert coupling.exact.all()
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(coupling), max_size=len(coupling))))
    for scope in range(len(coupling.scopes)):
        keep[np.flatnonzero(coupling.scope == scope)[:1]] = True
    plan = tfx.Plan(coupling, keep)
    gated = tfx.apply(params, spec, x, gates=plan.gates)
    assert_close(tfx.apply(tfx.cut(params, plan), plan.spec, x), gated, rtol=1e-11, atol=1e-11)
    alone = keep | (coupling.scope != coupling.scopes.index("router"))
    left = int((keep & ~(coupling.scope != coupling.scopes.index("router"))).sum())
    without = np.flatnonzero(~alone[coupling.scope == coupling.scopes.index("router")])
    expected = by_hand(params, x, min(top_k, left), without, kind[0])
    assert_close(tfx.apply(params, spec, x, gates=tfx.Plan(coupling, alone).gates), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", [("softmax", False), ("sigmoid", False), ("sigmoid", True), ("softmax", True)])
def test_the_derivative_by_an_experts_gate_is_that_by_its_number_of_the_softmax(kind):
    params, spec, x, coupling = case(5, 2, 0, *kind)
    targets = torch.tensor([0, 1, 0])
    stats = tfx.measure(params, spec, (x, targets), coupling)
    gates = torch.ones(5, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(by_hand(params, x, 2, score=kind[0], gates=gates), targets, reduction="sum").backward()
    units = coupling.unit_ids("router.bias", 0)[0]
    assert_close(stats.sum[units], gates.grad)


def test_an_expert_that_gets_a_whole_position_is_missed_where_its_logit_hardly_counts():
    """What the loss would be without it is the forecast of the first order, with two experts of a softmax exactly."""
    logits = torch.tensor([[9.0, 0.0]], dtype=torch.float64)
    values, ones = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)

    def output(ones):
        weights = L.TopKWeights(2).apply({}, ones, logits)
        numbers = L.ExpertLinear(2, 1, 1, 2).role(Experts).numbers(ones, logits, torch.zeros(1, 2, 1))
        return (weights * values[numbers.clamp(min=0)]).sum()

    slope = torch.func.grad(output)(ones)[0, 0]
    assert_close(slope, output(ones) - output(torch.tensor([[0.0, 1.0]], dtype=torch.float64)))
    assert slope > 1.9


def test_derivatives_at_a_gate_of_zero_are_finite_and_those_of_differences():
    params, spec, x, coupling = case(4, 2, 1)
    targets, values = torch.tensor([0, 1, 0]), torch.ones(len(coupling), dtype=torch.float64)
    (unit,) = coupling.unit_ids("router.bias", 0)[0][:1]
    values[unit] = 0
    gradient = tfx.truth.gradient(params, spec, x, targets, coupling, values)
    assert gradient.isfinite().all()

    def loss(gate):
        at = values.clone()
        at[unit] = gate
        output = tfx.apply(params, spec, x, gates=tfx.gates(coupling, at))
        return F.cross_entropy(output, targets, reduction="sum")

    # Below its rank the expert is not among the chosen ones, but it takes part in the softmax.
    assert_close(gradient[unit], (loss(1e-6) - loss(0.0)) / 1e-6, rtol=1e-4, atol=1e-6)


def test_an_expert_that_may_not_be_chosen_does_not_hide_the_others():
    ones, logits = torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[500.0, 1.0, 2.0]])
    assert_close(L.TopKWeights(2).apply({}, ones, logits), logits[:, 1:].softmax(-1).flip(-1))
    experts = L.ExpertLinear(3, 1, 1, 2).role(Experts)
    assert experts.numbers(ones, logits, torch.zeros(1, 2, 1)).tolist() == [[2, 1]]
    assert L.TopKWeights(2).apply({}, torch.zeros(1, 3), logits).tolist() == [[0, 0]]  # nothing may be chosen


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_rows_go_through_their_experts_however_these_are_found(lead):
    layer, generator = L.ExpertLinear(4, 3, 5, 2), torch.Generator().manual_seed(0)
    params = layer.init(generator)
    logits, x = torch.randn(*lead, 4, generator=generator), torch.randn(*lead, 2, 3, generator=generator)
    logits[..., 3] = -9  # chosen nowhere
    ones = torch.ones_like(logits)
    expected = torch.einsum("...oi,...i->...o", params["weight"][logits.topk(2)[1]], x)
    assert_close(layer.apply(params, ones, logits, x), expected)
    assert_close(torch.func.vmap(lambda x: layer.apply(params, ones, logits, x))(x[None])[0], expected)
    compiled = torch.compile(lambda x: layer.apply(params, ones, logits, x), backend="eager", fullgraph=True)
    assert_close(compiled(x), expected)


def test_experts_cost_the_router_and_their_parameters():
    params, _, _, coupling = case(4, 2, 0)
    (unit,) = coupling.unit_ids("router.bias", 0)[0][:1]
    plan = tfx.Plan(coupling, np.arange(len(coupling)) != unit)
    after = tfx.couple(tfx.cut(params, plan), plan.spec)
    saved = [cost(coupling).total - cost(after).total for cost in (tfx.cost.flops, tfx.cost.parameters)]
    assert saved == [2 * TOKENS * WIDTH, WIDTH + 1 + 3 * WIDTH * HIDDEN]


def test_reap_is_the_weighted_norm_of_what_an_expert_adds():
    params, spec, x, coupling = case(5, 2, 3)
    sums = torch.zeros(2, 5, dtype=torch.float64)
    stream = F.linear(x, params["stream"]["weight"], params["stream"]["bias"])
    probabilities = F.linear(stream, params["router"]["weight"], params["router"]["bias"]).softmax(-1)
    for e in range(5):
        gate, up, down = (params[name]["weight"][e] for name in ("gate", "up", "down"))
        norms = F.linear(F.silu(stream @ gate.T) * (stream @ up.T), down).norm(dim=-1)
        routed = probabilities.topk(2)[1].eq(e).any(-1)
        sums[:, e] = torch.stack([(probabilities[..., e] * norms)[routed].sum(), routed.sum()])
    targets = torch.zeros(3, dtype=torch.long)
    batches = [(x[:1], targets[:1]), (x[1:], targets[1:])]
    scores = tfx.criteria.reap(params, spec, batches, coupling)
    units = coupling.unit_ids("router.bias", 0)[0]
    assert_close(scores[units], sums[0] / sums[1].clamp(min=1))
    others = [name for name in coupling.scopes if name != "router"]
    _, smaller = tfx.prune(
        params, spec, batches, budget=tfx.Remove(2), criterion=tfx.criteria.reap, protect=others, steps=1
    )
    assert smaller["gate"].layer.num_experts == 3


def test_reap_without_experts_is_refused():
    spec = tfx.serial(L.Input((3,)), L.Linear(3, 4), L.Linear(4, 2))
    params = random_params(spec, torch.Generator())
    batch = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="received a network without any"):
        tfx.criteria.reap(params, spec, batch, tfx.couple(params, spec))


def sums(params, spec, x, top_k, score):
    """What the matrices of all experts are multiplied with in the mixture's sum, and the sum: with a loop over rows."""
    seen = {}
    evaluate(params, spec, (x,), tap=lambda name, slot, value: seen.setdefault((name, slot), value))
    logits, hidden = seen["router", -1].flatten(0, 1), seen["hidden", -1].flatten(0, 1)
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    weights, chosen = scores.topk(min(top_k, logits.shape[-1]))
    rows = torch.zeros(len(logits), logits.shape[-1], hidden.shape[-1], dtype=x.dtype)
    for row, k in np.ndindex(*chosen.shape):
        rows[row, chosen[row, k]] = weights[row, k] * hidden[row, k]
    return rows.flatten(1), seen["sum", -1].flatten(0, 1)


@given(st.data(), st.integers(2, 6), st.integers(1, 3), st.integers(0, 2**16), st.sampled_from(["softmax", "sigmoid"]))
def test_no_other_matrices_let_a_mixture_that_lost_experts_come_closer_to_its_sum(data, experts, top_k, seed, score):
    top_k = min(top_k, experts)
    params, spec, _, coupling = case(experts, top_k, seed, score)
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(coupling), max_size=len(coupling))))
    keep |= coupling.scope == coupling.scopes.index("stream")
    for scope in range(len(coupling.scopes)):
        keep[np.flatnonzero(coupling.scope == scope)[:1]] = True
    plan = tfx.Plan(coupling, keep)
    x = torch.randn(60, TOKENS, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    small, smaller = tfx.reconstruct(params, plan, [(x[:20], None), (x[20:], None)], ridge=1e-10, biases=False)
    assert smaller == plan.spec
    _, target = sums(params, spec, x, top_k, score)
    rows, y = sums(small, smaller, x, top_k, score)
    best = rows @ torch.linalg.lstsq(rows, target, driver="gelsd").solution
    assert_close(y, best, rtol=1e-5, atol=1e-5)
    if keep.all():
        assert_close(small["down"]["weight"], params["down"]["weight"])


def test_repaired_experts_make_up_for_those_that_left():
    params, spec, x, coupling = case(6, 2, 5)
    keep = np.ones(len(coupling), bool)
    keep[coupling.unit_ids("router.bias", 0)[0][:3]] = False
    plan, expected = tfx.Plan(coupling, keep), tfx.apply(params, spec, x)
    cut = tfx.apply(tfx.cut(params, plan), plan.spec, x)
    repaired = tfx.apply(*tfx.reconstruct(params, plan, (x, None), ridge=1e-3), x)
    assert (repaired - expected).square().sum() < 0.1 * (cut - expected).square().sum()


def test_positions_that_do_not_count_teach_experts_nothing():
    params, _, x, coupling = case(5, 2, 1)
    keep = np.ones(len(coupling), bool)
    keep[coupling.unit_ids("router.bias", 0)[0][:2]] = False
    plan, mask = tfx.Plan(coupling, keep), torch.tensor([[1, 1, 1, 0]] * 3)
    other = torch.where(mask[:, :, None] == 0, 10.0, x)
    one, two, all_count = (
        tfx.reconstruct(params, plan, (inputs, None), positions=positions)[0]["down"]["weight"]
        for inputs, positions in ((x, lambda _: mask), (other, lambda _: mask), (x, None))
    )
    assert_close(one, two)
    assert not torch.allclose(one, all_count)


def test_experts_with_biases_stay_as_they_are():
    """Nothing sums what their matrices alone give out."""
    params, _, x, coupling = case(5, 2, 1, "softmax", True)
    keep = np.ones(len(coupling), bool)
    keep[coupling.unit_ids("router.bias", 0)[0][:2]] = False
    plan = tfx.Plan(coupling, keep)
    small, _ = tfx.reconstruct(params, plan, (x, None))
    assert torch.equal(small["turned"]["weight"], tfx.cut(params, plan)["turned"]["weight"])
    assert not torch.equal(small["head"]["weight"], params["head"]["weight"])
