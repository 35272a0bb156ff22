"""Hidden units of recurrent layers, beside torch's own layers whose weights are masked, indexed or moved by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.scoring.measure import derivatives

SIZE, STEPS, CLOSE = 4, 5, {"rtol": 1e-9, "atol": 1e-9}


class Reader(nn.Module):
    """A recurrent layer, and a linear layer that reads the results that are named."""

    def __init__(self, rnn, *results, starts=0):
        super().__init__()
        self.rnn, self.results = rnn, results
        both, states = 2 if rnn.bidirectional else 1, rnn.num_layers * (2 if rnn.bidirectional else 1)
        width = {"sequence": STEPS * both, "hidden": states, "cell": states}
        self.start = nn.ModuleList(nn.Linear(3, rnn.hidden_size) for _ in range(starts))
        self.head = nn.Linear(rnn.hidden_size * sum(width[x] for x in results), 3)

    def forward(self, x):
        start = [start(x[:, 0]).tanh()[None] for start in self.start]
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        sequence, last = self.rnn(x, *([tuple(start)] if len(start) > 1 else start))
        sequence = sequence if self.rnn.batch_first else sequence.transpose(0, 1)
        hidden, cell = last if isinstance(last, tuple) else (last, None)
        results = {"sequence": sequence, "hidden": hidden.transpose(0, 1), "cell": cell}
        if cell is not None:
            results["cell"] = cell.transpose(0, 1)
        return self.head(torch.cat([results[x].flatten(1) for x in self.results], 1))


NETWORKS = {
    "LSTM": lambda: Reader(nn.LSTM(3, SIZE, batch_first=True), "sequence"),
    "LSTM, deep, both ways": lambda: Reader(nn.LSTM(3, SIZE, 2, batch_first=True, bidirectional=True), "sequence"),
    "LSTM that gives out its state": lambda: Reader(nn.LSTM(3, SIZE, 2), "sequence", "hidden", "cell"),
    "LSTM from a given state": lambda: Reader(nn.LSTM(3, SIZE, batch_first=True), "sequence", "cell", starts=2),
    "GRU, deep, time first": lambda: Reader(nn.GRU(3, SIZE, 3), "sequence"),
    "GRU, both ways": lambda: Reader(nn.GRU(3, SIZE, batch_first=True, bidirectional=True), "sequence", "hidden"),
    "GRU from a given state": lambda: Reader(nn.GRU(3, SIZE, bias=False), "hidden", starts=1),
    "RNN": lambda: Reader(nn.RNN(3, SIZE, 2, nonlinearity="relu", batch_first=True), "sequence"),
}


def example(name):
    """The module, a batch, and the captured network with its hidden units alone."""
    torch.manual_seed(0)
    module = NETWORKS[name]().double().eval()
    x, targets = torch.randn(3, STEPS, 3, dtype=torch.float64), torch.tensor([0, 1, 2])
    params, spec = tfx.from_torch(module, x)
    return module, x, targets, params, spec, tfx.couple(params, spec)


def masked(module, factors):
    """The module in which every matrix that reads a hidden unit reads it times a factor."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for path, weight in module.named_parameters():
            reads = path == "head.weight" or "weight_hh" in path or ("weight_ih" in path and "_l0" not in path)
            if reads:
                weight *= factors.repeat(weight.shape[1] // SIZE)
    return module


def indexed(module, kept):
    """The parameters of the module without the other hidden units, every axis of hidden units indexed by hand."""
    result = {}
    for path, tensor in module.named_parameters():
        for axis in range(tensor.ndim):
            inputs = axis == 1 and (("weight_ih" in path and "_l0" in path) or path.startswith("start"))
            if not inputs and not (path.startswith("head") and axis == 0):
                blocks = torch.arange(tensor.shape[axis] // SIZE)[:, None] * SIZE
                tensor = tensor.index_select(axis, (blocks + torch.tensor(kept)).flatten())
        result[path] = tensor
    return result


@pytest.mark.parametrize("name", NETWORKS)
def test_a_hidden_unit_is_scored_gated_and_cut_as_the_module_without_it(name):
    module, x, targets, params, spec, coupling = example(name)
    assert coupling.scopes == ("rnn: hidden",)
    assert len(coupling) == SIZE
    assert coupling.exact.all()

    def losses(factors):
        return F.cross_entropy(masked(module, factors)(x), targets, reduction="none").detach()

    rows, step = derivatives(params, spec, x, targets, coupling).summed, 1e-5
    ones, steps = torch.ones(SIZE, dtype=x.dtype), step * torch.eye(SIZE, dtype=x.dtype)
    slopes = torch.stack([(losses(ones + one) - losses(ones - one)) / (2 * step) for one in steps], 1)
    assert_close(rows, slopes, rtol=1e-6, atol=1e-8)
    assert slopes.abs().min() > 1e-6, "so that no read can be missing"
    if not module.start:  # which writes hidden units, too, before an activation
        written = derivatives(params, spec, x, targets, coupling, at_writes=True).summed
        assert_close(written, rows, **CLOSE)

    kept = [0, 2]
    plan = tfx.Plan(coupling, np.isin(np.arange(SIZE), kept))
    mask = torch.isin(torch.arange(SIZE), torch.tensor(kept)).to(x)
    small, gated = tfx.cut(params, plan), tfx.apply(params, spec, x, gates=plan.gates)
    assert_close(gated, masked(module, mask)(x), **CLOSE)
    assert_close(tfx.apply(small, plan.spec, x), gated, **CLOSE)
    for path, tensor in indexed(module, kept).items():
        assert_close(tfx.tree.flatten(small)[path], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["LSTM, deep, both ways", "LSTM that gives out its state", "GRU from a given state"])
def test_the_class_of_the_module_holds_fewer_hidden_units(name):
    module, x, _, params, _, coupling = example(name)
    plan = tfx.Plan(coupling, np.arange(SIZE) != 1)
    small = tfx.cut(params, plan)
    like = tfx.to_torch(small, plan.spec, like=module).eval()
    assert type(like) is Reader
    assert like.rnn.hidden_size == SIZE - 1
    assert_close(like(x), tfx.apply(small, plan.spec, x), **CLOSE)


@pytest.mark.parametrize("layer", [L.LSTM(3, 4, 3, dropout=0.4, bidirectional=True), L.GRU(3, 4, 2, dropout=0.4)])
def test_what_drops_out_step_by_step_is_what_drops_out_in_the_layer(layer):
    leaves, x = layer.init(torch.Generator().manual_seed(0)), torch.randn(5, 2, 3)
    seeded = [torch.Generator().manual_seed(1) for _ in range(2)]
    value, _ = layer.train(leaves, x, generator=seeded[0])
    assert_close(layer.recur(leaves, x, read=lambda h: h, training=True, generator=seeded[1]), value)


def test_activations_of_a_hidden_unit_are_those_of_all_steps():
    """Each step but the last is read by the next one, the start is zero, and the head reads all."""
    module, x, targets, params, spec, coupling = example("LSTM")
    states = module.rnn(x)[0].detach()
    stats = tfx.measure(params, spec, (x, targets), coupling, moments=True)
    assert_close(stats.moments.sum.double(), states.sum((0, 1)) + states[:, :-1].sum((0, 1)), rtol=1e-6, atol=1e-6)
    assert_close(stats.moments.count.double(), torch.full((SIZE,), 2.0 * 3 * STEPS).double())


def test_a_layer_that_computes_something_else_says_so_step_by_step_too():
    with pytest.raises(TypeError, match="Louder overrides apply alone"):

        class Louder(L.LSTM):
            def apply(self, params, *inputs):
                return 2 * super().apply(params, *inputs)


@pytest.mark.filterwarnings("ignore:Reader draws random numbers")  # torch tags the operator so: it might drop out
def test_a_layer_with_projections_is_frozen():
    torch.manual_seed(0)
    module = Reader(nn.LSTM(3, SIZE, batch_first=True, proj_size=2), "sequence")
    module.head = nn.Linear(2 * STEPS, 3)
    module, x = module.double().eval(), torch.randn(3, STEPS, 3, dtype=torch.float64)
    params, spec = tfx.from_torch(module, x)
    assert_close(tfx.apply(params, spec, x), module(x), **CLOSE)
    assert not len(tfx.couple(params, spec))
