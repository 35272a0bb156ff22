"""Published networks, captured: torchvision's in a few narrow layers, small ones of transformers.

The benchmarks `zoo.py` and `sizes.py` prove the same of all of torchvision's, whole.
"""

import re

import pytest
import torch
from _proof import prove, randomized
from _sizes import LIMITS, attempt, others, outside, tensors
from _torchvision import small
from _transformers import cases

import taylorfx as tfx
from taylorfx.testing.strategies import random_plan

VISION = {
    "resnet": ["fc.bias"],
    "vgg": ["classifier.3.bias"],
    "squeezenet": ["classifier.1.bias"],
    "googlenet": ["fc.bias"],
    "densenet": ["classifier.bias"],
    "mobilenet_v3": ["classifier.3.bias"],
    "efficientnet": ["classifier.1.bias"],
    "regnet": ["fc.bias"],
    "shufflenet": ["fc.bias"],
    "convnext": ["classifier.2.bias"],
    "vit": ["heads.head.bias"],
    "swin": ["head.bias"],
    "swin_v2": ["head.bias"],
    "maxvit": [],  # it has none
    "deeplab": ["classifier.4.bias", "aux_classifier.4.bias"],
    "resnet fpn": [f"fpn.layer_blocks.{k}.0.bias" for k in range(3)],
}
"""What stays when all units leave: the biases of the outputs."""

EMBEDDED = [f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")]
TEXT = {
    "bert, masked": [*EMBEDDED, "pooler.dense.weight"],
    "distilbert": EMBEDDED[:2],
    "albert": ["pooler.weight"],
    "gpt2": ["wte.weight", "wpe.weight"],
    "llama": ["embed_tokens.weight"],
    "t5": ["decoder.embed_tokens.weight"],
    "clip": ["embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"],
    "whisper": ["decoder.embed_tokens.weight", "decoder.embed_positions.weight"],  # the encoder's positions are frozen
}  # fmt: skip
"""What stays besides biases and norms, since the network gives out its residual stream: what is as wide on its own."""


FIXED = {"vit", "maxvit", "clip"}
"""Those that take no other size themselves."""

LONG = {"swin", "swin_v2"}
"""Those that are not exported once more: alone, torch.export reasons for minutes about windows that are padded."""

BOUNDED = {"resnet fpn": "as the module itself: AssertionError: Guard failed"}
"""Those of which an export takes fewer sizes: the module's own does, too."""

ONNX = {"resnet", "squeezenet", "mobilenet_v3", "efficientnet", "regnet", "shufflenet", "convnext", "deeplab",
        "bert, masked", "distilbert", "gpt2", "llama", "t5"}  # fmt: skip
"""Those that go to ONNX with free sizes, too."""


def proven(makers, name):
    if name in ONNX:
        pytest.importorskip("onnxruntime")
    try:
        make = makers()[name]
    except ModuleNotFoundError as missing:
        pytest.skip(f"needs {missing.name}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, inputs = make()
        more = {"patience": 0} if name in LONG else {}
        proof = prove(randomized(module, inputs), inputs, onnx=name in ONNX, **more)
    assert proof.captured < 1e-10
    assert proof.cut < 1e-10 < proof.moved
    assert proof.step == pytest.approx(1, abs=0.1)
    assert not proof.mixing
    assert not any(run.refused for run in proof.sizes)
    taken = [run for run in proof.sizes if not (run.fixed or run.refused)]
    assert max((error for run in taken for error in (run.captured, run.cut)), default=0) < 1e-11
    assert (not taken) == (name in FIXED)
    assert proof.alike == (None if name in FIXED else True)
    for run in taken:
        assert run.left == "" if name not in BOUNDED else BOUNDED[name] in run.left
        assert (run.exported is None) == (name in LONG or name in BOUNDED)
        assert (run.onnx is not None) == (name in ONNX)
    return proof


@pytest.mark.parametrize("name", VISION)
def test_a_network_for_images_is_captured_and_all_of_it_can_leave(name):
    proof = proven(small, name)
    assert proof.staying == VISION[name], proof.frozen
    assert not proof.unmapped


@pytest.mark.parametrize("name", TEXT)
def test_a_transformer_is_captured_and_all_but_its_residual_stream_can_leave(name):
    proof = proven(cases, name)
    assert [path for path in proof.staying if not re.search(r"\.bias$|norm|ln_", path.lower())] == TEXT[name]


@pytest.mark.parametrize("name", ["regnet", "gpt2"])
def test_whole_and_cut_the_plain_module_is_right_at_other_sizes(name):
    """Whole, it also goes to torch.export and ONNX; cut, the tests above say so."""
    pytest.importorskip("onnxruntime")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, inputs = (small() if name in VISION else cases())[name]()
        module = randomized(module, inputs)
    few = {key: x[:2].contiguous() for key, x in inputs.items()}
    params, spec = tfx.from_torch(module, (), example_kwargs=few)
    plan = random_plan(tfx.couple(params, spec), torch.Generator().manual_seed(1), 0.5, exact=True)
    whole, cut = (tfx.to_torch(*network).eval() for network in ((params, spec), (tfx.cut(params, plan), plan.spec)))
    runs = {"plain": lambda x: tensors(whole(**x)), **outside(whole, few, onnx=True)}
    assert runs.keys() == {"plain", *LIMITS}
    with torch.no_grad():
        for x in others(inputs).values():
            for way, run in runs.items():
                assert attempt(run, x, tensors(module(**x))) < LIMITS.get(way, 1e-11), way
            gated = tensors(
                tfx.apply(params, spec, {node.name: x[node.name] for node in spec.inputs}, gates=plan.gates)
            )
            assert attempt(lambda x: tensors(cut(**x)), x, gated) < 1e-11
