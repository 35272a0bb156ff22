"""Cutting: fast, and the same as indexing axis by axis; from file to file, and the same as in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from constructs import CONSTRUCTS
from hypothesis import HealthCheck, example, given, settings
from networks import convolutional, transformer
from safetensors.torch import load_file, save_file
from torch import Tensor

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.cutting import cut as cutting
from taylorfx.store import files
from taylorfx.testing.strategies import network, networks, random_plan

SEEDS = st.integers(0, 2**16)
LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "expanded")
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip


def axis_by_axis(leaf: Tensor, indices: cutting.Indices) -> Tensor:
    """The plain way."""
    for axis, index in enumerate(indices):
        if index is not None:
            leaf = leaf.index_select(axis, index)
    return leaf


def bits(leaf: Tensor) -> list[int]:
    return leaf.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist()


def laid_out(shape: list[int], layout: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random bits, not numbers: what is no number has to be copied, too."""
    if layout == "strided":
        return laid_out([2 * n for n in shape], "contiguous", dtype, generator)[tuple(slice(1, None, 2) for _ in shape)]
    if layout == "expanded":
        return laid_out([1, *shape[1:]][: len(shape)], "contiguous", dtype, generator).expand(shape)
    if layout == "transposed":
        return laid_out(shape[::-1], "contiguous", dtype, generator).permute(tuple(range(len(shape)))[::-1])
    count = max(1, torch.tensor(shape).prod().item()) * dtype.itemsize
    drawn = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator, dtype=torch.uint8)
    leaf = drawn.view(dtype).reshape(shape)
    last = layout == "channels_last" and len(shape) == 4
    return leaf.contiguous(memory_format=torch.channels_last) if last else leaf


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Tensor, cutting.Indices, int]:
    """A tensor, the indices that stay along each axis (none for all), and the size of a block in bytes."""
    shape = draw(st.lists(st.integers(1, 7), min_size=0, max_size=4))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    leaf = laid_out(shape, draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(DTYPES)), generator)
    indices: list[Tensor | None] = []
    for n in shape:
        kept = draw(st.none() | st.sets(st.integers(0, n - 1), min_size=1))
        indices.append(None if kept is None else torch.tensor(sorted(kept)))
    return leaf, tuple(indices), draw(st.sampled_from([0, 16, 64, 2**19]))


KEPT = torch.tensor([0, 2, 3])
ORDINARY = torch.arange(7 * 5 * 4 * 3, dtype=torch.float32).reshape(7, 5, 4, 3)


@given(cuts())
@example((ORDINARY, (KEPT, KEPT, None, None), 64))
@example((ORDINARY, (None, None, KEPT, None), 64))
@example((ORDINARY, (None, KEPT, KEPT, None), 64))
@example((ORDINARY, (KEPT, KEPT, KEPT, KEPT[:2]), 64))
@example((ORDINARY[:, :, 0, 0], (KEPT, KEPT), 64))
@example((ORDINARY[:, :, 0, 0].bfloat16(), (KEPT, KEPT), 64))
@example((ORDINARY[:, :, :1, :1].double(), (None, KEPT, None, None), 64))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_blocks_of_rows_are_cut_bit_for_bit_as_axis_by_axis(case):
    leaf, indices, block = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "BLOCK", block)
        scratch = cutting.Scratch()
        found = cutting.take(leaf, indices, scratch)
        cutting.take(torch.zeros_like(leaf), indices, scratch)  # the next tensor takes nothing from the last one
    expected = axis_by_axis(leaf, indices)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert bits(found) == bits(expected)
    if all(index is None for index in indices):
        assert found is leaf
    else:
        assert found.is_contiguous()
        assert found.untyped_storage().nbytes() == found.nbytes, "it holds on to more than itself"
        assert found.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()


def test_large_tensors_go_through_blocks_and_watched_ones_do_not(monkeypatch):
    """What the law above is about happens, and only where it may."""
    seen = []
    along = cutting._along
    monkeypatch.setattr(cutting, "_along", lambda *args: (seen.append(1), along(*args)))
    monkeypatch.setattr(cutting, "BLOCK", 64)
    leaf, indices = torch.randn(8, 8), (KEPT, KEPT)
    scratch = cutting.Scratch()
    cutting.take(leaf, indices, scratch)
    assert seen
    seen.clear()
    watched = leaf.clone().requires_grad_()
    slope = torch.autograd.grad(cutting.take(watched, indices, scratch).sum(), watched)[0]
    assert slope.sum() == 9
    assert torch.equal(torch.func.grad(lambda x: cutting.take(x, indices, scratch).sum())(leaf), slope)
    mapped = torch.func.vmap(lambda x: cutting.take(x, indices, scratch))(leaf.expand(2, 8, 8))
    assert torch.equal(mapped, leaf[KEPT][:, KEPT].expand(2, 3, 3))
    assert cutting.take(leaf.to("meta"), (None, KEPT), scratch).shape == (8, 3) if not seen else False
    with torch.no_grad():
        assert not cutting.take(watched, indices, scratch).requires_grad
    assert seen


def same_file(one: Path, other: Path) -> None:
    (a, spec), (b, other_spec) = tfx.load(one), tfx.load(other)
    assert spec == other_spec
    assert tfx.tree.flatten(a).keys() == tfx.tree.flatten(b).keys()
    for path, leaf in tfx.tree.flatten(a).items():
        twin = tfx.tree.flatten(b)[path]
        assert (leaf.dtype, leaf.shape) == (twin.dtype, twin.shape), path
        assert bits(leaf) == bits(twin), path


def converted(params: tfx.Params, dtype: torch.dtype) -> tfx.Params:
    leaves = tfx.tree.flatten(params).items()
    return tfx.tree.unflatten((path, leaf.to(dtype) if leaf.is_floating_point() else leaf) for path, leaf in leaves)


def pinned(law):
    for spec in [*CONSTRUCTS.values(), convolutional(), transformer()]:
        law = example(network(spec), 1, torch.bfloat16, 40)(law)
    return given(networks(), SEEDS, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 400))(law)


@pinned
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_cutting_file_to_file_is_cutting_in_memory(tmp_path_factory, net, seed, dtype, rows):
    folder = tmp_path_factory.mktemp("cut")
    params = converted(net.params, dtype)
    plan = random_plan(net.coupling, torch.Generator().manual_seed(seed))
    tfx.save(folder / "whole", params, net.spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_ROWS", rows)
        tfx.cut_file(folder / "whole", folder / "small", plan)
    tfx.save(folder / "other", tfx.cut(tfx.load(folder / "whole")[0], plan), plan.spec)
    same_file(folder / "small", folder / "other")
    assert sorted(path.name for path in folder.iterdir()) == ["other", "small", "whole"]
    tfx.cut_file(folder / "whole", folder / "whole", plan)  # in place
    same_file(folder / "whole", folder / "other")


def test_a_shard_of_a_file_that_is_not_ours_is_cut_and_keeps_its_metadata(tmp_path):
    net = network(convolutional())
    plan = random_plan(net.coupling, torch.Generator().manual_seed(0))
    leaves = dict([*tfx.tree.flatten(net.params).items()][:3])
    save_file(leaves, tmp_path / "shard", {"format": "pt", "note": "äöü\n\x01"})
    tfx.cut_file(tmp_path / "shard", tmp_path / "small", plan)
    found = load_file(tmp_path / "small")
    assert found.keys() == leaves.keys()
    for path, leaf in tfx.tree.flatten(tfx.cut(tfx.tree.unflatten(leaves), plan)).items():
        assert torch.equal(found[path], leaf)
    raw = (tmp_path / "small").read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert metadata.pop("taylorfx.spec") == tfx.to_json(plan.spec)
    assert metadata == {"format": "pt", "note": "äöü\n\x01"}


def test_a_file_of_another_network_is_refused_and_nothing_is_written(tmp_path):
    net, other = network(convolutional()), network(transformer())
    plan = random_plan(net.coupling, torch.Generator().manual_seed(0))
    tfx.save(tmp_path / "other", other.params, other.spec)
    with pytest.raises(tfx.PlanError, match="of its own network"):
        tfx.cut_file(tmp_path / "other", tmp_path / "small", plan)
    save_file({"stem.weight": torch.zeros(6, 3, 3, 3), "x": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(tfx.PlanError, match=r"(?s)stem.weight: expected .*x: the network has no such parameter"):
        tfx.cut_file(tmp_path / "plain", tmp_path / "small", plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "plain"]


BOUNDED = """
import os, resource, sys
import taylorfx as tfx, torch
from taylorfx import layers as L
how, source = sys.argv[1:]
spec = tfx.serial(tfx.Input((8192,)), L.Linear(8192, 4096), L.Linear(4096, 8))
params = tfx.tree.unflatten((path, torch.empty(n, device="meta")) for path, n in spec.shapes.items())
coupling = tfx.couple(params, spec)
plan = tfx.select(torch.arange(len(coupling)) % 7.0, coupling, budget=0.5)
held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
# The file itself, which torch maps as its own, counts as well; its pages are not copied unless they are written.
resource.setrlimit(resource.RLIMIT_DATA, (held + os.path.getsize(source) + (40 << 20),) * 2)
if how == "file to file":
    tfx.cut_file(source, source + ".small", plan)
else:
    tfx.save(source + ".small", tfx.cut(tfx.load(source)[0], plan), plan.spec)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux how much memory a process may take")
def test_cutting_file_to_file_takes_less_memory_than_the_largest_tensor_that_stays(tmp_path):
    """40 MB do where 64 MB stay of a tensor of 128; the control is cutting in memory, for which they do not."""
    spec = tfx.serial(tfx.Input((8192,)), L.Linear(8192, 4096), L.Linear(4096, 8))
    tfx.save(tmp_path / "x", tfx.tree.unflatten((path, torch.ones(n)) for path, n in spec.shapes.items()), spec)

    def runs(how: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", BOUNDED, how, str(tmp_path / "x")], capture_output=True, text=True)

    done = runs("file to file")
    assert done.returncode == 0, done.stderr
    params, small = tfx.load(tmp_path / "x.small")
    assert params["0"]["weight"].shape == (2048, 8192) == (small["0"].layer.out_features, 8192)
    assert params["0"]["weight"].eq(1).all()
    assert "alloc" in runs("in memory").stderr
