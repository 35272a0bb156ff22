"""Every layer equals its counterpart in torch: value, gradients, training, initialization, shapes, FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from twins import CASES, SLOT, Case, Leaves, Reference, every_case, every_twin, heads, is_trained

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.layers import LAYERS, ShapeError
from taylorfx.network.bind import propagate
from taylorfx.network.labels import Ties, shape_of
from taylorfx.testing.laws import check_layer

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def apply(spec: tfx.Spec) -> Reference:
    return lambda leaves, *inputs: tfx.apply(tfx.tree.unflatten(leaves), spec, *inputs)


def value_and_gradients(function: Reference, leaves: Leaves, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The value, and the gradients of a generic scalar of it with respect to all that is not an integer."""
    leaves = {path: leaf.clone().requires_grad_(is_trained(path)) for path, leaf in leaves.items()}
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    value = function(leaves, *inputs)
    wanted = [x for x in (*leaves.values(), *inputs) if x.requires_grad]
    weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
    gradients = torch.autograd.grad(((value + value.square()) * weights).sum(), wanted, materialize_grads=True)
    return value.detach(), list(gradients)


def assert_equal(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@every_case
def test_a_layer_equals_torch_in_value_and_gradients(case: Case) -> None:
    leaves, inputs = case.leaves(), case.inputs()
    assert_equal(
        value_and_gradients(apply(case.spec), leaves, inputs), value_and_gradients(case.reference, leaves, inputs)
    )


@every_twin
def test_two_steps_of_training_equal_torch_in_values_gradients_and_running_statistics(case: Case) -> None:
    if isinstance(case.part, (L.Dropout, L.RReLU)):
        pytest.skip("draws from a generator of its own; see below")
    states: list[Mapping[str, Tensor]] = []

    def ours(leaves: Leaves, *inputs: Tensor) -> Tensor:
        first, params = tfx.train(tfx.tree.unflatten(leaves), case.spec, *inputs)
        second, params = tfx.train(params, case.spec, *(3 * x for x in inputs))
        states.append({path: leaf for path, leaf in tfx.tree.flatten(params).items() if not is_trained(path)})
        return first + second

    def torchs(leaves: Leaves, *inputs: Tensor) -> Tensor:
        leaves = {path: leaf if leaf.requires_grad else leaf.clone() for path, leaf in leaves.items()}
        result = case.reference(leaves, *inputs, training=True)
        result = result + case.reference(leaves, *(3 * x for x in inputs), training=True)
        states.append({path: leaf for path, leaf in leaves.items() if not is_trained(path)})
        return result

    leaves, inputs = case.leaves(), case.inputs()
    if isinstance(case.part, L.Embedding):
        inputs = [x // 3 for x in inputs]
    before = {path: leaf.clone() for path, leaf in leaves.items()}
    assert_equal(value_and_gradients(ours, leaves, inputs), value_and_gradients(torchs, leaves, inputs))
    assert_equal(*states)
    assert not any(leaf.requires_grad for leaf in states[0].values())
    assert all(torch.equal(leaf, before[path]) for path, leaf in leaves.items()), "an argument was mutated"


@every_twin
def test_a_layer_starts_bit_for_bit_as_torch_does(case: Case) -> None:
    torch.manual_seed(7)
    expected = eval(case.name, vars(nn)).state_dict()
    actual = case.part.init(torch.Generator().manual_seed(7))
    assert list(actual) == list(expected)
    assert_close(actual, dict(expected), rtol=0, atol=0)


@every_case
def test_inferred_shapes_and_flops_are_the_actual_ones(case: Case) -> None:
    spec = case.spec
    params, inputs = tfx.tree.unflatten(case.leaves()), [x[:1] for x in case.inputs()]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention counts for nothing
        value = tfx.apply(params, spec, *inputs)
    assert shape_of(propagate(spec, Ties(labeled=False))[spec.outputs[0]].output) == value.shape
    flops = tfx.cost.flops(tfx.couple(params, spec)).total
    assert flops == counter.get_total_flops()
    assert (flops > 0) == any(node.layer.multiplies for node in spec)


@every_case
def test_a_layer_declares_the_shapes_of_its_parameters(case: Case) -> None:
    for node in case.spec:
        drawn = node.layer.init(torch.Generator())
        assert node.layer.shapes() == {leaf: tuple(tensor.shape) for leaf, tensor in drawn.items()}


@every_case
def test_a_layer_is_a_value_that_can_be_written_down(case: Case) -> None:
    for node in case.spec:
        layer = node.layer
        for text in (repr(layer), *([] if hasattr(layer, "op") and hasattr(layer, "args") else [str(layer)])):
            copy = eval(text, vars(L))
            assert copy == layer
            assert hash(copy) == hash(layer)


def test_the_table_covers_every_layer() -> None:
    ours = {name for name, cls in LAYERS.items() if cls.__module__.startswith("taylorfx.layers.") and name[0] != "_"}
    # A network of several calls has Choose, tests/interop/test_optional.py; mixtures of experts, test_mixtures.py.
    elsewhere = {"Choose", "Ones", "TopKWeights", "ExpertBias", "ExpertLinear"}
    assert ours == elsewhere | {type(node.layer).__name__ for case in CASES for node in case.spec}
    assert ours == {name for name in vars(L) if name in LAYERS}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Conv2d(1, 2, 3)", "Conv2d(1, 2, (3, 3))"),
        ("Conv1d(1, 2, 3, padding=1)", "Conv1d(1, 2, [3], padding=(1,), stride=(1,))"),
        ("MaxPool2d(2)", "MaxPool2d(2, stride=(2, 2))"),
        ("LayerNorm(4)", "LayerNorm((4,))"),
        ("Attention(4, 4)", "Attention(4, 4, num_kv_heads=4, v_head_dim=4, scale=0.5)"),
        ("Permute((0, 2, 1))", "Permute([0, 2, 1])"),
    ],
)
def test_layers_that_say_the_same_are_equal(one: str, other: str) -> None:
    a, b = eval(one, vars(L)), eval(other, vars(L))
    assert a == b
    assert len({a, b}) == 1
    assert str(L.Conv2d(1, 2, 3, padding=(1, 1))) == "Conv2d(1, 2, 3, padding=1)"
    assert L.Conv2d(1, 2, 3) != L.Conv2d(1, 2, 3, bias=False)
    assert L.LayerNorm((4, 4)) != L.LayerNorm(4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Conv2d(4, 6, 3, groups=4)", "Groups divide"),
        ("Conv2d(4, 6, 3, groups=0)", "Groups divide"),
        ("Conv2d(4, 6, (3, 3, 3))", "takes 2 whole numbers for kernel_size"),
        ("Conv2d(4, 6, 3, stride=1.5)", "takes 2 whole numbers for stride"),
        ("Conv2d(4, 6, 3, stride=2, padding='same')", "stride of 1"),
        ("Conv2d(4, 6, 3, padding='full')", "'same' or 'valid'"),
        ("ConvTranspose2d(4, 6, 3, padding='same')", "takes 2 whole numbers for padding"),
        ("ConvTranspose1d(4, 6, 3, 2, 1, 2)", "smaller than stride or dilation"),
        ("AvgPool2d(3, 1, 2)", "half of the window"),
        ("MaxPool1d(None)", "takes a whole number for kernel_size"),
        ("Attention(6, 2, 4)", "multiple of the number of key heads"),
        ("Slice(1, 3, 3)", "start < stop"),
        ("Upsample(0)", "at least 1"),
        ("Dropout(1.5)", "probability"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eval(text, vars(L))


@pytest.mark.parametrize("layer", [L.Conv2d(1, 2, 5), L.MaxPool2d(5), L.ConvTranspose2d(1, 2, 1, padding=2)])
def test_a_window_that_does_not_fit_its_input_is_refused(layer: tfx.Layer) -> None:
    with pytest.raises(ShapeError, match="takes larger inputs"):
        tfx.serial(tfx.Input((1, 4, 4)), layer).table()


@pytest.mark.parametrize("layer", [L.BatchNorm1d(3), L.BatchNorm1d(3, track_running_stats=False)])
def test_a_batch_norm_refuses_to_train_on_one_value_per_channel(layer: tfx.Layer) -> None:
    spec = tfx.serial(tfx.Input((3,)), layer)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        tfx.train(tfx.init(spec, torch.Generator()), spec, torch.randn(1, 3))


def test_dropout_drops_about_p_scales_the_rest_and_draws_from_its_generator() -> None:
    spec, x = tfx.serial(L.Dropout(0.3)), torch.rand(100, 200) + 1

    def draw(seed: int) -> Tensor:
        return tfx.train({}, spec, x, generator=torch.Generator().manual_seed(seed))[0]

    before = torch.get_rng_state()
    value = draw(0)
    assert abs((value == 0).double().mean().item() - 0.3) < 0.02
    assert_close(value[value != 0], x[value != 0] / 0.7)
    assert torch.equal(value, draw(0))
    assert not torch.equal(value, draw(1))
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"
    assert torch.equal(tfx.train({}, tfx.serial(L.Dropout(0.0)), x)[0], x)
    gone = tfx.train({}, tfx.serial(L.Dropout(1.0)), x, generator=torch.Generator())[0]
    assert torch.equal(gone, torch.zeros_like(x))
    with pytest.raises(ValueError, match="no generator"):
        tfx.train({}, spec, x)


def test_a_parameter_starts_at_its_fill_with_noise_of_its_deviation() -> None:
    layer = L.Parameter((200, 100), fill=2.0, std=0.5)
    value = layer.init(torch.Generator().manual_seed(0))["value"]
    assert abs(value.mean().item() - 2) < 0.02
    assert abs(value.std().item() - 0.5) < 0.02
    assert torch.equal(L.Parameter(3, fill=1.5).init(torch.Generator())["value"], torch.full((3,), 1.5))


def padded(length: int) -> Tensor:
    """What a causal decoder may look at: two of three examples are padded on the left, one of them nearly whole."""
    keep = torch.ones(3, length, dtype=torch.bool)
    keep[1, :2] = keep[2, : length - 1] = False
    return keep[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_queries_that_may_attend_nowhere_get_zeros_as_in_torch(dtype: torch.dtype, added: bool) -> None:
    q, k, v = torch.randn(3, 3, 2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    keep = padded(6)
    mask = torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, -torch.inf) if added else keep
    ours = partial(L.ScaledDotProduct(0.5).apply, {})

    def torchs(*inputs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*inputs, scale=0.5)

    def flat(*inputs: Tensor) -> Tensor:
        packed = [x.transpose(1, 2).flatten(2) for x in inputs[:3]]
        return heads(L.Attention(2, 4, scale=0.5).apply({}, *packed, inputs[3]), 2)

    for function in (ours, flat):
        value, pull = torch.func.vjp(lambda *x: function(*x, mask), q, k, v)  # noqa: B023
        expected, other = torch.func.vjp(lambda *x: torchs(*x, mask), q, k, v)
        assert_close(value, expected)
        assert_close(pull(expected), other(expected))
        assert value[1, :, :2].abs().max() == 0
        each = torch.func.vmap(lambda *x: function(*(y[None] for y in x))[0])(q, k, v, mask)  # noqa: B023
        assert_close(each, value)


@pytest.mark.parametrize("order", [-1.0, 0.0, 0.5, 1.0, 2.0, torch.inf, -torch.inf])
def test_norms_are_exact_where_zeros_do_not_change_them(order: float) -> None:
    layer = L.Along("linalg_vector_norm.default", (SLOT[0], order, (1,), True), dims=(1,), lengths=(1,))
    coupling = check_layer(layer, (5, 3))
    assert len(coupling) == 8
    assert coupling.exact[:5].all() == (order >= 0)


def test_rrelu_draws_slopes_as_torch_does() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(1))
    value, _ = L.RReLU(0.1, 0.4).train({}, x, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(3)
    assert_close(value, F.rrelu(x, 0.1, 0.4, training=True))
    with pytest.raises(ValueError, match="generator"):
        L.RReLU().train({}, x, generator=None)


def test_what_drops_out_between_recurrent_layers_and_in_attention_is_what_torch_drops() -> None:
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    module = nn.LSTM(4, 3, 3, batch_first=True, dropout=0.4, bidirectional=True).double()
    layer = L.LSTM(4, 3, 3, True, True, 0.4, True, "hidden")
    value, _ = layer.train(dict(module.named_parameters()), x, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(2)
    assert_close(value, module(x)[1][0])
    q = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    dropping = L.ScaledDotProduct(0.5, dropout=0.3)
    attended, _ = dropping.train({}, q, q, q, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(2)
    assert_close(attended, F.scaled_dot_product_attention(q, q, q, dropout_p=0.3, scale=0.5))
