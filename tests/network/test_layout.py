"""Parameters reach the layers from every kind of tree and module, and none that do not fit do."""

from collections import OrderedDict
from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.interop import from_torch, to_torch
from taylorfx.network.layout import Layout
from taylorfx.network.parameters import gather
from taylorfx.testing.strategies import networks
from taylorfx.tree import flatten, map_paths, merge, unflatten

EXACT = {"rtol": 0.0, "atol": 0.0}


@given(networks())
def test_leaves_are_gathered_by_their_paths(net):
    leaves = flatten(net.params)
    gathered = gather(net.params, net.spec)
    assert len(gathered) == len(leaves) == len(net.spec.layout.paths)
    assert all(x is leaves[path] for path, x in zip(net.spec.layout.paths, gathered, strict=True))


def turned(tree):
    return {key: turned(value) if isinstance(value, dict) else value for key, value in reversed(tree.items())}


KINDS = {
    "other order": turned,
    "ordered": lambda tree: OrderedDict(turned(tree)),
    "read only": lambda tree: MappingProxyType({key: MappingProxyType(value) for key, value in tree.items()}),
    "empty subtrees": lambda tree: {**tree, "nothing": {"below": {}}},
    "flat": flatten,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_of_any_mapping_is_taken(kind):
    spec = tfx.serial(tfx.Input((3,)), fc=L.Linear(3, 4), act=L.ReLU(), out=L.Linear(4, 2))
    params, x = tfx.init(spec, torch.Generator().manual_seed(0)), torch.randn(5, 3)
    assert_close(tfx.apply(KINDS[kind](params), spec, x), tfx.apply(params, spec, x), **EXACT)


@given(networks(), st.data())
def test_one_leaf_that_does_not_fit_is_refused_by_its_path(net, data):
    paths = list(flatten(net.params))
    if not paths:
        return
    path = data.draw(st.sampled_from(paths))
    whole = flatten(net.params)
    wrong = {
        "missing": {k: v for k, v in whole.items() if k != path},
        "another shape": {**whole, path: whole[path][None]},
        "no tensor": {**whole, path: whole[path].numpy()},
        "nothing": {**whole, path: None},
        "one too many": {**whole, "one.too.many": whole[path]},
    }
    what = data.draw(st.sampled_from(sorted(wrong)))
    name = "one.too.many" if what == "one too many" else path
    with pytest.raises(tfx.SpecError, match=f"(?m)^  {name.replace('.', '[.]')}: "):
        gather(unflatten(wrong[what]), net.spec)


def test_layouts_number_every_subtree_once():
    layout = Layout.of(["a.b.x", "a.c.x", "a.x", "y", "a.x"])
    tree = {"y": 4, "a": {"x": 3, "c": {"x": 2}, "b": {"x": 1}}}
    subtrees = layout.walk(tree)
    assert (layout.leaves(subtrees), layout.complete(subtrees), len(subtrees)) == ([1, 2, 3, 4], True, 4)
    tree["a"]["c"]["z"] = 5
    assert not layout.complete(layout.walk(tree))


@given(networks(), st.data())
def test_a_merge_replaces_the_leaves_it_is_given_and_shares_the_rest(net, data):
    chosen = data.draw(st.sets(st.sampled_from([*flatten(net.params), "elsewhere"])))
    merged = merge(net.params, {path: torch.zeros(()) for path in chosen})
    assert flatten(merged).keys() == flatten(net.params).keys()
    for (path, leaf), new in zip(flatten(net.params).items(), flatten(merged).values(), strict=True):
        assert (new is leaf) == (path not in chosen)
    for key, value in net.params.items():
        if not any(path.split(".")[0] == key for path in chosen):
            assert merged[key] is value


# The module that runs a spec.


def module():
    params, spec = from_torch(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(2, 2, 5, 5))
    return to_torch(params, spec)


def doubled(path, leaf):
    return leaf * 2 if path == "0.weight" else leaf


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def replaced(out):
    out.get_submodule("0").weight = nn.Parameter(out.get_submodule("0").weight * 2)


def loaded(out):
    out.load_state_dict({k: v * 2 if k == "0.weight" else v for k, v in out.state_dict().items()})


def parametrized(out):
    nn.utils.parametrize.register_parametrization(out.get_submodule("0"), "weight", Twice())


def plain(out):  # as torch.nn.utils.prune and the old weight_norm do it
    conv = out.get_submodule("0")
    weight = conv.weight
    del conv.weight
    conv.register_parameter("weight_orig", weight)
    conv.weight = 2 * weight


@pytest.mark.parametrize("change", [replaced, loaded, parametrized, plain])
def test_a_module_runs_with_the_parameters_that_it_holds_now(change):
    out, x = module(), torch.randn(3, 2, 5, 5)
    out(x)  # whatever is prepared is prepared
    expected = tfx.apply(map_paths(doubled, out.tree()), out.spec, x)
    change(out)
    assert_close(out(x), expected, **EXACT)
    swapped = torch.func.functional_call(module_ := module(), flatten(map_paths(doubled, module_.tree())), (x,))
    assert_close(swapped, tfx.apply(map_paths(doubled, module_.tree()), module_.spec, x), **EXACT)


def test_a_module_refuses_parameters_that_came_to_have_another_shape():
    out = module()
    out.get_submodule("0").weight.data = torch.zeros(4, 2, 5, 5)
    with pytest.raises(tfx.SpecError, match=r"0[.]weight: expected"):
        out(torch.randn(3, 2, 5, 5))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_running_statistics_move_in_the_buffers_that_were_there_as_the_module_moves_its_own(norm, momentum):
    theirs = nn.Sequential(norm(2, momentum=momentum, track_running_stats=True), nn.ReLU()).double()
    out = to_torch(*from_torch(theirs, torch.randn(2, 2, 5, 5).double())).train()
    theirs.train()
    buffers = dict(out.named_buffers())
    for _ in range(3):
        x = torch.randn(4, 2, 5, 5).double()
        assert_close(out(x), theirs(x), rtol=1e-12, atol=1e-12)
    for name, buffer in theirs.named_buffers():
        assert out.get_buffer(name) is buffers[name]
        assert_close(buffers[name], buffer, rtol=1e-12, atol=1e-12)
