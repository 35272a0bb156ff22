"""Every layer's rules, proven by `check_layer`; and a layer from outside the package, in one class."""

from dataclasses import dataclass

import pytest
import torch

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.layers import LAYERS
from taylorfx.testing.laws import check_layer

MASK = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])

RULES: list[tuple[tfx.Layer, tuple]] = [
    (L.Conv1d(4, 6, 3, padding=1), ((4, 5),)),
    (L.Conv2d(4, 6, 3, padding="same"), ((4, 3, 3),)),
    (L.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), ((4, 4, 4),)),
    (L.Conv2d(4, 8, 3, padding=1, dilation=2, groups=4), ((4, 4, 4),)),
    (L.Conv2d(4, 4, 1, groups=4, bias=False), ((4, 2, 2),)),
    (L.Conv3d(2, 4, 2), ((2, 3, 3, 3),)),
    (L.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), ((4, 3),)),
    (L.ConvTranspose2d(4, 6, 2, groups=2, dilation=2), ((4, 2, 2),)),
    (L.Linear(4, 3), ((3, 4),)),
    (L.Linear(4, 3, bias=False), ((4,),)),
    (L.Embedding(5, 4), (torch.tensor([[0, 1], [2, 3], [4, 0]]),)),
    (L.Parameter((3, 2), std=1.0, expand=True), ((4,),)),
    (L.Buffer((3, 2), std=1.0, expand=True), ((4,),)),
    (L.BatchNorm1d(4), ((4, 3),)),
    (L.BatchNorm2d(4), ((4, 2, 2),)),
    (L.BatchNorm2d(4, affine=False, track_running_stats=False), ((4, 2, 2),)),
    (L.BatchNorm3d(3), ((3, 2, 2, 2),)),
    (L.InstanceNorm2d(3, affine=True, track_running_stats=True), ((3, 2, 2),)),
    (L.LayerNorm(4), ((3, 4),)),
    (L.LayerNorm((3, 4), bias=False), ((2, 3, 4),)),
    (L.RMSNorm(4), ((3, 4),)),
    (L.GroupNorm(2, 6), ((6, 2, 2),)),
    (L.InstanceNorm1d(3, affine=True), ((3, 4),)),
    (L.InstanceNorm3d(3), ((3, 2, 2, 2),)),
    (L.ConvTranspose3d(4, 6, 2, groups=2), ((4, 2, 2, 2),)),
    (L.PReLU(), ((3, 2),)),
    (L.PReLU(3), ((3, 2),)),
    *((layer, ((3, 2),)) for layer in (
        L.Identity(), L.ReLU(), L.ReLU6(), L.LeakyReLU(), L.ELU(), L.GELU(), L.SiLU(), L.Mish(),
        L.Sigmoid(), L.Tanh(), L.Softplus(), L.Hardswish(), L.Hardsigmoid(), L.Dropout(), L.RReLU(),
    )),
    (L.Softmax(1), ((3, 2),)),
    (L.MaxPool1d(2), ((3, 4),)),
    (L.MaxPool2d(3, 2, 1), ((3, 4, 4),)),
    (L.AvgPool1d(2, ceil_mode=True), ((3, 5),)),
    (L.AvgPool2d(2, 1), ((3, 3, 3),)),
    (L.AdaptiveAvgPool1d(2), ((3, 5),)),
    (L.AdaptiveAvgPool2d((1, 2)), ((3, 4, 4),)),
    (L.Upsample(2), ((3, 2, 2),)),
    (L.Upsample(2, "bilinear", align_corners=False), ((3, 2, 2),)),
    (L.Flatten(), ((3, 2, 2),)),
    (L.Flatten(2, 3), ((3, 2, 2),)),
    (L.Reshape((6, -1)), ((3, 2, 4),)),
    (L.Reshape((3, 2, 4)), ((6, 4),)),
    (L.Reshape((4, 6)), ((6, 4),)),
    (L.Permute((0, 2, 1)), ((3, 2),)),
    (L.Slice(1, 1, 3), ((4, 2),)),
    (L.Slice(-1, 0, 2), ((4, 3),)),
    (L.Concat(), ((2, 3), (3, 3))),
    (L.Concat(-1), ((2, 3), (2, 2))),
    (L.Add(), ((3, 4), (3, 4))),
    (L.Multiply(), ((3, 4), (3, 1))),
    (L.Multiply(), ((3, 4), (3, 4), (1, 4))),
    (L.View((1, 6, 4)), ((6, 2, 2),)),
    (L.Expand((-1, -1, 3)), ((4, 1),)),
    (L.MatMul(), ((3, 4), (4, 2))),
    (L.MatMul(), ((2, 3, 4), (2, 4, 2))),
    (L.Einsum("nthk,nskh->nhts"), ((3, 2, 4), (2, 4, 2))),
    (L.Einsum("nCx->nxC"), ((3, 2),)),
    (L.ScaledDotProduct(0.5), ((2, 3, 4), (2, 2, 4), (2, 2, 3))),
    (L.ScaledDotProduct(0.5, causal=True, grouped=True), ((4, 3, 2), (2, 3, 2), (2, 3, 2))),
    (L.ScaledDotProduct(0.5), ((2, 3, 4), (2, 3, 4), (2, 3, 4), MASK[:, None, None].expand(3, 1, 3, 3))),
    (L.Reduce("mean", (2, 3)), ((3, 2, 2),)),
    (L.Reduce("sum", (1,), keepdim=True), ((3, 2),)),
    (L.Reduce("amax", (-1,)), ((3, 2),)),
    (L.Pad((1, 1)), ((3, 2),)),
    (L.Elementwise("mul.Tensor", (("$", 0), ("$", 1))), ((3, 2), (3, 2))),
    (L.Elementwise("pow.Tensor_Scalar", (("$", 0), 2)), ((3, 2),)),
    (L.Captured("cumsum.default", (("$", 0), 1), shape=(1, 3, 2), made=0, given=(0,)), ((3, 2),)),
    (L.Along("flip.default", (("$", 0), (1,)), dims=(1,)), ((3, 2),)),
    (L.Along("slice.Tensor", (("$", 0), 2, 0, 4, 2), dims=(2,), lengths=(2,)), ((3, 4),)),
    (L.Along("var.dim", (("$", 0), (2,)), dims=(2,), lengths=(0,)), ((3, 4),)),
    (L.PixelUnshuffle(2), ((2, 4, 4),)),
    (L.Maps("upsample_nearest2d.vec", (("$", 0), None, (2.0, 2.0)), space=(4, 4)), ((3, 2, 2),)),
    (L.Along("linalg_vector_norm.default", (("$", 0), 2, (1,), True), dims=(1,), lengths=(1,)), ((3, 4),)),
    (L.Along("topk.default", (("$", 0), 2, 2), item=0, dims=(2,), lengths=(2,)), ((3, 4),)),
    (L.LSTM(4, 3, batch_first=True, bidirectional=True), ((3, 4),)),
    (L.GRU(4, 3, 2, batch_first=True), ((3, 4),)),
    (L.RNN(4, 3, batch_first=True), ((3, 4),)),
    (L.PixelShuffle(2), ((8, 2, 2),)),
    (L.ChannelShuffle(3), ((6, 2),)),
    (L.Attention(2, 3), ((2, 6), (3, 6), (3, 6))),
    (L.Attention(4, 2, num_kv_heads=2, v_head_dim=3, causal=True), ((3, 8), (3, 4), (3, 6))),
    (L.Attention(2, 2), ((2, 4), (3, 4), (3, 4), MASK)),
    (L.Attention(2, 2), ((2, 4), (3, 4), (3, 4), MASK[:, None, None].expand(3, 2, 2, 3))),
    (L.Ones(), ((3, 4),)),
    (L.TopKWeights(2), ((3, 4), (3, 4))),
    (L.TopKWeights(2, "sigmoid"), ((3, 4), (3, 4))),
    (L.ExpertLinear(4, 3, 5, 2), ((3, 4), (3, 4), (3, 2, 3))),
    (L.ExpertLinear(4, 3, 5, 2, "sigmoid", transposed=True), ((3, 4), (3, 4), (3, 2, 3))),
    (L.ExpertBias(4, 5, 2), ((3, 4), (3, 4))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "inputs"), RULES, ids=lambda value: str(value) if isinstance(value, tfx.Layer) else ""
)
def test_what_is_cut_computes_what_is_gated(layer, inputs):
    check_layer(layer, *inputs)


def test_every_layer_is_in_the_table():
    tested = {type(layer) for layer, _ in RULES}
    own = {cls for name, cls in LAYERS.items() if "." not in name and not name.startswith("_")}
    weights = {L.Convolve, L.ConvolveTransposed, L.WeightNorm, L.SpectralNorm}  # see tests/modules.py
    calls = {tfx.Input, L.Choose}  # see tests/interop/test_optional.py
    assert own - tested == {L.Gather, *calls, *weights}


@dataclass(frozen=True)
class Bilinear(tfx.Layer):
    """A layer from outside: every output is a bilinear form of two inputs (``torch.nn.Bilinear``)."""

    in1_features: int
    in2_features: int
    out_features: int

    def signature(self, *shapes):
        return "... i, ... j, weight: o i j, bias: o -> ... o"

    def fields(self, *shapes):
        return {"in1_features": "i", "in2_features": "j", "out_features": "o"}

    def init(self, generator):
        return {name: torch.randn(shape, generator=generator) for name, shape in self.shapes().items()}

    def apply(self, params, *inputs):
        return torch.nn.functional.bilinear(*inputs, params["weight"], params["bias"])


def test_a_layer_from_outside_is_one_class():
    coupling = check_layer(Bilinear(3, 4, 5), (2, 3), (2, 4))
    assert dict(zip(coupling.scopes, coupling.sizes.tolist(), strict=True))["layer"] == 5


@dataclass(frozen=True)
class Liar(tfx.Layer):
    """A layer whose signature is wrong: it mixes the channels that it claims to pass."""

    def signature(self, *shapes):
        return "B c ... -> B c ..."

    def apply(self, params, *inputs):
        return inputs[0] + inputs[0].mean(1, keepdim=True)


def test_a_wrong_signature_is_found_out():
    with pytest.raises(AssertionError, match="cut differs from gated"):
        check_layer(Liar(), (4, 3))
