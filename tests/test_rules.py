"""Every layer's rules, proven by `check_layer`; and a layer from outside the package, in one class."""

from dataclasses import dataclass

import pytest
import torch

import taylorfx as tfx
from taylorfx.layers import LAYERS
from taylorfx.testing import check_layer

MASK = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])

RULES: list[tuple[tfx.Layer, tuple]] = [
    (tfx.Conv1d(4, 6, 3, padding=1), ((4, 5),)),
    (tfx.Conv2d(4, 6, 3, padding="same"), ((4, 3, 3),)),
    (tfx.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), ((4, 4, 4),)),
    (tfx.Conv2d(4, 8, 3, padding=1, dilation=2, groups=4), ((4, 4, 4),)),
    (tfx.Conv2d(4, 4, 1, groups=4, bias=False), ((4, 2, 2),)),
    (tfx.Conv3d(2, 4, 2), ((2, 3, 3, 3),)),
    (tfx.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), ((4, 3),)),
    (tfx.ConvTranspose2d(4, 6, 2, groups=2, dilation=2), ((4, 2, 2),)),
    (tfx.Linear(4, 3), ((3, 4),)),
    (tfx.Linear(4, 3, bias=False), ((4,),)),
    (tfx.Embedding(5, 4), (torch.tensor([[0, 1], [2, 3], [4, 0]]),)),
    (tfx.Parameter((3, 2), std=1.0, expand=True), ((4,),)),
    (tfx.Buffer((3, 2), std=1.0, expand=True), ((4,),)),
    (tfx.BatchNorm1d(4), ((4, 3),)),
    (tfx.BatchNorm2d(4), ((4, 2, 2),)),
    (tfx.BatchNorm2d(4, affine=False, track_running_stats=False), ((4, 2, 2),)),
    (tfx.BatchNorm3d(3), ((3, 2, 2, 2),)),
    (tfx.InstanceNorm2d(3, affine=True, track_running_stats=True), ((3, 2, 2),)),
    (tfx.LayerNorm(4), ((3, 4),)),
    (tfx.LayerNorm((3, 4), bias=False), ((2, 3, 4),)),
    (tfx.RMSNorm(4), ((3, 4),)),
    (tfx.GroupNorm(2, 6), ((6, 2, 2),)),
    (tfx.InstanceNorm1d(3, affine=True), ((3, 4),)),
    (tfx.InstanceNorm3d(3), ((3, 2, 2, 2),)),
    (tfx.ConvTranspose3d(4, 6, 2, groups=2), ((4, 2, 2, 2),)),
    (tfx.PReLU(), ((3, 2),)),
    (tfx.PReLU(3), ((3, 2),)),
    *((layer, ((3, 2),)) for layer in (
        tfx.Identity(), tfx.ReLU(), tfx.ReLU6(), tfx.LeakyReLU(), tfx.ELU(), tfx.GELU(), tfx.SiLU(), tfx.Mish(),
        tfx.Sigmoid(), tfx.Tanh(), tfx.Softplus(), tfx.Hardswish(), tfx.Hardsigmoid(), tfx.Dropout(), tfx.RReLU(),
    )),
    (tfx.Softmax(1), ((3, 2),)),
    (tfx.MaxPool1d(2), ((3, 4),)),
    (tfx.MaxPool2d(3, 2, 1), ((3, 4, 4),)),
    (tfx.AvgPool1d(2, ceil_mode=True), ((3, 5),)),
    (tfx.AvgPool2d(2, 1), ((3, 3, 3),)),
    (tfx.AdaptiveAvgPool1d(2), ((3, 5),)),
    (tfx.AdaptiveAvgPool2d((1, 2)), ((3, 4, 4),)),
    (tfx.Upsample(2), ((3, 2, 2),)),
    (tfx.Upsample(2, "bilinear", align_corners=False), ((3, 2, 2),)),
    (tfx.Flatten(), ((3, 2, 2),)),
    (tfx.Flatten(2, 3), ((3, 2, 2),)),
    (tfx.Reshape((6, -1)), ((3, 2, 4),)),
    (tfx.Reshape((3, 2, 4)), ((6, 4),)),
    (tfx.Reshape((4, 6)), ((6, 4),)),
    (tfx.Permute((0, 2, 1)), ((3, 2),)),
    (tfx.Slice(1, 1, 3), ((4, 2),)),
    (tfx.Slice(-1, 0, 2), ((4, 3),)),
    (tfx.Concat(), ((2, 3), (3, 3))),
    (tfx.Concat(-1), ((2, 3), (2, 2))),
    (tfx.Add(), ((3, 4), (3, 4))),
    (tfx.Multiply(), ((3, 4), (3, 1))),
    (tfx.Multiply(), ((3, 4), (3, 4), (1, 4))),
    (tfx.View((1, 6, 4)), ((6, 2, 2),)),
    (tfx.Expand((-1, -1, 3)), ((4, 1),)),
    (tfx.MatMul(), ((3, 4), (4, 2))),
    (tfx.MatMul(), ((2, 3, 4), (2, 4, 2))),
    (tfx.Einsum("nthk,nskh->nhts"), ((3, 2, 4), (2, 4, 2))),
    (tfx.Einsum("nCx->nxC"), ((3, 2),)),
    (tfx.ScaledDotProduct(0.5), ((2, 3, 4), (2, 2, 4), (2, 2, 3))),
    (tfx.ScaledDotProduct(0.5, causal=True, grouped=True), ((4, 3, 2), (2, 3, 2), (2, 3, 2))),
    (tfx.ScaledDotProduct(0.5), ((2, 3, 4), (2, 3, 4), (2, 3, 4), MASK[:, None, None].expand(3, 1, 3, 3))),
    (tfx.Reduce("mean", (2, 3)), ((3, 2, 2),)),
    (tfx.Reduce("sum", (1,), keepdim=True), ((3, 2),)),
    (tfx.Reduce("amax", (-1,)), ((3, 2),)),
    (tfx.Pad((1, 1)), ((3, 2),)),
    (tfx.Elementwise("mul.Tensor", (("$", 0), ("$", 1))), ((3, 2), (3, 2))),
    (tfx.Elementwise("pow.Tensor_Scalar", (("$", 0), 2)), ((3, 2),)),
    (tfx.Captured("cumsum.default", (("$", 0), 1), shape=(1, 3, 2), made=0, given=(0,)), ((3, 2),)),
    (tfx.Along("flip.default", (("$", 0), (1,)), dims=(1,)), ((3, 2),)),
    (tfx.Along("slice.Tensor", (("$", 0), 2, 0, 4, 2), dims=(2,), lengths=(2,)), ((3, 4),)),
    (tfx.Along("var.dim", (("$", 0), (2,)), dims=(2,), lengths=(0,)), ((3, 4),)),
    (tfx.PixelUnshuffle(2), ((2, 4, 4),)),
    (tfx.Maps("upsample_nearest2d.vec", (("$", 0), None, (2.0, 2.0)), space=(4, 4)), ((3, 2, 2),)),
    (tfx.Along("linalg_vector_norm.default", (("$", 0), 2, (1,), True), dims=(1,), lengths=(1,)), ((3, 4),)),
    (tfx.Along("topk.default", (("$", 0), 2, 2), item=0, dims=(2,), lengths=(2,)), ((3, 4),)),
    (tfx.LSTM(4, 3, batch_first=True, bidirectional=True), ((3, 4),)),
    (tfx.GRU(4, 3, 2, batch_first=True), ((3, 4),)),
    (tfx.RNN(4, 3, batch_first=True), ((3, 4),)),
    (tfx.PixelShuffle(2), ((8, 2, 2),)),
    (tfx.ChannelShuffle(3), ((6, 2),)),
    (tfx.Attention(2, 3), ((2, 6), (3, 6), (3, 6))),
    (tfx.Attention(4, 2, num_kv_heads=2, v_head_dim=3, causal=True), ((3, 8), (3, 4), (3, 6))),
    (tfx.Attention(2, 2), ((2, 4), (3, 4), (3, 4), MASK)),
    (tfx.Attention(2, 2), ((2, 4), (3, 4), (3, 4), MASK[:, None, None].expand(3, 2, 2, 3))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "inputs"), RULES, ids=lambda value: str(value) if isinstance(value, tfx.Layer) else ""
)
def test_what_is_cut_computes_what_is_gated(layer, inputs):
    check_layer(layer, *inputs)


def test_every_layer_is_in_the_table():
    tested = {type(layer) for layer, _ in RULES}
    own = {cls for name, cls in LAYERS.items() if "." not in name and not name.startswith("_")}
    weights = {tfx.Convolve, tfx.ConvolveTransposed, tfx.WeightNorm, tfx.SpectralNorm}  # see tests/modules.py
    assert own - tested == {tfx.Input, tfx.Gather, *weights}


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
