"""Mixtures of experts of transformers: captured from any implementation, cut, scored and saved."""

import importlib.util

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx.interop import huggingface

pytest.importorskip("transformers")

if importlib.util.find_spec("torchvision"):
    from _torchvision import library

    library()

from _huggingface import DECODER, FAMILIES, random_model
from modules import captured

SIZES = DECODER | {"intermediate_size": 16, "num_experts_per_tok": 2}
MODELS = {
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen3MoeForCausalLM": {
        "num_hidden_layers": 2, "num_experts": 5, "moe_intermediate_size": 16, "norm_topk_prob": False},
}  # fmt: skip


def model_of(kind, **changes):
    return random_model(kind, SIZES | MODELS[kind] | changes)


@pytest.fixture(scope="module", params=[("MixtralForCausalLM", "eager"), ("Qwen3MoeForCausalLM", "grouped_mm")])
def network(request):
    """A model whose experts run in one of their ways, and its network."""
    kind, way = request.param
    model = model_of(kind)
    model.config._experts_implementation = way
    network = huggingface.from_pretrained(model, outputs="logits")
    assert model.config._experts_implementation == way, "the module is left as it was"
    return kind, network, tfx.couple(network.params, network.spec)


def text(count, length, seed=0):
    tokens = torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def logits(params, spec, inputs, gates=None):
    return tfx.apply(params, spec, inputs, gates=gates)["logits"]


def numbers_of(coupling, layer):
    """The units of a layer's experts."""
    return coupling.unit_ids(f"model.layers.{layer}.mlp.gate.weight", 0)[0]


def test_experts_are_captured_whichever_way_they_run(network):
    _, (model, params, spec), coupling = network
    for count, length in ((3, 8), (2, 5), (1, 1), (1, 13)):
        inputs = text(count, length)
        with torch.no_grad():
            assert_close(logits(params, spec, inputs), model(**inputs).logits, rtol=1e-4, atol=1e-5)
    for layer in range(model.config.num_hidden_layers):
        scopes = {f"model.layers.{layer}.mlp: experts", f"model.layers.{layer}.mlp.experts: hidden"}
        assert scopes <= {*coupling.scopes} - {*coupling.frozen}
    assert not coupling.mixing, "examples are scored side by side"


def test_a_gate_of_zero_is_the_model_without_the_expert(network):
    kind, (model, params, spec), coupling = network
    stay = {0: [0, 3], 1: [1, 2, 3]} if len(model.model.layers) > 1 else {0: [0, 3]}
    keep = np.ones(len(coupling), bool)
    for layer, experts in stay.items():
        keep[numbers_of(coupling, layer)] = np.isin(np.arange(model.config.num_local_experts), experts)
    plan = tfx.Plan(coupling, keep)
    by_hand = model_of(kind)
    for layer, experts in stay.items():
        part = by_hand.model.layers[layer].mlp
        for owner, name in ((part.gate, "weight"), (part.experts, "gate_up_proj"), (part.experts, "down_proj")):
            setattr(owner, name, torch.nn.Parameter(getattr(owner, name)[experts].detach()))
        part.gate.num_experts = part.experts.num_experts = len(experts)
    inputs = text(3, 6)
    with torch.no_grad():
        expected = by_hand(**inputs).logits
    assert_close(logits(params, spec, inputs, plan.gates), expected, rtol=1e-4, atol=1e-5)
    assert_close(logits(tfx.cut(params, plan), plan.spec, inputs), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(params, spec, inputs), atol=1e-3)


@pytest.mark.parametrize(("family", "router"), [("GLM-4-MoE", "gate"), ("GPT-OSS", "router")])
def test_experts_leave_a_router_with_a_bias_and_experts_with_biases(family, router, tmp_path):
    kind, config, _ = FAMILIES[family]
    model, by_hand = (random_model(kind, config) for _ in range(2))
    for each in (model, by_hand):
        for path, x in each.named_buffers():
            if path.endswith("e_score_correction_bias"):
                x.copy_(torch.tensor([0.3, 0.0, -0.2, 0.1]))
    _, params, spec = huggingface.from_pretrained(model, outputs="logits")
    coupling, inputs, stay = tfx.couple(params, spec), text(3, 6), [1, 2, 3]
    units = coupling.unit_ids(f"model.layers.0.mlp.{router}.weight", 0)[0]
    keep = np.ones(len(coupling), bool)
    keep[units] = np.isin(np.arange(4), stay)
    plan = tfx.Plan(coupling, keep)
    for part in (getattr(by_hand.model.layers[0].mlp, router), by_hand.model.layers[0].mlp.experts):
        for name, x in [*part.named_parameters()]:
            setattr(part, name, torch.nn.Parameter(x[stay].detach()))
        for name, x in [*part.named_buffers()]:
            setattr(part, name, x[stay])
        part.num_experts = len(stay)
    with torch.no_grad():
        expected, whole = by_hand(**inputs).logits, model(**inputs).logits
    assert_close(logits(params, spec, inputs), whole, rtol=1e-4, atol=1e-5)
    assert_close(logits(params, spec, inputs, plan.gates), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, whole, atol=1e-4)
    small = tfx.cut(params, plan)
    again = huggingface.save_pretrained(tmp_path / "x", small, plan.spec, like=model, example_inputs=inputs)
    assert again.config.num_local_experts == len(stay)
    with torch.no_grad():
        assert_close(again(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_experts_leave_beside_all_other_units_exactly(network, seed):
    _, (_, params, spec), coupling = network
    params = tfx.tree.unflatten(
        {k: x.double() if x.is_floating_point() else x for k, x in tfx.tree.flatten(params).items()}
    )
    keep = (np.random.default_rng(seed).random(len(coupling)) < 0.7) | ~coupling.exact
    for scope in range(len(coupling.scopes)):
        keep[np.flatnonzero(coupling.scope == scope)[0]] = True
    plan, inputs = tfx.Plan(coupling, keep), text(2, 5, seed)
    cut = logits(tfx.cut(params, plan), plan.spec, inputs)
    assert_close(cut, logits(params, spec, inputs, plan.gates), rtol=1e-11, atol=1e-11)


def test_scores_are_derivatives_and_the_oracle_asks_for_the_experts(network):
    _, (_, params, spec), coupling = network
    batch = text(3, 6), text(3, 6)["input_ids"]
    stats = tfx.measure(params, spec, batch, coupling, loss=huggingface.next_token)
    ones = torch.ones(len(coupling))
    slopes = tfx.truth.gradient(params, spec, *batch, coupling, ones, loss=huggingface.next_token)
    assert_close(stats.sum, slopes, rtol=1e-3, atol=1e-6)
    units = numbers_of(coupling, 0).tolist()
    oracle = tfx.truth.oracle(params, spec, batch, coupling, loss=huggingface.next_token, units=units)
    for unit, change in zip(units, oracle.signed(), strict=True):
        gates = tfx.gates(coupling, torch.ones(len(coupling)).index_fill(0, torch.tensor(unit), 0))
        both = [huggingface.next_token(tfx.apply(params, spec, batch[0], gates=g), batch[1]) for g in (gates, None)]
        assert_close(change, (both[0] - both[1]).mean(), rtol=1e-3, atol=1e-6)


def test_reap_is_its_formula_on_the_modules_own_experts(network):
    kind, (_, params, spec), coupling = network
    model, inputs = model_of(kind), text(3, 6)
    model.config._experts_implementation = "eager"
    scores = tfx.criteria.reap(params, spec, (inputs, inputs["input_ids"]), coupling)
    for layer, block in enumerate(model.model.layers):
        experts, calls = block.mlp.experts, []
        hook = experts.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args))
        with torch.no_grad():
            model(**inputs)
            ((x, chosen, weights),) = calls
            hook.remove()
            for unit, e in zip(numbers_of(coupling, layer), range(experts.num_experts), strict=True):
                gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, -1)
                norms = (torch.nn.functional.silu(gate) * up @ experts.down_proj[e].T).norm(dim=-1)
                values = [weights[t, k] * norms[t] for t, k in (chosen == e).nonzero().tolist()]
                expected = torch.stack(values).mean() if values else torch.zeros(())
                assert_close(scores[unit].float(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", [
    "DeepSeek-V2", "DeepSeek-V3", "ERNIE-4.5-MoE", "GLM-4-MoE", "Granite-MoE", "Mixtral", "OLMoE", "Qwen2-MoE",
    "Qwen3-MoE",
])  # fmt: skip
def test_experts_that_stay_learn_to_make_up_for_those_that_left_and_the_class_holds_them(family, tmp_path):
    kind, config, _ = FAMILIES[family]
    model, inputs = random_model(kind, config), text(24, 8)
    _, params, spec = huggingface.from_pretrained(model, outputs="logits")
    coupling = tfx.couple(params, spec)
    experts = np.array([name.endswith(": experts") for name in coupling.scopes])[coupling.scope]
    plan = tfx.Plan(coupling, ~experts | (coupling.index > 0))
    cut = tfx.cut(params, plan)
    repaired, smaller = tfx.reconstruct(params, plan, (inputs, None), ridge=0.01, biases=False)
    assert smaller == plan.spec
    expected = logits(params, spec, inputs)
    before, after = ((logits(x, smaller, inputs) - expected).square().mean() for x in (cut, repaired))
    assert after < 0.9 * before
    again = huggingface.save_pretrained(tmp_path / "x", repaired, smaller, like=model, example_inputs=inputs)
    matrices = dict(again.named_parameters())
    moved = [path for path, x in tfx.tree.flatten(cut).items() if not torch.equal(x, matrices.get(path, x))]
    assert any(path.endswith("experts.down_proj") for path in moved)
    with torch.no_grad():
        assert_close(again(**inputs).logits, logits(repaired, smaller, inputs), rtol=1e-3, atol=1e-4)


def test_in_half_precision_the_length_stays_open_though_routers_choose_others():
    model = model_of("MixtralForCausalLM").bfloat16()
    _, params, spec = huggingface.from_pretrained(model, outputs="logits")
    inputs = text(4, 11)
    with torch.no_grad():
        expected, received = model(**inputs).logits, logits(params, spec, inputs)
    assert received.dtype == torch.bfloat16
    assert torch.isclose(expected, received, 0.03, 0.03).all(-1).float().mean() > 0.7


def test_as_many_experts_stay_as_a_router_chooses(network, tmp_path):
    _, (model, params, spec), coupling = network
    inputs = text(3, 8)
    rules = huggingface.holdable(model, params, spec, inputs)
    names = [name for name in coupling.scopes if name.endswith(": experts")]
    assert rules.floor == dict.fromkeys(names, 2)
    assert len(names) == 1 or tuple(names) in rules.uniform
    others = [name for name in coupling.scopes if name not in names]
    rules = tfx.Constraints(protect=others).also(rules, coupling)
    batch, options = (inputs, inputs["input_ids"]), {"criterion": tfx.criteria.reap, "constraints": rules, "steps": 1}
    spare = len(names) * (len(numbers_of(coupling, 0)) - 2)
    with pytest.raises(tfx.BudgetError):
        tfx.prune(params, spec, batch, budget=tfx.Remove(spare + 1), **options)
    small = tfx.prune(params, spec, batch, budget=tfx.Remove(spare), **options)
    huggingface.save_pretrained(tmp_path / "small", *small, like=model, example_inputs=inputs)
    again = type(model).from_pretrained(tmp_path / "small")
    assert again.config.num_local_experts == again.config.num_experts_per_tok == 2
    assert_close(again(**inputs).logits, logits(*small, inputs), rtol=1e-4, atol=1e-5)
    keep = np.ones(len(coupling), bool)
    for layer in range(len(names)):
        keep[numbers_of(coupling, layer)[1:]] = False
    assert any("fewer than 2" in problem for problem in rules.broken(coupling, keep))
    plan = tfx.Plan(coupling, keep)
    with pytest.raises(huggingface.ConfigError, match="selected index k out of range"):
        huggingface.save_pretrained(tmp_path / "x", tfx.cut(params, plan), plan.spec, like=model, example_inputs=inputs)


def test_experts_of_some_tokens_and_those_of_all_tokens_lose_width_together():
    """A config has one number for both widths, and grouped products take only multiples of four."""
    kind, config, _ = FAMILIES["Hunyuan-MoE"]
    model = random_model(kind, config)
    _, params, spec = huggingface.from_pretrained(model, outputs="logits")
    rules = huggingface.holdable(model, params, spec)
    widths = {name for name in tfx.couple(params, spec).scopes if name.endswith(": hidden")}
    assert len(widths) == 2
    assert widths in [{*names} for names in rules.uniform]
    assert {rules.multiple[name] for name in widths} == {4}


@pytest.mark.parametrize(
    "name", ["mixture of experts", "mixture of experts, softmax of the chosen", "mixture of experts, in any order"]
)
def test_a_class_of_the_users_own_gets_fewer_experts_but_as_many_as_it_chooses(name):
    module, x, params, spec = captured(name)
    coupling = tfx.couple(params, spec)
    rules = tfx.interop.holdable(module, params, spec, x)
    assert rules.floor == {"experts": 2}
    stay = coupling.scope != coupling.scopes.index("experts")
    plan = tfx.Plan(coupling, stay | (coupling.index > 1))
    assert not rules.broken(coupling, plan.keep)
    small = tfx.cut(params, plan)
    again = tfx.to_torch(small, plan.spec, like=module, example_inputs=x)
    assert again.up.shape[0] == again.router.out_features == 2
    assert_close(again(x), tfx.apply(small, plan.spec, x))


def test_numbers_of_experts_that_mean_something_else_hold_them():
    _, _, params, spec = captured("rows of a table, chosen")
    assert "router" in tfx.couple(params, spec).frozen
