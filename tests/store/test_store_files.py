"""Networks in files: the values that went in, files that are complete or not there, and clear errors from any bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch
from constructs import CONSTRUCTS
from hypothesis import HealthCheck, given, settings
from networks import transformer

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.network.parameters import check
from taylorfx.store import files
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import network, random_plan

NET = network(CONSTRUCTS["chain"])


def tensors(**leaves):
    """A network that is nothing but these tensors."""
    nodes = tuple(tfx.Node(name, L.Parameter(tuple(leaf.shape))) for name, leaf in leaves.items())
    return leaves, tfx.Spec(nodes, tuple(leaves))


def header(path):
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_a_network_survives_a_file(name, tmp_path):
    net = network(CONSTRUCTS[name])
    tfx.save(tmp_path / "net.safetensors", net.params, net.spec)
    params, spec = tfx.load(tmp_path / "net.safetensors")
    assert spec == net.spec
    assert_trees_equal(params, net.params)


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_the_file_of_a_network_holds_its_coupling(name, tmp_path):
    """Which is a function of the spec and of shapes: the same to every number, also without the parameters' values."""
    net = network(CONSTRUCTS[name])
    tfx.save(tmp_path / "net.safetensors", net.params, net.spec)
    spec = tfx.from_json(tfx.to_json(net.spec))
    shapes = tfx.tree.unflatten((path, torch.empty(shape, device="meta")) for path, shape in spec.shapes.items())
    for again in (tfx.couple(*tfx.load(tmp_path / "net.safetensors")), tfx.couple(shapes, spec)):
        for field in fields(tfx.Coupling):
            assert alike(getattr(again, field.name), getattr(net.coupling, field.name)), field.name


def alike(one, other):
    """Whether two parts of couplings are equal, in the same order."""
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, Mapping):
        return [*one] == [*other] and all(alike(value, other[key]) for key, value in one.items())
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(alike, one, other))
    if is_dataclass(one) and not isinstance(one, (tfx.Spec, tfx.Node, tfx.Layer)):
        return all(alike(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return one == other


BASE = torch.arange(12.0).reshape(3, 4)
COMPLEX = torch.complex(BASE, -BASE)


def saved(path, **leaves):
    tfx.save(path, *tensors(**leaves))
    return tfx.load(path)[0], safetensors.torch.load_file(path)


@pytest.mark.parametrize(
    "leaf",
    [
        COMPLEX.conj(), COMPLEX.conj().imag, COMPLEX.conj().mT, torch._neg_view(BASE), BASE.T, BASE[::2, 1:3], BASE[1],
        BASE[0, 0], BASE[:1].expand(5, 4), BASE.requires_grad_(True) * 2, torch.nn.Parameter(BASE.detach().T),
        BASE.detach().bfloat16(), BASE.detach().half(), BASE.detach() > 5, BASE.detach().long(), BASE.detach().byte(),
        BASE.detach().double(), BASE.detach().to(torch.float8_e4m3fn),
    ],
    ids=lambda leaf: f"{leaf.dtype}{list(leaf.shape)}",
)  # fmt: skip
def test_a_tensor_is_saved_by_its_values(leaf, tmp_path):
    found, plain = saved(tmp_path / "x", a=leaf, b=torch.ones(3, dtype=torch.float64))
    expected = leaf.detach().resolve_conj().resolve_neg().clone()
    for a in (found["a"], plain["a"]):
        assert (a.dtype, a.shape) == (expected.dtype, expected.shape)
        assert torch.equal(a.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    assert torch.equal(found["b"], torch.ones(3, dtype=torch.float64))


def test_tensors_that_share_memory_are_saved_each_by_its_own_values(tmp_path):
    base = torch.arange(12.0)
    leaves = {"a": base, "b": base, "c": base[2:5], "d": base.view(3, 4).T, "e": base[:1].expand(7)}
    found, plain = saved(tmp_path / "x", **leaves)
    for name, leaf in leaves.items():
        assert torch.equal(found[name], leaf)
        assert torch.equal(plain[name], leaf)


def test_a_name_that_safetensors_keeps_for_itself_is_refused_when_saved(tmp_path):
    with pytest.raises(tfx.SpecError, match="__metadata__: safetensors reserves this name"):
        tfx.save(tmp_path / "x", *tensors(__metadata__=torch.ones(2)))
    tree = {"__metadata__": {"weight": torch.ones(2, 2), "bias": torch.ones(2)}}
    spec = tfx.serial(tfx.Input((2,)), __metadata__=L.Linear(2, 2))
    tfx.save(tmp_path / "y", tree, spec)  # below it there is room
    assert_trees_equal(tfx.load(tmp_path / "y")[0], tree)
    assert [path.name for path in tmp_path.iterdir()] == ["y"]


def test_what_has_no_values_or_no_type_is_refused_all_of_it(tmp_path):
    leaves = {"a": torch.empty(2, device="meta"), "b": torch.ones(2, 2).to_sparse(), "c": torch.ones(2)}
    with pytest.raises(tfx.SpecError, match=r"(?s)a: on the meta device.*b: not dense") as caught:
        tfx.save(tmp_path / "x", *tensors(**leaves))
    assert "c:" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    with pytest.raises(tfx.FileError, match=r"nodes\[0\].name: a name has 1 to 512 characters"):
        tfx.save(tmp_path / "x", *tensors(**{"a" * 600: torch.ones(1)}))
    assert not [*tmp_path.iterdir()]


# The file itself.


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_file_has_the_mode_of_any_new_file(mask, tmp_path):
    before = os.umask(mask)
    try:
        tfx.save(tmp_path / "net", NET.params, NET.spec)
        (tmp_path / "other").write_text("")
        tfx.cut_file(tmp_path / "net", tmp_path / "small", random_plan(NET.coupling, torch.Generator().manual_seed(0)))
    finally:
        os.umask(before)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    path = tmp_path / "net"
    path.write_text("secret")
    path.chmod(0o600)
    tfx.save(path, NET.params, NET.spec)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_stays_a_link_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    for name, there in (("old", True), ("new", False)):
        target, link = tmp_path / "there" / name, tmp_path / name
        if there:
            target.write_text("old")
        link.symlink_to(target)
        tfx.save(link, NET.params, NET.spec)
        assert link.is_symlink()
        assert not target.is_symlink()
        assert tfx.load(target)[1] == NET.spec
        tfx.cut_file(link, link, random_plan(NET.coupling, torch.Generator().manual_seed(0)))
        assert link.is_symlink()
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["new", "old"]


def test_the_users_own_files_beside_it_are_left_alone(tmp_path):
    for name in ("net.partial", "net.tmp", ".net", "net~"):
        (tmp_path / name).write_text("mine")
    tfx.save(tmp_path / "net", NET.params, NET.spec)
    tfx.cut_file(tmp_path / "net", tmp_path / "net", random_plan(NET.coupling, torch.Generator().manual_seed(0)))
    assert {path.name for path in tmp_path.iterdir()} == {"net", "net.partial", "net.tmp", ".net", "net~"}
    assert all(path.read_text() == "mine" for path in tmp_path.iterdir() if path.name != "net")


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk_leaves_what_was_there(step, old, tmp_path, monkeypatch):
    path, small = tmp_path / "net", tmp_path / "small"
    plan = random_plan(NET.coupling, torch.Generator().manual_seed(0))
    tfx.save(path, NET.params, NET.spec)
    before = path.read_bytes()
    if not old:
        path.rename(tmp_path / "source")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":
        seen = files.replacing

        @contextlib.contextmanager
        def replacing(target):
            with seen(target) as out:
                yield type("Full", (), {"write": lambda self, data: full() if out.tell() else out.write(data)})()

        monkeypatch.setattr(files, "replacing", replacing)
    elif step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(files.Path, "replace", full)
    there = {item.name for item in tmp_path.iterdir()}
    source = path if old else tmp_path / "source"
    for use in (lambda: tfx.save(path, NET.params, NET.spec), lambda: tfx.cut_file(source, small, plan),
                lambda: tfx.cut_file(source, path, plan)):  # fmt: skip
        with pytest.raises(OSError, match="No space left"):
            use()
    assert {item.name for item in tmp_path.iterdir()} == there
    assert source.read_bytes() == before


def test_a_folder_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        tfx.save(tmp_path / "no" / "such" / "folder", NET.params, NET.spec)
    assert not [*tmp_path.iterdir()]


# What a file holds.


def written(path, leaves, metadata):
    safetensors.torch.save_file(leaves, path, metadata)
    return path


def test_a_file_without_a_spec_is_refused(tmp_path):
    with pytest.raises(tfx.FileError, match="has its spec in the header"):
        tfx.load(written(tmp_path / "other", {"x": torch.zeros(1)}, None))


def test_tensors_that_are_not_the_networks_are_all_named(tmp_path):
    leaves = {**tfx.tree.flatten(NET.params), "x": torch.ones(1), ".".join("a" * 3000): torch.ones(1)}
    del leaves["0.weight"]
    leaves["0.bias"] = torch.ones(9)
    path = written(tmp_path / "x", leaves, {"taylorfx.spec": tfx.to_json(NET.spec)})
    with pytest.raises(tfx.FileError) as caught:
        tfx.load(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: the tensors are not those of its network:"
    assert {line.strip().split(":")[0] for line in lines[1:]} == {"x", ".".join("a" * 3000), "0.weight", "0.bias"}


def test_a_files_operators_are_checked_when_it_is_loaded(tmp_path):
    relu = L.Elementwise("relu.default", (("$", 0),))
    data = json.loads(tfx.to_json(tfx.serial(L.Input((3,)), relu)))
    data["nodes"][1]["fields"] |= {"op": "from_file.default", "args": ["/etc/passwd", True, 3]}
    path = written(tmp_path / "x", {}, {"taylorfx.spec": json.dumps(data)})
    with pytest.raises(
        tfx.FileError, match=r"x: This document(?s:.*)nodes\[1\].fields.op: 'from_file.default' is not among"
    ):
        tfx.load(path)
    with pytest.raises(tfx.FileError, match=r"nodes\[1\].fields.op"):
        tfx.cut_file(path, tmp_path / "y", random_plan(NET.coupling, torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "net"
    tfx.save(path, NET.params, NET.spec)
    return path.read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=0, max_size=9)), min_size=1, max_size=3), st.data())
def test_any_bytes_are_a_network_or_a_file_error(tmp_path, whole, changes, data):
    raw = bytearray(whole)
    for place, new in changes:
        raw[place : place + len(new)] = new
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    (tmp_path / "x").write_bytes(raw)
    plan = random_plan(NET.coupling, torch.Generator().manual_seed(0))
    with contextlib.suppress(tfx.FileError):
        params, spec = tfx.load(tmp_path / "x")
        assert isinstance(spec, tfx.Spec)
        check(params, spec)
    with contextlib.suppress(tfx.FileError, tfx.PlanError):
        tfx.cut_file(tmp_path / "x", tmp_path / "y", plan)


# Tied tensors.


def tied():
    nodes = (
        tfx.Node("tokens", L.Input((4,))),
        tfx.Node("embed", L.Embedding(7, 3), ("tokens",)),
        tfx.Node("mix", L.Linear(3, 3), ("embed",)),
        tfx.Node("head", L.Linear(3, 7, bias=False), ("mix",), "embed"),
    )
    spec = tfx.Spec(nodes)
    params = tfx.init(spec, torch.Generator().manual_seed(0))
    return params, spec, tfx.Plan(tfx.couple(params, spec), [True, False, True])


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens)).relu())


@pytest.mark.parametrize("left_out", ["embed.weight", "head.weight", ""])
def test_a_checkpoint_of_a_tied_module_is_cut_under_the_names_that_it_has(left_out, tmp_path):
    module, tokens = Tied().eval(), torch.randint(7, (3, 5))
    params, spec = tfx.from_torch(module, tokens)
    leaves = {name: leaf.clone() for name, leaf in module.state_dict().items() if name != left_out}
    coupling = tfx.couple(params, spec)
    plan = tfx.Plan(coupling, torch.arange(len(coupling)).ne(1).numpy())
    tfx.cut_file(written(tmp_path / "whole", leaves, {"format": "pt"}), tmp_path / "small", plan)
    found = safetensors.torch.load_file(tmp_path / "small")
    assert found.keys() == leaves.keys()
    small = tfx.to_torch(tfx.cut(params, plan), plan.spec).state_dict()
    assert all(torch.equal(leaf, small[name]) for name, leaf in found.items())
    assert_trees_equal(tfx.load(tmp_path / "small")[0], tfx.cut(params, plan))


@pytest.mark.parametrize("names", [("embed.weight",), ("head.weight",), ("embed.weight", "head.weight")])
def test_a_tied_tensor_is_cut_under_any_of_its_names(names, tmp_path):
    params, _, plan = tied()
    leaves = {path: leaf for path, leaf in tfx.tree.flatten(params).items() if path != "embed.weight"}
    leaves |= {name: params["embed"]["weight"].clone() for name in names}
    tfx.cut_file(written(tmp_path / "whole", leaves, {"format": "pt"}), tmp_path / "small", plan)
    found = safetensors.torch.load_file(tmp_path / "small")
    assert found.keys() == leaves.keys()
    assert all(torch.equal(found[name], params["embed"]["weight"][:, [0, 2]]) for name in names)
    again, small = tfx.load(tmp_path / "small")
    assert small == plan.spec
    assert_trees_equal(again, tfx.cut(params, plan))


def test_the_name_that_safetensors_kept_is_read_from_its_note(tmp_path):
    module = torch.nn.Module()
    module.a, module.b = torch.nn.Embedding(7, 3), torch.nn.Linear(3, 7, bias=False)
    module.b.weight = module.a.weight
    safetensors.torch.save_model(module, str(tmp_path / "whole"))
    kept = next(name for name in header(tmp_path / "whole") if name != "__metadata__")
    other = {"a.weight": "b", "b.weight": "a"}[kept]  # the network has it by the name that was left out
    nodes = (
        tfx.Node("tokens", L.Input((4,))),
        tfx.Node("one", L.Embedding(7, 3), ("tokens",), other),
        tfx.Node("mix", L.Linear(3, 3), ("one",)),
        tfx.Node("two", L.Linear(3, 7, bias=False), ("mix",), other),
    )
    spec = tfx.Spec(nodes)
    params = tfx.init(spec, torch.Generator().manual_seed(0))
    plan = tfx.Plan(tfx.couple(params, spec), [True, False, True])
    tfx.cut_file(tmp_path / "whole", tmp_path / "small", plan)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "small")[kept], module.a.weight[:, [0, 2]])
    found = header(tmp_path / "small")["__metadata__"]
    assert found.items() > header(tmp_path / "whole")["__metadata__"].items()


def test_a_tied_tensor_with_two_values_is_not_loaded(tmp_path):
    params, spec, _ = tied()
    leaves = {**tfx.tree.flatten(params), "head.weight": torch.zeros(7, 3)}
    path = written(tmp_path / "x", leaves, {"taylorfx.spec": tfx.to_json(spec)})
    with pytest.raises(tfx.FileError, match=r"head.weight: another name of embed.weight, but with other values"):
        tfx.load(path)


def test_a_file_of_a_larger_network_is_refused_before_it_is_cut(tmp_path):
    net = network(transformer())
    plan = random_plan(net.coupling, torch.Generator().manual_seed(0))
    leaves = {".".join("a" * 3000): torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(tfx.PlanError, match=r"(?s)a.a.a: the network has no.*\n  b: the network has no"):
        tfx.cut_file(written(tmp_path / "x", leaves, None), tmp_path / "y", plan)
    (tmp_path / "z").write_bytes(b"no safetensors")
    with pytest.raises(tfx.FileError, match="z cannot be read as a safetensors file"):
        tfx.cut_file(tmp_path / "z", tmp_path / "y", plan)
    with pytest.raises(FileNotFoundError):
        tfx.load(tmp_path / "nothing")
