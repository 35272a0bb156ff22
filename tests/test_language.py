"""Criteria that the language benchmark writes down again are what their papers, or their authors' code, say."""

import importlib.util

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

if importlib.util.find_spec("torchvision"):
    from _torchvision import library

    library()

from _language import (
    INPUTS,
    Case,
    Size,
    check_torch_pruning,
    fluctuation,
    influence,
    leaving,
    llama,
    weights_times_slopes,
)

import taylorfx as tfx
from taylorfx.interop import huggingface
from taylorfx.interop.huggingface.texts import batches


@pytest.fixture(scope="module")
def case():
    model = llama(Size(32, layers=1, intermediate=24), 0).eval()
    rows = torch.randint(1024, (4, 12), generator=torch.Generator().manual_seed(0))
    scored = batches(rows, INPUTS, 4)
    model, params, spec = huggingface.from_pretrained(model, scored[0][0], outputs="logits")
    return Case(model, params, spec, scored, tfx.Constraints(), 0)


def mlp(case):
    return torch.from_numpy(case.coupling.unit_ids("model.layers.0.mlp.up_proj.weight", 0)[0])


def test_sums_over_weights_are_those_of_torch_pruning(case):
    pytest.importorskip("torch_pruning")
    check_torch_pruning(case, weights_times_slopes(case), leaving(case, torch.square))


def test_the_sum_takes_rows_of_two_matrices_and_columns_of_one(case):
    layer = case.model.model.layers[0].mlp
    rows = layer.gate_proj.weight.square().sum(1) + layer.up_proj.weight.square().sum(1)
    expected = (rows + layer.down_proj.weight.square().sum(0)).detach()
    torch.testing.assert_close(leaving(case, torch.square)[mlp(case)], expected)


def test_block_influence_is_one_minus_the_cosine(case):
    (inputs, _), given = case.batches[0], []
    hook = case.model.model.norm.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        case.model(**inputs)
        x, y = case.model.model.embed_tokens(inputs["input_ids"]), given[0]
    hook.remove()
    expected = 1 - ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean()
    assert influence(case) == [pytest.approx(expected.item(), abs=1e-6)]


def test_flap_is_the_variance_of_an_input_times_its_squared_weights(case):
    down, (inputs, _), taken = case.model.model.layers[0].mlp.down_proj, case.batches[0], []
    hook = down.register_forward_pre_hook(lambda _, args: taken.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        case.model(**inputs)
    hook.remove()
    x, w = taken[0], down.weight.detach()
    raw = torch.stack(
        [((x[:, j] - x[:, j].mean()) ** 2).sum() / (len(x) - 1) * (w[:, j] ** 2).sum() for j in range(24)]
    )
    expected = (raw - raw.mean()) / ((raw - raw.mean()) ** 2).sum().div(23).sqrt()
    torch.testing.assert_close(fluctuation(case)[mlp(case)], expected, rtol=1e-4, atol=1e-4)
