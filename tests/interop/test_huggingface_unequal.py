"""Layers of transformers that keep different numbers of units, there and back."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from _huggingface import random_model

import taylorfx as tfx
from taylorfx.interop import huggingface

pytest.importorskip("transformers")

if importlib.util.find_spec("torchvision"):
    from _torchvision import library

    library()

TINY = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 4, "intermediate_size": 12, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip

READ = """
import sys, torch
schemas = torch.library.Library("torchvision", "FRAGMENT")  # where torchvision's compiled operators are missing
for name in ("nms", "qnms"):
    try:
        schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        break
import transformers
assert not any(name.startswith("taylorfx") for name in sys.modules)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
call = torch.load(f"{sys.argv[1]}.inputs")
with torch.no_grad():
    logits = model(**call).logits
call.update(max_new_tokens=4, min_new_tokens=4, do_sample=False)
texts = [model.generate(**call, use_cache=cached) for cached in (True, False)]
torch.save((logits, texts), f"{sys.argv[1]}.results")
"""


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_layers_that_differ_come_back_in_a_process_without_taylorfx(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "code"))
    loaded = huggingface.from_pretrained(random_model(kind, TINY), outputs="logits")
    held = huggingface.holdable(*loaded, per_layer=True)
    assert not held.uniform
    coupling = tfx.couple(loaded.params, loaded.spec)
    keep = np.ones(len(coupling), bool)
    names = np.array(coupling.scopes)[coupling.scope]
    keep[(names == "model.layers.0.self_attn: heads") & (coupling.index < 2)] = False
    keep[(names == "model.layers.1.mlp: hidden") & (coupling.index < 5)] = False
    plan = tfx.Plan(coupling, keep)
    assert len(plan.keep) - plan.keep.sum() == 7
    params, folder = tfx.cut(loaded.params, plan), tmp_path / "small"
    with pytest.raises(huggingface.ConfigError, match="per_layer=True"):
        huggingface.save_pretrained(folder, params, plan.spec, like=loaded.model)
    small = huggingface.save_pretrained(folder, params, plan.spec, like=loaded.model, per_layer=True)
    differing = {int(k): x for k, x in small.config.to_dict()["per_layer_config"].items()}
    assert differing[0] == {"num_attention_heads": 2, "num_key_value_heads": 2}
    assert differing[1] == {"intermediate_size": 7}

    tokens = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    call = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    call["attention_mask"][0, :2] = 0
    torch.save(call, f"{folder}.inputs")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder)], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert not done.returncode, done.stderr[-2000:]
    logits, texts = torch.load(f"{folder}.results")
    with torch.no_grad():
        assert torch.equal(logits, small.eval()(**call).logits)
    torch.testing.assert_close(logits, tfx.apply(params, plan.spec, call)["logits"], rtol=1e-4, atol=1e-5)
    assert torch.equal(*texts), "with a cache and without"
    with pytest.raises(huggingface.ConfigError, match="trust_remote_code=True"):
        huggingface.from_pretrained(folder, outputs="logits")
