"""Families of transformers, there and back: captured, pruned, saved, and loaded by a process without taylorfx."""

import functools
import importlib.util
import json

import pytest
import torch
from languages import comes_back
from safetensors import safe_open
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx.interop import huggingface
from taylorfx.interop.huggingface.loading import example_of

pytest.importorskip("transformers")

if importlib.util.find_spec("torchvision"):
    from _torchvision import library

    library()

from _huggingface import captured, made
from huggingface import read, saved

FAMILIES = (
    "Llama", "Qwen3", "GPT-2", "BERT", "DistilBERT", "OPT", "T5", "ViT", "DINOv2", "ALBERT", "Whisper", "Mixtral",
    "CLIP", "DeBERTa-v2",
)  # fmt: skip
"""Those that are tried here; `benchmarks/huggingface.py` tries more."""

WIDTH = {"Llama": "intermediate_size", "T5": "d_ff"}
"""What the config calls the width of the MLP, which was 24."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where families are saved, and a function that prunes and saves one: outputs of its network, and the plan."""
    home = tmp_path_factory.mktemp("families")
    return home, functools.cache(lambda name: saved(home, name)[:2])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_comes_back_in_a_process_without_taylorfx(folder, name):
    home, family = folder
    wanted, plan = family(name)
    assert not plan.whole, "something was cut"
    comes_back(*read(home, [name])[name], wanted)
    config = json.loads((home / name / "config.json").read_text())
    if name in WIDTH:
        assert config[WIDTH[name]] < 24
    state = made(name).state_dict(keep_vars=True)
    with safe_open(home / name / "model.safetensors", "pt") as file:
        for path, x in state.items():
            tied = [other for other, y in state.items() if y is x]
            assert path in tied[:1] or sum(other in file.keys() for other in tied) == 1, "tied is tied"  # noqa: SIM118
    if name == "Mixtral":
        assert config["num_local_experts"] == 2
    assert not [x for x in home.iterdir() if x.name.startswith(".")], "nothing is left of the temporary folders"


def test_what_no_config_says_is_refused_by_the_name_of_its_field(tmp_path):
    model, params, spec, _ = captured("T5")
    coupling = tfx.couple(params, spec)
    (scope,) = (k for k, name in enumerate(coupling.scopes) if name == "encoder.block.0.layer.1.DenseReluDense: hidden")
    keep = coupling.scope != scope
    keep |= coupling.index > 0
    plan = tfx.Plan(coupling, keep)
    with pytest.raises(huggingface.ConfigError, match=r"d_ff is one number .* 23 for encoder\.block"):
        huggingface.save_pretrained(tmp_path / "x", tfx.cut(params, plan), plan.spec, like=model)
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_exists_is_left_as_it_is(tmp_path, monkeypatch):
    model, params, spec, _ = captured("Llama")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        huggingface.save_pretrained(tmp_path / "x", params, spec, like=model)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", full)
        with pytest.raises(OSError, match="No space"):
            huggingface.save_pretrained(tmp_path / "x", params, spec, like=model, overwrite=True)
    assert [x.name for x in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "mine").exists()
    huggingface.save_pretrained(tmp_path / "x", params, spec, like=model, overwrite=True)
    assert [x.name for x in tmp_path.iterdir()] == ["x"]
    assert not (tmp_path / "x" / "mine").exists()


def test_a_folder_is_loaded_captured_and_its_tokenizer_goes_along(folder, tmp_path):
    home, family = folder
    family("Llama")
    (home / "Llama" / "tokenizer.json").write_text("{}")
    loaded = huggingface.from_pretrained(home / "Llama", outputs="logits")
    example = example_of(loaded.model)
    assert_close(tfx.apply(loaded.params, loaded.spec, example)["logits"], loaded.model(**example).logits)
    huggingface.save_pretrained(tmp_path / "again", loaded.params, loaded.spec, like=loaded.model)
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "{}"


def test_a_model_of_sound_waves_is_captured_at_all_lengths():
    model, params, spec, _ = captured("Wav2Vec2")
    waves = torch.randn(2, 170, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(tfx.apply(params, spec, waves)["logits"], model(waves).logits)


def test_heads_are_units_where_the_scores_are_computed_by_hand():
    model = made("Llama")
    model.set_attn_implementation("eager")
    _, params, spec = huggingface.from_pretrained(model, outputs="logits")
    scopes = tfx.couple(params, spec).scopes
    assert "model.layers.0.self_attn: key/value heads" in scopes
    assert any(name.endswith(": query heads per key/value head") for name in scopes)


def test_a_scale_that_does_not_fit_is_seen_though_it_hardly_shows(tmp_path):
    model, params, spec, _ = captured("BEiT")  # whose scale of attention is of the dimensions of a head
    coupling = tfx.couple(params, spec)
    assert any(name.endswith(": query/key dims") for name in coupling.scopes)
    plan = tfx.Plan(coupling, coupling.index < coupling.sizes[coupling.scope] // 2)
    with pytest.raises(huggingface.ConfigError, match=r"differ by .* in double precision, too"):
        huggingface.save_pretrained(tmp_path / "x", tfx.cut(params, plan), plan.spec, like=model)


def test_a_module_without_a_config_is_refused(tmp_path):
    module = torch.nn.Linear(3, 2)
    params, spec = tfx.from_torch(module, torch.randn(2, 3))
    with pytest.raises(huggingface.ConfigError, match="received a Linear"):
        huggingface.save_pretrained(tmp_path / "x", params, spec, like=module)


def test_roles_are_protected_by_name():
    _, params, spec, _ = captured("Llama")
    coupling = tfx.couple(params, spec)
    rules = tfx.Constraints(protect=["*: key/value heads", "*: hidden"]).on(coupling)
    held = {coupling.scopes[k] for k in coupling.scope[rules.protected]}
    layers = range(made("Llama").config.num_hidden_layers)
    assert held == {f"model.layers.{k}.{x}" for k in layers for x in ("self_attn: key/value heads", "mlp: hidden")}
