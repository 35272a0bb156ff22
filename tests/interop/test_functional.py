"""What writes in place is captured as what it computes, with as few exports as that takes."""

import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from modules import conv, net
from torch import nn
from torch.export import ExportedProgram
from torch.testing import assert_close

from taylorfx import apply, from_torch
from taylorfx.interop.capture import programs


def on_a_copy(m, x):
    y = m.conv(x)
    return F.relu_(y.clone()) - y


def on_what_is_used_later(m, x):
    y = m.conv(x)
    z = y.flatten(2)
    F.relu_(y)
    return z.sum(2)


def on_a_piece(m, x):
    y = m.conv(x)
    y[:, 1:].mul_(2)
    return y


def on_a_view(m, x):
    y = m.conv(x)
    F.relu_(y.permute(0, 2, 3, 1))
    return y


def on_the_input(m, x):
    F.relu_(x)
    return m.conv(x)


def twice(m, x):
    y = m.conv(x)
    y.add_(1)
    z = y.view(y.shape)
    F.hardswish(y, inplace=True)
    return z.mul(3), y


def in_a_smaller_dtype(m, x):
    y = m.conv(x).float()
    y.mul_(m.scale)
    return y


def in_both_ways(m, x):
    y = F.relu_(m.conv(x))
    z = y + 1
    z[:, 1:].mul_(2)
    return y, z


WRITES = {
    on_a_copy: False, on_what_is_used_later: True, on_a_piece: True, on_a_view: True, on_the_input: True,
    twice: True, in_both_ways: True, in_a_smaller_dtype: True,
    lambda m, x: F.relu_(m.conv(x)).add_(1).clamp_(0.5) + 1: False,
    lambda m, x: F.relu_(m.conv(x)): False,
    lambda m, x: m.conv(x).masked_fill_(x[:, :1] > 0, 0.0): False,
}  # fmt: skip
"""How a module writes, and whether its graph has to be traced once more."""


@pytest.fixture
def counted():
    """Counts exports and second traces."""
    with (
        mock.patch.object(programs, "exported", wraps=programs.exported) as exports,
        mock.patch.object(
            ExportedProgram, "run_decompositions", autospec=True, side_effect=ExportedProgram.run_decompositions
        ) as traces,
    ):
        yield lambda: (exports.call_count, traces.call_count)


@pytest.mark.parametrize("forward", WRITES, ids=[f"{k} {forward.__name__}" for k, forward in enumerate(WRITES)])
def test_what_a_module_writes_in_place_is_what_the_network_computes(forward, counted):
    scale = torch.linspace(1, 2, 4, dtype=torch.float64).reshape(4, 1, 1)
    module = net(forward, 0, conv=conv(), scale=scale)[0].double().eval()
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        params, spec = from_torch(module, x.clone())
    assert_close(apply(params, spec, x.clone()), module(x.clone()))
    assert (counted()[1] > 0) == WRITES[forward]


def test_an_image_network_takes_two_exports(counted):
    block = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3), conv(4, 4))
    from_torch(net(lambda m, x: F.relu_(m.block(x)), 0, block=block)[0].eval(), torch.randn(2, 2, 8, 8))
    assert counted() == (2, 0)


def test_inputs_of_as_many_examples_share_their_number(counted):
    def forward(m, x, y):
        return m.one(x).view(len(y), -1, 4).sum(1) + m.other(y)

    module = net(forward, 0, one=nn.Linear(3, 4), other=nn.Linear(3, 4))[0].eval()
    x, y = torch.randn(2, 5, 3), torch.randn(2, 3)
    params, spec = from_torch(module, (x, y))
    assert_close(apply(params, spec, x[:, :4], y), module(x[:, :4], y))
    assert counted() == (2, 0)


def test_a_size_of_training_that_equals_a_number_of_inference_only_at_the_example_is_said():
    def forward(m, x):
        return m.conv(x).narrow(2, 0, x.shape[2] // 2 if m.training else 4)

    with pytest.warns(UserWarning, match="something else in training"):
        from_torch(net(forward, 0, conv=conv())[0].eval(), torch.randn(2, 2, 8, 8))
