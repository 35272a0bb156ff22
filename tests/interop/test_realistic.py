"""Networks as people build them: captured once, each is its module at three sizes, whole, cut, trained and exported."""

import functools

import pytest
import torch
from _proof import randomized
from realistic import REALISTIC

import taylorfx as tfx
from taylorfx.testing.strategies import random_plan

TOLERANCE = 1e-11
SIZES = 3

each = pytest.mark.parametrize("name", REALISTIC)


def given(name, size, dtype=torch.float64):
    """The inputs of one of the three sizes, by name."""
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in REALISTIC[name].inputs(size).items()}


@functools.cache
def captured(name, dtype=torch.float64):
    """A module in general position, and what was captured of it at its first size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = randomized(REALISTIC[name].make(), given(name, 0)).to(dtype)
    return module, *tfx.from_torch(module, given(name, 0, dtype))


@functools.cache
def halved(name, dtype=torch.float64):
    """Half of its exact units removed at random: parameters, and the plan."""
    _, params, spec = captured(name, dtype) if dtype != torch.float64 else captured(name)
    plan = random_plan(tfx.couple(params, spec), torch.Generator().manual_seed(1), 0.5, exact=True)
    return tfx.cut(params, plan), plan


def tensors(value):
    return list(value) if isinstance(value, tuple) else [value]


def error(values, expected):
    """The largest difference of an output, as a share of its largest entry."""
    pairs = list(zip(tensors(values), tensors(expected), strict=True))
    assert [a.shape for a, _ in pairs] == [b.shape for _, b in pairs]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


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


def exported(module, inputs):
    """A program of torch.export with all sizes free that torch leaves free."""
    free = {key: [torch.export.Dim.AUTO] * x.ndim for key, x in inputs.items()}
    return torch.export.export(module, (), inputs, dynamic_shapes=free).module()


def takes(program, inputs):
    try:
        program(**inputs)
    except AssertionError as error:
        assert "Guard failed" in str(error)
        return False
    return True


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


def distance(outputs, targets):
    """Of the outputs that are no whole numbers: the mean square of their differences, relative to the targets' size."""
    pairs = zip(tensors(outputs), tensors(targets), strict=True)
    return sum((a - b).square().mean() / b.var() for a, b in pairs if a.is_floating_point())


def astray(outputs, generator):
    """Outputs with noise on them: at a network's own outputs all derivatives would be zero."""
    return tuple(
        y + 0.3 * y.std() * torch.randn(y.shape, generator=generator, dtype=y.dtype) if y.is_floating_point() else y
        for y in tensors(outputs)
    )


@each
def test_pruned_by_half_on_two_sizes_it_learns_on_both(name):
    module, params, spec = captured(name)
    with torch.no_grad():
        batches = [(x, tuple(tensors(module(**x)))) for x in (given(name, size) for size in range(SIZES)[:2])]
    noise = torch.Generator().manual_seed(0)
    measured = [(x, astray(y, noise)) for x, y in batches]
    small = tfx.prune(params, spec, measured, budget=tfx.Flops(0.5), criterion=tfx.fisher, steps=1, loss=distance)
    assert tfx.cost.flops(tfx.couple(*small)).total <= 0.5 * tfx.cost.flops(tfx.couple(params, spec)).total

    def learned(student, rate):
        """The losses after some steps on the two sizes in turn, as shares of those before."""

        def losses():
            with torch.no_grad():
                return [distance(student(**x), y).item() for x, y in batches]

        before = losses()
        optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=rate)
        for step in range(16):
            inputs, targets = batches[step % len(batches)]
            optimizer.zero_grad()
            distance(student(**inputs), targets).backward()
            optimizer.step()
        return [a / b for a, b in zip(losses(), before, strict=True)]

    student = tfx.to_torch(*small)
    assert any(max(learned(student, rate)) < 0.9 for rate in (2e-4, 1e-3))
    inputs = given(name, SIZES - 1)
    assert [y.shape for y in tensors(student(**inputs))] == [y.shape for y in tensors(module(**inputs))]


@pytest.mark.parametrize("name", ["U-Net that resizes", "HiFi-GAN", "causal language model"])
@torch.no_grad()
def test_it_goes_to_onnx_with_free_sizes(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small, plan = halved(name, torch.float32)
    module = tfx.to_torch(small, plan.spec)
    first, path = given(name, 0, torch.float32), tmp_path / "m.onnx"
    free = {key: [torch.export.Dim.AUTO] * x.ndim for key, x in first.items()}
    torch.onnx.export(module, (), path, kwargs=first, dynamic_shapes=free, dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path))
    for size in range(SIZES):
        inputs = given(name, size, torch.float32)
        values = session.run(None, {key: x.numpy() for key, x in inputs.items()})
        assert error(tuple(map(torch.from_numpy, values)), tuple(tensors(module(**inputs)))) < 1e-3
