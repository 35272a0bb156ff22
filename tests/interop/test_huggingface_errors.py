"""Bad input to models of transformers: what was received, where, and what to do; and nothing is left half written."""

import errno
import importlib.util
import json

import pytest
import torch
from _huggingface import captured, made
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import taylorfx as tfx
from taylorfx.interop import huggingface

transformers = pytest.importorskip("transformers")

if importlib.util.find_spec("torchvision"):
    from _torchvision import library

    library()


@pytest.fixture
def folder(tmp_path):
    """A folder with a Llama."""
    made("Llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def renamed(folder):
    file = folder / "model.safetensors"
    tensors = {name.replace("up_proj", "w3"): x for name, x in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def configured(**changes):
    def change(folder):
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**data, **changes}))

    return change


FOLDERS = {
    "other names": (renamed, r"0\.mlp\.up_proj\.weight is missing\n .*0\.mlp\.w3\.weight is there, which the class"),
    "other shapes": (configured(intermediate_size=20), r"up_proj\.weight is \(24, 32\) instead of \(20, 32\)"),
    "damaged": (cut_short, "llama are damaged: .*Copy or download them again"),
    "no class": (configured(architectures=None), "architectures of .* is None"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json; .* has none"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_checkpoint_that_is_not_the_models_is_refused_before_it_is_captured(name, folder):
    change, words = FOLDERS[name]
    change(folder)
    with pytest.raises(huggingface.ConfigError, match=words):
        huggingface.from_pretrained(folder, outputs="logits")


def test_a_folder_that_is_not_there_is_no_name_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nothing"):
        huggingface.from_pretrained(str(tmp_path / "nothing"))


def test_masks_that_are_no_tensors_are_refused_with_the_way_out(folder):
    with pytest.raises(
        huggingface.ConfigError, match=r'LlamaForCausalLM is flex_attention.*attn_implementation="sdpa"'
    ):
        huggingface.from_pretrained(folder, outputs="logits", attn_implementation="flex_attention")
    model = made("Llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(huggingface.ConfigError, match="set_attn_implementation"):
        huggingface.from_pretrained(model, outputs="logits")


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ({"full_attention": torch.ones(2, 8)}, "A network takes tensors; received: attention_mask is dict"),
        (torch.ones(2, 1, 8, 8), "attention_mask: it has 1 axes besides that of the examples, received 3"),
        (torch.ones(2, 7), r"attention_mask\.1 == input_ids\.1"),
    ],
)
def test_a_mask_of_an_unknown_kind_is_refused(mask, words):
    _, params, spec, _ = captured("Llama")
    inputs = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "attention_mask": mask}
    with pytest.raises(tfx.ShapeError, match=words):
        tfx.apply(params, spec, inputs)


def test_a_sequence_that_is_longer_than_the_positions_is_refused_before_anything_is_measured():
    _, params, spec, _ = captured("GPT-2")
    tokens = torch.ones(2, 33, dtype=torch.int64)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tokens
    with pytest.raises(tfx.ShapeError, match=r"wpe: .*from 0 to 31; .* a sequence longer than the positions"):
        tfx.prune(params, spec, batch, budget=tfx.Flops(0.9), loss=huggingface.next_token)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("I/O: No space left")])
def test_a_disk_that_is_full_leaves_no_folder(error, tmp_path, monkeypatch):
    model, params, spec, _ = captured("Llama")

    def full(model, folder, **options):
        (folder / "config.json").write_text("{")
        raise error

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        huggingface.save_pretrained(tmp_path / "small", params, spec, like=model)
    assert not [*tmp_path.iterdir()]
