"""How much memory models of transformers take, there and back, beside the size of their checkpoint."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import taylorfx as tfx
from taylorfx.interop import huggingface
from taylorfx.interop.huggingface.making import Source

pytest.importorskip("transformers")

if importlib.util.find_spec("torchvision"):
    from _torchvision import library

    library()

from _huggingface import DECODER, random_model

SIZES = DECODER | {"hidden_size": 512, "intermediate_size": 8192, "head_dim": 128, "num_hidden_layers": 2}
"""Of 53 MB in bfloat16, nearly all of them in three matrices of each MLP."""

PROGRAM = """
import sys, warnings
import numpy as np
import torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
if "torchvision" in sys.argv:
    from _torchvision import library
    library()
import taylorfx as tfx
from _huggingface import made
from taylorfx.interop import huggingface

def largest():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM"))

def there_and_back(model, target):
    model, params, spec = huggingface.from_pretrained(model, outputs="logits")
    peaks = [largest()]
    coupling = tfx.couple(params, spec)
    hidden = [k for k, name in enumerate(coupling.scopes) if name.endswith("mlp: hidden")]
    plan = tfx.Plan(coupling, ~np.isin(coupling.scope, hidden) | (coupling.index % 2 == 0))
    huggingface.save_pretrained(target, tfx.cut(params, plan), plan.spec, like=model)
    return [*peaks, largest()]

home = sys.argv[1]
there_and_back(made("Llama"), home + "/first")  # what is loaded and kept once and for all
before = largest()
print(*(n - before for n in there_and_back(home + "/whole", home + "/small")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux")
def test_a_checkpoint_is_mapped_and_not_copied(tmp_path):
    random_model("LlamaForCausalLM", SIZES).bfloat16().save_pretrained(tmp_path / "whole")
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size
    paths = [str(Path(__file__).parents[2] / part) for part in ("", "benchmarks")]
    torchvision = ["torchvision"] * bool(importlib.util.find_spec("torchvision"))
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}\n{PROGRAM}", str(tmp_path), *torchvision],
        check=False, capture_output=True, text=True, env={"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert not done.returncode, done.stderr[-2000:]
    captured, saved = (int(n) / size for n in done.stdout.split())
    assert captured < 1.7, "the file itself, mapped, and some MB for torch.export whatever its size"
    assert saved < 2.6, "and what was cut, half of it; each model that is made would be half of it, too"


def test_half_precision_comes_back_and_other_numbers_are_refused(tmp_path):
    model = random_model("LlamaForCausalLM", DECODER).bfloat16()
    model, params, spec = huggingface.from_pretrained(model, outputs="logits")
    coupling = tfx.couple(params, spec)
    (scope,) = (k for k, name in enumerate(coupling.scopes) if name.endswith("mlp: hidden"))
    plan = tfx.Plan(coupling, (coupling.scope != scope) | (coupling.index % 2 == 0))
    small = tfx.cut(params, plan)
    again = huggingface.save_pretrained(tmp_path / "x", small, plan.spec, like=model)
    assert again.dtype == torch.bfloat16
    assert again.config.intermediate_size == 12
    for path, x in again.named_parameters():
        assert torch.equal(x, tfx.tree.flatten(small)[path])
    made = Source(model, small, plan.spec).make(small, plan.spec, every_call=False).model
    weight = made.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert weight.data_ptr() == tfx.tree.flatten(small)["model.layers.0.mlp.down_proj.weight"].data_ptr(), "no copy"


def test_in_half_precision_a_model_of_other_numbers_is_refused():
    model, params, spec = huggingface.from_pretrained(random_model("LlamaForCausalLM", DECODER).bfloat16())
    source = Source(model, params, spec)
    changed = random_model("LlamaForCausalLM", DECODER).bfloat16()
    changed.model.layers[0].mlp.down_proj.weight.data.mul_(2)
    call = source.original.calls[0]
    assert not source._difference(model, params, spec, call)
    assert source._difference(changed, params, spec, call)
