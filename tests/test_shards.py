"""Parameters of which every process has a shard give what one process computes of whole ones.

Processes are slow to start. Two and four of them are started once each, and check the laws and the faults in one go.
"""

import dataclasses
import gc
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import test_distributed
import torch
from constructs import CONSTRUCTS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distributed import CLOSE, computed, group, raised, residual, setting, shares
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn import functional as F
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.cutting.cut import Scratch, take
from taylorfx.distributed import gathered, indexed, sharded, total
from taylorfx.scoring.measure import derivatives
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import network

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo meets in a file elsewhere")


def share(params: Any, mesh: Any, placements: Callable[[torch.Tensor], Any]) -> Any:
    """The parameters placed on a mesh; numbers without an axis stay with every process."""
    return tfx.tree.map_paths(
        lambda _, x: distribute_tensor(x, mesh, placements(x), src_data_rank=None) if x.ndim else x, params
    )


def last_and_first(x: torch.Tensor) -> list[Any]:
    """On a mesh of two dimensions, as tensor parallelism leaves them: rows, columns, or none."""
    return [Shard(x.ndim - 1), Shard(0)] if x.ndim > 1 else [Replicate(), Shard(0)]


def measured_as_by_one(rank: int, size: int) -> None:
    """Every construct, with batches of which one process of four has none."""
    mesh = init_device_mesh("cpu", (size,))
    square = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "model"))
    for name in ("chain", "shared", "grouped", "excitation", "one key head", "table", "untracked batch norm"):
        net = network(CONSTRUCTS[name])
        (x,), y = net.batch[0].values(), net.batch[1]
        batches = [(x[: 1 + k % 3], y[: 1 + k % 3]) for k in range(6)]
        mine = (batches[:4], batches[4:]) if size == 2 else (batches[:1], [], batches[1:3], batches[3:])
        for how in ({}, {"training": True, "moments": True}):
            one = tfx.measure(net.params, net.spec, batches, net.coupling, rows=True, **how)
            for params in (share(net.params, mesh, lambda x: [Shard(0)]), share(net.params, square, last_and_first)):
                stats = tfx.measure(params, net.spec, mine[rank], net.coupling, rows=True, total=total, **how)
                assert_close(stats.rows, one.rows, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
                assert (stats.networks, stats.n) == (one.networks, one.n)
                if how:
                    assert_close(stats.moments.sum_sq, one.moments.sum_sq, **CLOSE)


def all_of_it(rank: int, size: int, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `test_distributed` computes of whole parameters: measured, repaired, pruned, compared."""
    net, plan, batches = setting()
    mesh = init_device_mesh("cpu", (size,))
    shared = net._replace(params=share(net.params, mesh, lambda x: [Shard(0)]))
    monkeypatch.setattr(test_distributed, "setting", lambda: (shared, plan, batches))
    deep = residual()
    deep = deep._replace(params=share(deep.params, mesh, lambda x: [Shard(0)]))
    monkeypatch.setattr(test_distributed, "residual", lambda: deep)
    found = computed(shares(size)[rank], total)
    stats, means = found.pop("stats"), found.pop("means")
    for name, (params, _) in found.items():
        kept = [x for x in tfx.tree.flatten(params).values() if x.ndim > 1]
        assert all(isinstance(x, DTensor) and x.placements == (Shard(0),) for x in kept), name
    trees = {name: (gathered(params), spec) for name, (params, spec) in found.items()}
    weights = tfx.criteria.weight_l1(shared.params, net.coupling)
    if rank == 0:
        torch.save({"stats": stats, "means": means, "weights": weights, **trees}, f"{folder}/all")
    else:
        assert not any(params for params, _ in trees.values())


def faults(rank: int, size: int) -> None:
    """What cannot be is refused by name, in all processes, which go on afterwards."""
    net, plan, _ = setting()
    mine, wrong = shares(size)[rank], rank == size - 1
    mesh = init_device_mesh("cpu", (size,))
    params = share(net.params, mesh, lambda x: [Shard(0)])
    leaf = next(path for path, x in tfx.tree.flatten(params).items() if x.ndim > 1)

    def changed(x: Any) -> Any:
        return tfx.tree.map_paths(lambda path, leaf_: x(leaf_) if path == leaf else leaf_, params)

    def measure(params: Any, **options: Any) -> Any:
        return tfx.measure(params, net.spec, mine, net.coupling, **options)

    partial = changed(lambda x: DTensor.from_local(x.full_tensor(), mesh, [Partial()]))
    square = init_device_mesh("cpu", (size // 2, 2))
    moved = changed(lambda x: distribute_tensor(x.full_tensor(), square, [Replicate(), Replicate()]))

    def unlucky(logits: Any, target: Any) -> Any:
        if wrong:
            raise OSError("no space left")
        return F.cross_entropy(logits, target)

    def unlucky_choice(*args: Any, **options: Any) -> Any:
        if wrong:
            raise OSError("no space left")
        return tfx.joint(*args, **options)

    calls = {
        "without total": (lambda: measure(params), "without total=. Give"),
        "derivatives": (lambda: derivatives(params, net.spec, *setting()[2][0], net.coupling),
                        "without total=. Give"),
        "a repair without total": (lambda: tfx.compensate(params, plan, mine), "without total=. Give"),
        "partial": (lambda: measure(partial, total=total), rf"{leaf}: placed as \(Partial\(sum\),\)"),
        "two meshes": (lambda: measure(moved, total=total), rf"on one mesh.*{leaf}: on DeviceMesh"),
        "a file": (lambda: tfx.save("none.safetensors", params, net.spec), rf"received .*{leaf}.*gathered\(params\)"),
        "deployed": (lambda: tfx.interop.deploy(params, net.spec, setting()[2][0][0]), r"gathered\(params\)"),
        "a folder": (lambda: tfx.interop.huggingface.save_pretrained("none", params, net.spec, like=None),
                     r"gathered\(params\)"),
        "plans": (lambda: tfx.cut(params, tfx.Plan(net.coupling, np.arange(len(net.coupling)) % 5 != wrong)),
                  "process 0: .* plan .* process .* plan "),
        "a loss that fails": (lambda: measure(params, loss=unlucky, total=total), "no space left"),
        "a choice that fails": (lambda: tfx.prune(params, net.spec, mine, budget=tfx.Flops(0.5), choose=unlucky_choice,
                                                  total=total), "no space left"),
    }  # fmt: skip
    for what, (call, words) in calls.items():
        said = raised(call, what)
        assert re.search(words, said, re.DOTALL), f"{what} in process {rank}: {said}"
        if "that fails" in what:
            assert said == "no space left" if wrong else f"process {size - 1}: OSError" in said
    assert measure(params, total=total).n == sum(len(x) for x, _ in setting()[2]), "they go on after failures"


class Model(nn.Module):
    """Blocks, each of which is sharded as one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 11), nn.GELU(), nn.Linear(11, 6)) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: torch.Tensor = self.head(x)
        return out


def captured() -> tuple[Any, tfx.Spec]:
    """The module without numbers."""
    with torch.device("meta"):
        blank, example = Model().double().eval(), torch.empty(8, 6, dtype=torch.float64)
    return tfx.from_torch(blank, example)


def fully_sharded(rank: int, size: int, blank: Any, spec: tfx.Spec) -> None:
    """A module captured without numbers, then sharded by `fully_shard`: its own tensors come in by their names."""
    torch.manual_seed(0)
    model, (x, y) = Model().double(), (torch.randn(8, 6).double(), torch.arange(8) % 3)
    whole_params = tfx.tree.unflatten({path: model.state_dict()[path] for path in tfx.tree.flatten(blank)})
    momentum = tfx.tree.map_paths(lambda _, x: x.clone().mul_(3), whole_params)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    assert "has no numbers" in raised(lambda: sharded(blank, {}), "meta")
    strange = {"head.weight": torch.zeros(2, 2)}
    assert "head.weight: captured as (3, 6), received (2, 2)" in raised(lambda: sharded(blank, strange), "shapes")
    params = sharded(blank, model.state_dict())
    assert all(isinstance(leaf, DTensor) for leaf in tfx.tree.flatten(params).values())
    mine = [(x[rank::size], y[rank::size])]
    how: Any = {"budget": tfx.Flops(0.6), "steps": 1, "repair": tfx.reconstruct}
    pruned = tfx.prune(params, spec, mine, total=total, **how)
    together = [(x[k::size], y[k::size]) for k in range(size)]
    expected = tfx.prune(whole_params, spec, together, **how)
    assert pruned.plan.digest == expected.plan.digest
    shards = share(momentum, init_device_mesh("cpu", (size,)), lambda x: [Shard(0)])
    moved = gathered(tfx.cut(shards, pruned.plan))
    small = gathered(pruned.params)
    with torch.no_grad():  # every process calls it, with an input of its own
        value = tfx.apply(pruned.params, pruned.spec, x[: rank + 1])
    assert_close(value, tfx.apply(expected.params, expected.spec, x[: rank + 1]), **CLOSE)
    if rank == 0:
        assert_trees_equal(small, expected.params, **CLOSE)
        assert_trees_equal(moved, tfx.cut(momentum, expected.plan), rtol=0, atol=0)


def cuts_commute(rank: int, size: int) -> None:
    """Cutting shards and gathering them is gathering and cutting."""
    mesh = init_device_mesh("cpu", (size,))
    square = init_device_mesh("cpu", (size // 2, 2))

    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.data())
    def law(shape: list[int], data: st.DataObject) -> None:
        kinds = st.sampled_from([Replicate(), *(Shard(k) for k in range(len(shape)))])
        on = data.draw(st.sampled_from([mesh, square]))
        placements = [data.draw(kinds) for _ in range(on.ndim)]
        dtype = data.draw(st.sampled_from([torch.float64, torch.bfloat16, torch.int64]))
        leaf = torch.arange(np.prod(shape)).reshape(shape).to(dtype)
        keep = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in shape]
        indices = [None if all(k) else torch.tensor(k).nonzero()[:, 0] for k in keep]
        tensor = distribute_tensor(leaf, on, placements, src_data_rank=None)

        def plain(x: torch.Tensor, some: Any) -> torch.Tensor:
            return take(x, tuple(some), Scratch())

        result, expected = indexed(tensor, indices, plain), plain(leaf, indices)
        assert result.placements == tensor.placements
        again = distribute_tensor(expected, on, placements, src_data_rank=None)
        assert torch.equal(result.to_local(), again.to_local()), "each process has the shard that it would be given"
        assert torch.equal(result.full_tensor(), expected)

    law()


WIDTH = 26


def whole_ones() -> int:
    """How many of the square weights are whole in this process, wherever they are held."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter) and x.shape == (WIDTH, WIDTH)]
        return len({x.untyped_storage().data_ptr() for x in tensors if not x.is_meta} - {0})


class Counting(torch.autograd.Function):
    """The identity, which counts what is whole as it is computed and as its derivative is."""

    counts: ClassVar[dict[str, list[int]]] = {"forward": [], "backward": []}

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        Counting.counts["forward"].append(whole_ones())
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        Counting.counts["backward"].append(whole_ones())
        return grads[0]


@dataclasses.dataclass(frozen=True)
class Counted(tfx.Layer):
    """Between two layers."""

    def signature(self, *shapes: Any) -> str:
        return "B c -> B c"

    def apply(self, params: Any, *inputs: torch.Tensor) -> torch.Tensor:
        return Counting.apply(inputs[0])  # type: ignore[no-any-return]


def about_one_is_whole(rank: int, size: int) -> None:
    """Between layers nothing is whole in the forward pass, and the layer before, if any, in the backward pass."""
    parts = [part for _ in range(6) for part in (L.Linear(WIDTH, WIDTH), L.GELU(), Counted())]
    spec = tfx.serial(tfx.Input((WIDTH,)), *parts, L.Linear(WIDTH, 3))
    params = tfx.init(spec, torch.Generator().manual_seed(0))
    coupling, batch = tfx.couple(params, spec), (torch.randn(4, WIDTH), torch.arange(4) % 3)
    shares = share(params, init_device_mesh("cpu", (size,)), lambda x: [Shard(0)])
    del params
    tfx.measure(shares, spec, [batch], coupling, total=total)
    forward, backward = Counting.counts["forward"], Counting.counts["backward"]
    assert (len(forward), len(backward)) == (6, 5), "nothing is differentiated before the first gate"
    assert max(forward) == 0, forward
    assert max(backward) <= 1, backward


def process(rank: int, size: int, folder: str, blank: Any, spec: tfx.Spec) -> None:
    with group(rank, size, folder), pytest.MonkeyPatch.context() as monkeypatch:
        if size == 2:
            all_of_it(rank, size, folder, monkeypatch)
        else:
            measured_as_by_one(rank, size)
        about_one_is_whole(rank, size)
        cuts_commute(rank, size)
        fully_sharded(rank, size, blank, spec)
        faults(rank, size)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_with_shards_compute_what_one_does_with_all_of_it(size: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (size, str(tmp_path), *captured()), nprocs=size)
    if size != 2:
        return
    net, _, batches = setting()
    expected, result = computed(batches, None), torch.load(tmp_path / "all", weights_only=False)
    assert_close(result.pop("weights"), tfx.criteria.weight_l1(net.params, net.coupling), rtol=0, atol=0)
    stats, means = result.pop("stats"), result.pop("means")
    assert_close(stats.rows, expected["stats"].rows, **CLOSE)
    assert_close(dict(means.sum), dict(expected["means"].sum), **CLOSE)
    assert result.keys() == expected.keys() - {"stats", "means"}
    for name, (params, spec) in result.items():
        assert spec == expected[name][1], name
        assert_trees_equal(params, expected[name][0], **CLOSE)
