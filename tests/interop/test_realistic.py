"""Networks as people build them: captured once, each is its module at three sizes, whole, cut, trained and exported."""

import pytest
import torch
from _realistic import REALISTIC
from _sizes import in_runtime
from realistic import SIZES, best_tuned, captured, error, exported, given, halved, pruned, takes, tensors

import taylorfx as tfx

TOLERANCE = 1e-11

each = pytest.mark.parametrize("name", REALISTIC)


@each
@torch.no_grad()
def test_it_computes_at_other_sizes_what_the_module_does(name):
    module, params, spec = captured(name)
    plain = tfx.to_torch(params, spec)
    for size in range(SIZES):
        inputs = given(name, size)
        expected = module(**inputs)
        assert error(tfx.apply(params, spec, inputs), expected) < TOLERANCE
        assert error(plain(**inputs), expected) < TOLERANCE


@each
@torch.no_grad()
def test_cut_by_half_it_computes_at_other_sizes_what_its_gates_say(name):
    module, params, spec = captured(name)
    small, plan = halved(name)
    plain = tfx.to_torch(small, plan.spec)
    removed = 1 - plan.keep.mean()
    assert removed > 0.1
    for size in range(SIZES):
        inputs = given(name, size)
        gated = tfx.apply(params, spec, inputs, gates=plan.gates)
        assert error(gated, module(**inputs)) > 1e-4, "the comparison has to be of something"
        assert error(tfx.apply(small, plan.spec, inputs), gated) < TOLERANCE
        assert error(plain(**inputs), gated) < TOLERANCE


@each
@torch.no_grad()
def test_what_comes_out_is_exported_again_with_the_sizes_of_the_modules_own_export(name):
    small, plan = halved(name)
    own = exported(captured(name)[0], given(name, 0))
    program = exported(tfx.to_torch(small, plan.spec), given(name, 0))
    taken = [inputs for inputs in (given(name, size) for size in range(SIZES)) if takes(own, inputs)]
    assert len(taken) > 1
    for inputs in taken:
        assert error(program(**inputs), tfx.apply(small, plan.spec, inputs)) < TOLERANCE


@pytest.mark.parametrize("name", ["U-Net that pads", "Demucs", "HiFi-GAN", "causal language model"])
def test_the_units_are_the_same_whatever_the_size_it_is_captured_at(name):
    module, params, spec = captured(name)
    one, other = tfx.couple(params, spec), tfx.couple(*tfx.from_torch(module, given(name, 1)))
    assert (one.names, one.sizes.tolist()) == (other.names, other.sizes.tolist())
    assert one.frozen.keys() == other.frozen.keys()
    for path in dict(module.named_parameters()):
        for axis in range(len(one.parameters[path])):
            assert (one.unit_ids(path, axis) == other.unit_ids(path, axis)).all(), path


@each
def test_pruned_by_half_on_two_sizes_it_learns_on_both(name):
    module, params, spec = captured(name)
    small, batches = pruned(name)
    assert tfx.cost.flops(tfx.couple(*small)).total <= 0.5 * tfx.cost.flops(tfx.couple(params, spec)).total
    before, after = best_tuned(small, batches)
    assert max(b / a for a, b in zip(before, after, strict=True)) < 0.9
    inputs = given(name, SIZES - 1)
    student = tfx.to_torch(*small)
    assert [y.shape for y in tensors(student(**inputs))] == [y.shape for y in tensors(module(**inputs))]


@pytest.mark.parametrize("name", ["U-Net that resizes", "HiFi-GAN", "causal language model"])
@torch.no_grad()
def test_it_goes_to_onnx_with_free_sizes(name):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small, plan = halved(name, torch.float32)
    module = tfx.to_torch(small, plan.spec)
    run = in_runtime(module, given(name, 0, torch.float32))
    for size in range(SIZES):
        inputs = given(name, size, torch.float32)
        assert error(tuple(run(inputs)), tuple(tensors(module(**inputs)))) < 1e-3
