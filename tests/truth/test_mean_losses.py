"""The mean loss of networks, whole and without units, against torch."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx.testing.strategies import networks, random_plan
from taylorfx.truth.losses import each_loss, mean_loss


def total(one):
    """As of two processes that measure the same."""
    value = one()
    return value + value


@settings(max_examples=15)
@given(networks(branches=True), st.integers(0, 2**16))
def test_it_is_that_of_the_cut_network_over_all_examples(net, seed):
    inputs, targets = net.batch
    batches = [net.batch, net.batch]
    plan = random_plan(net.coupling, torch.Generator().manual_seed(seed))
    expected = F.cross_entropy(tfx.apply(net.params, net.spec, inputs), targets, reduction="none")
    how = tfx.Measurement()
    assert_close(each_loss(net.params, net.coupling, batches, how), torch.cat([expected, expected]).double())
    assert mean_loss(net.params, net.coupling, batches, how) == pytest.approx(float(expected.mean()))
    assert mean_loss(net.params, net.coupling, net.batch, tfx.Measurement(total=total)) == pytest.approx(
        float(expected.mean())
    )
    if not net.coupling.exact[plan.leaving].all():
        return
    cut = F.cross_entropy(tfx.apply(tfx.cut(net.params, plan), plan.spec, inputs), targets)
    assert mean_loss(net.params, net.coupling, net.batch, how, plan=plan) == pytest.approx(float(cut), rel=1e-5)


@given(networks())
@settings(max_examples=3)
def test_what_is_not_finite_is_not_left_out_and_no_examples_are_refused(net):
    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets) + torch.where(targets == 0, math.inf, 0.0).sum()

    inputs, targets = net.batch
    how = tfx.Measurement(loss=loss)
    assert math.isnan(mean_loss(net.params, net.coupling, (inputs, targets * 0), how))
    with pytest.raises(ValueError, match="received none"):
        mean_loss(net.params, net.coupling, [], how)
