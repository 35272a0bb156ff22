"""Models with adapters of the library peft: pruned together with the adapter, or merged first."""

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

from _huggingface import DECODER, random_model


class Adapted(torch.nn.Linear):
    """What is not of transformers, and has an adapter."""

    def merge_and_unload(self):
        return self


def test_an_adapter_is_merged_before_a_folder_is_written(tmp_path):
    module = Adapted(3, 2)
    with pytest.raises(huggingface.ConfigError, match=r"received a Adapted. Merge .*merge_and_unload\(\)"):
        huggingface.from_pretrained(module)
    params, spec = tfx.from_torch(module, torch.randn(2, 3))
    with pytest.raises(huggingface.ConfigError, match=r"merge_and_unload\(\).* taylorfx.to_torch with like="):
        huggingface.save_pretrained(tmp_path / "x", params, spec, like=module)
    with pytest.raises(huggingface.ConfigError, match="merge_and_unload"):
        huggingface.holdable(module, params, spec)


def test_a_model_is_pruned_together_with_its_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(random_model("LlamaForCausalLM", DECODER), config).eval()
    for path, x in model.named_parameters():
        if "lora_B" in path:  # it is zero at first
            x.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    params, spec = tfx.from_torch(model, inputs, outputs="logits")
    coupling = tfx.couple(params, spec)
    keep = np.ones(len(coupling), bool)
    for scope, name in enumerate(coupling.scopes):
        if name.endswith(("mlp: hidden", "key/value heads", "lora_A.default")):
            keep[np.flatnonzero(coupling.scope == scope)[0]] = False
    plan = tfx.Plan(coupling, keep)
    small = tfx.cut(params, plan)
    expected = tfx.apply(params, spec, inputs, gates=plan.gates)["logits"]
    again = tfx.to_torch(small, plan.spec, like=model, example_inputs=inputs)
    assert {x.shape[0] for path, x in again.named_parameters() if "lora_A" in path} == {3}, "ranks are units, too"
    assert_close(again(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert_close(again.merge_and_unload()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    whole = tfx.apply(params, spec, inputs)["logits"]
    merged = huggingface.from_pretrained(model.merge_and_unload(), outputs="logits")  # writes on the same tensors
    assert_close(tfx.apply(merged.params, merged.spec, inputs)["logits"], whole, rtol=1e-4, atol=1e-5)
