"""Whole layers of transformers leave, there and back; some by hand, some beside heads and widths."""

import functools
import importlib.util
import json
from functools import partial

import numpy as np
import pytest
import torch
from _huggingface import SECOND, captured, random_model
from huggingface import read, saved
from languages import comes_back
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx.interop import huggingface
from taylorfx.interop.huggingface.loading import example_of
from taylorfx.interop.huggingface.making import Source

transformers = pytest.importorskip("transformers")

if importlib.util.find_spec("torchvision"):
    from _torchvision import library

    library()

DEPTHS = {
    "Llama": ("num_hidden_layers",), "Qwen3": ("num_hidden_layers",), "Qwen3-MoE": ("num_hidden_layers",),
    "GPT-2": ("n_layer",), "OPT": ("num_hidden_layers",), "T5": ("num_layers", "num_decoder_layers"),
    "ViT": ("num_hidden_layers",),
}  # fmt: skip
"""By family, what its config calls the numbers of layers."""

TINY = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 12,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@functools.cache
def tiny(kind="LlamaForCausalLM", **config):
    """A captured model of four layers, and its coupling with branches."""
    lists = {key: [*x] if isinstance(x, tuple) else x for key, x in config.items()}
    loaded = huggingface.from_pretrained(random_model(kind, {**TINY, **lists}), outputs="logits")
    return loaded, tfx.couple(loaded.params, loaded.spec, branches=True)


def plan_without(coupling, *scopes):
    """The plan that takes these scopes away, and what is in them."""
    gone = np.isin(coupling.scope, [coupling.scopes.index(name) for name in scopes])
    assert gone.sum() == len(scopes)
    return tfx.Plan(coupling, coupling.settled(~gone))


def layer(k):
    return f"model.layers.{k}.self_attn: branch", f"model.layers.{k}.mlp: branch"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("depth")
    return home, functools.cache(lambda name: saved(home, name, layers=3)[:2])


@pytest.mark.parametrize("name", DEPTHS)
def test_a_family_comes_back_with_fewer_layers_and_less_width(folder, name):
    home, family = folder
    wanted, plan = family(name)
    coupling = plan.coupling
    branches = [branch.unit for branch in coupling.branches]
    second = {unit for unit in branches if SECOND.search(coupling.names[unit])}
    assert {unit for unit in branches if not plan.keep[unit]} == second
    assert len(second) == {"T5": 5}.get(name, 2)
    assert coupling.leaving(plan.keep).sum() > len(second), "some width has left, too"
    comes_back(*read(home, [name])[name], wanted)
    config = json.loads((home / name / "config.json").read_text())
    assert [config[field] for field in DEPTHS[name]] == [2] * len(DEPTHS[name])
    if "layer_types" in config:
        assert len(config["layer_types"]) == 2


def test_lists_by_layer_lose_the_entries_of_the_layers_that_leave(tmp_path):
    types = ("sliding_attention", "full_attention", "sliding_attention", "full_attention")
    # No call of the proof is as long as the window: the outputs do not say which layers slide.
    loaded, coupling = tiny("Qwen3ForCausalLM", layer_types=types, sliding_window=100, use_sliding_window=True)
    plan = plan_without(coupling, *layer(1), *layer(2))
    small = huggingface.save_pretrained(tmp_path / "x", tfx.cut(loaded.params, plan), plan.spec, like=loaded.model)
    assert small.config.layer_types == ["sliding_attention", "full_attention"]
    assert torch.equal(small.model.layers[1].mlp.up_proj.weight, loaded.model.model.layers[3].mlp.up_proj.weight)


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("Qwen3MoeForCausalLM", {**MIXTURE, "mlp_only_layers": (1,)}, {"mlp_only_layers": [0]}),
        (
            "Qwen2MoeForCausalLM",
            {**MIXTURE, "decoder_sparse_step": 2, "shared_expert_intermediate_size": 8},
            {"mlp_only_layers": [], "decoder_sparse_step": 1},
        ),
        (
            "DeepseekV3ForCausalLM",
            {
                "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
                "topk_group": 1, "moe_intermediate_size": 8, "q_lora_rank": 8, "kv_lora_rank": 8,
                "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 2,
            },
            {"first_k_dense_replace": 1},
        ),
    ],
)  # fmt: skip
def test_layers_that_a_config_knows_by_their_numbers_have_new_ones(tmp_path, kind, config, said):
    loaded, coupling = tiny(kind, **config)
    gone = (0, 2)
    if kind.startswith("Qwen2"):  # of every second layer, those with one MLP leave: the rest are all mixtures
        assert [type(x.mlp).__name__ for x in loaded.model.model.layers][::2] == ["Qwen2MoeMLP"] * 2
    branches = [name for name in coupling.scopes if name.endswith(": branch")]
    assert ("model.layers.2.mlp.shared_experts: branch" in branches) == (kind.startswith("Deepseek"))
    plan = plan_without(coupling, *[name for name in branches for k in gone if name.startswith(f"model.layers.{k}.")])
    small = huggingface.save_pretrained(tmp_path / "x", tfx.cut(loaded.params, plan), plan.spec, like=loaded.model)
    assert {name: getattr(small.config, name) for name in said} == said
    kinds = [type(x.mlp) for x in loaded.model.model.layers]
    assert [type(x.mlp) for x in small.model.layers] == [kinds[1], kinds[3]]


def test_the_first_layer_of_a_t5_leaves_its_table_of_positions_to_the_next(tmp_path):
    model, params, spec, _ = captured("T5", 3)
    coupling = tfx.couple(params, spec, branches=True)
    plan = plan_without(coupling, *[name for name in coupling.scopes if "encoder.block.0" in name and "branch" in name])
    small = huggingface.save_pretrained(tmp_path / "x", tfx.cut(params, plan), plan.spec, like=model)
    tables = [m.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight for m in (model, small)]
    assert torch.equal(*tables)
    assert small.config.num_layers == 2
    example = example_of(model)
    assert_close(tfx.apply(tfx.cut(params, plan), plan.spec, example)["logits"], small(**example).logits)


def test_layers_of_a_norm_after_the_sum_stay():
    loaded, coupling = tiny("BertForSequenceClassification")
    held = huggingface.holdable(*loaded, branches=True)
    floors = held.on(coupling).floors
    assert coupling.branches
    assert all(floors[coupling.scope[branch.unit]] == 1 for branch in coupling.branches)


def test_a_part_of_a_layer_is_refused_by_name(tmp_path):
    loaded, coupling = tiny()
    plan = plan_without(coupling, "model.layers.1.self_attn: branch")
    with pytest.raises(huggingface.ConfigError, match=r"has no model\.layers\.1\.[\w.]+.* how many whole layers"):
        huggingface.save_pretrained(tmp_path / "x", tfx.cut(loaded.params, plan), plan.spec, like=loaded.model)
    assert not [*tmp_path.iterdir()]


def test_layers_that_the_model_does_not_use_are_left_in_it():
    loaded, coupling = tiny()
    source = Source(loaded.model, loaded.params, loaded.spec)
    assert not source.left(loaded.params)
    params = tfx.cut(loaded.params, plan_without(coupling, *layer(3)))
    assert [*source.left(params).values()] == [(0, 1, 2)]
    vars(source)["_used"] = {path for path in source._used if ".layers.3." not in path}
    assert not source.left(params)


def test_steps_reach_a_budget_that_width_alone_does_not():
    loaded, _ = tiny()
    held = huggingface.holdable(*loaded, branches=True)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(3, 30, (8, 10), generator=generator)
    batch = {"input_ids": texts, "attention_mask": torch.ones_like(texts)}, texts
    prune = partial(tfx.prune, *loaded[1:], batch, budget=tfx.Flops(0.08), loss=huggingface.next_token)
    with pytest.raises(tfx.BudgetError):
        prune(constraints=huggingface.holdable(*loaded))
    params, spec = prune(constraints=held, branches=True)
    source = Source(loaded.model, loaded.params, loaded.spec)
    ((stack, stay),) = source.left(params).items()
    assert stack.key == ("num_hidden_layers",)
    assert stay[0] == 0
    assert 1 <= len(stay) < 4
    small = source.make(params, spec).model
    assert small.config.num_hidden_layers == len(stay)
    assert_close(tfx.apply(params, spec, batch[0])["logits"], small(**batch[0]).logits)


def test_a_trainer_trains_the_shallower_model_on(tmp_path):
    pytest.importorskip("accelerate")
    loaded, coupling = tiny()
    plan = plan_without(coupling, *layer(2))
    small = huggingface.save_pretrained(tmp_path / "x", tfx.cut(loaded.params, plan), plan.spec, like=loaded.model)
    text = torch.arange(3, 13)
    data = [{"input_ids": text, "labels": text}] * 8
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, learning_rate=1e-2, use_cpu=True, save_strategy="no", report_to=[],
        disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    before = float(small(text[None], labels=text[None]).loss.detach())
    transformers.Trainer(small, arguments, train_dataset=data).train()
    assert float(small(text[None], labels=text[None]).loss.detach()) < before - 0.1


def test_a_model_that_is_trained_loses_its_layers_in_place():
    loaded, coupling = tiny()
    plan = plan_without(coupling, *layer(1), *layer(2))
    params = tfx.cut(loaded.params, plan)
    source = Source(loaded.model, loaded.params, loaded.spec)
    small = source.resized(params, plan.spec).model.eval()
    inputs = example_of(loaded.model)
    assert_close(small(**inputs).logits, tfx.apply(params, plan.spec, inputs)["logits"])
    assert [x.self_attn.layer_idx for x in small.model.layers] == [0, 1]
    assert small.config.num_hidden_layers == 2
    assert len(loaded.model.model.layers) == 4


PARALLEL = {
    "GPTNeoX": ("GPTNeoXForCausalLM", {"use_parallel_residual": True}, "gpt_neox.layers.{}.", ("attention", "mlp")),
    "Phi": ("PhiForCausalLM", {"num_key_value_heads": 2}, "model.layers.{}.", ("self_attn", "mlp")),
    "GPTJ": (
        "GPTJForCausalLM", {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_inner": 12, "rotary_dim": 4},
        "transformer.h.{}.", ("attn", "mlp"),
    ),
    "Falcon": (
        "FalconForCausalLM", {"parallel_attn": True, "multi_query": False, "ffn_hidden_size": 12},
        "transformer.h.{}.", ("self_attention", "mlp"),
    ),
    "Falcon, one key head": (
        "FalconForCausalLM", {"parallel_attn": True, "multi_query": True, "ffn_hidden_size": 12},
        "transformer.h.{}.", ("self_attention", "mlp"),
    ),
    "Cohere": ("CohereForCausalLM", {}, "model.layers.{}.", ("self_attn", "mlp")),
}  # fmt: skip
"""Families that add attention and MLP of one value to the stream, what their layers are called and these two."""


def parallel(name):
    kind, config, home, parts = PARALLEL[name]
    loaded, coupling = tiny(kind, **config)
    return loaded, coupling, [[f"{home.format(k)}{part}" for part in parts] for k in range(4)]


@pytest.mark.parametrize("name", PARALLEL)
def test_of_attention_and_mlp_in_parallel_each_is_a_branch(name):
    loaded, coupling, parts = parallel(name)
    scopes = {scope for scope in coupling.scopes if scope.endswith(": branch")}
    assert scopes == {f"{part}: branch" for layer in parts for part in layer}
    example = example_of(loaded.model)
    for gone in ([parts[1][0]], [parts[2][1]], [*parts[1], parts[0][0]]):
        handles = [loaded.model.get_submodule(path).register_forward_hook(zeros) for path in gone]
        expected = loaded.model(**example).logits
        for handle in handles:
            handle.remove()
        plan = plan_without(coupling, *(f"{path}: branch" for path in gone))
        small = tfx.cut(loaded.params, plan)
        assert not [path for path in tfx.tree.flatten(small) if path.startswith(tuple(f"{x}." for x in gone))]
        assert_close(tfx.apply(small, plan.spec, example)["logits"], expected)
        assert_close(tfx.apply(loaded.params, loaded.spec, example, gates=plan.gates)["logits"], expected)


def zeros(_, inputs, outputs):
    """What attention gives out is the first of several; an MLP gives out one tensor."""
    return (outputs[0] * 0, *outputs[1:]) if isinstance(outputs, tuple) else outputs * 0


@pytest.mark.parametrize("name", PARALLEL)
def test_layers_with_attention_and_mlp_in_parallel_leave_as_a_whole(tmp_path, name):
    loaded, coupling, parts = parallel(name)
    held = huggingface.holdable(*loaded, branches=True)
    named = [{f"{part}: branch" for part in layer} for layer in parts]
    assert [set(group) for group in held.uniform if "branch" in group[0]] == named[1:]
    assert named[0] <= held.floor.keys()
    plan = plan_without(coupling, *named[1], *named[2])
    assert not held.broken(coupling, plan.keep)
    params = tfx.cut(loaded.params, plan)
    small = huggingface.save_pretrained(tmp_path / "x", params, plan.spec, like=loaded.model)
    assert small.config.num_hidden_layers == 2
    example = example_of(loaded.model)
    assert_close(small(**example).logits, tfx.apply(params, plan.spec, example)["logits"])
    half = plan_without(coupling, f"{parts[1][0]}: branch")
    assert held.broken(coupling, half.keep)
    with pytest.raises(huggingface.ConfigError, match="how many whole layers"):
        huggingface.save_pretrained(tmp_path / "y", tfx.cut(loaded.params, half), half.spec, like=loaded.model)
