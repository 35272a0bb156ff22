"""Models of the library timm come back in their own classes; it is no part of the tests' requirements."""

import importlib.util

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import taylorfx as tfx

if importlib.util.find_spec("torchvision"):
    from _torchvision import library

    library()

timm = pytest.importorskip("timm")

NAMES = {
    "resnet18": (64, {}),
    "vit_tiny_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "convnext_atto": (64, {}),
    "efficientnet_b0": (64, {}),
    "mixer_s32_224": (224, {}),
}
"""By name, the size of the images, and arguments of ``create_model``."""


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_saved_and_comes_back_like_a_new_one_of_its_name(name, tmp_path):
    size, options = NAMES[name]
    model, x = timm.create_model(name, **options).eval(), torch.randn(2, 3, size, size)
    params, spec = tfx.from_torch(model, x)
    coupling = tfx.couple(params, spec)
    stay = [scope for scope in coupling.scopes if scope in coupling.frozen or scope.endswith("head dims")]
    keep = (coupling.index > 1) | np.isin(coupling.scope, [coupling.scopes.index(scope) for scope in stay])
    plan = tfx.Plan(coupling, keep)
    tfx.save(tmp_path / "small.safetensors", tfx.cut(params, plan), plan.spec)
    small = tfx.load(tmp_path / "small.safetensors")
    again = tfx.to_torch(*small, like=timm.create_model(name, **options), example_inputs=x)
    assert type(again) is type(model)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())
    assert_close(again.eval()(x), tfx.apply(*small, x), rtol=1e-4, atol=1e-5)
