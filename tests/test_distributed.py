"""Two processes with half of the batches each know what one with all of them knows."""

import dataclasses
import functools
import os
import sys
from pathlib import Path

import optree
import pytest
import torch
import torch._dynamo  # torch.func needs it; imported when there is a group, it would keep that and its threads alive
import torch.multiprocessing
from constructs import CONSTRUCTS
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import network, random_plan

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def setting():
    """A network, a plan for it, and four batches."""
    net = network(CONSTRUCTS["chain"])
    plan = random_plan(net.coupling, torch.Generator().manual_seed(1))
    x, y = next(iter(net.batch[0].values())), net.batch[1]
    return net, plan, [(x + 0.1 * k, y) for k in range(4)]


def known(batches, net, plan):
    """What is measured, averaged and repaired with some batches, added up over the processes."""
    stats = tfx.measure(net.params, net.spec, batches, net.coupling, rows=True, moments=True)
    means = tfx.repair.means(net.params, net.spec, batches, net.coupling)
    params, _ = tfx.reconstruct(net.params, plan, batches, total=tfx.distributed.total)
    return tfx.distributed.total(stats), tfx.distributed.total(means), params


def process(rank: int, folder: str) -> None:
    """One of two."""
    net, plan, batches = setting()
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(known(batches[2 * rank :][:2], net, plan), f"{folder}/{rank}")
    other = network(CONSTRUCTS["chain" if rank else "dense"])
    with pytest.raises(ValueError, match="of the same units"):
        tfx.distributed.total(tfx.measure(other.params, other.spec, other.batch, other.coupling))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo meets in a file elsewhere")
def test_processes_add_up(tmp_path: Path):
    net, plan, batches = setting()
    stats, means, params = known(batches, net, plan)
    torch.multiprocessing.spawn(functools.partial(process, folder=str(tmp_path)), nprocs=2)
    for rank in range(2):
        other, others, repaired = torch.load(tmp_path / str(rank), weights_only=False)
        assert (other.n, other.units, others.count) == (stats.n, stats.units, means.count)
        for field in ("loss", "sum", "sum_abs", "sum_sq", "rows"):
            assert_close(getattr(other, field), getattr(stats, field), **CLOSE)
        assert_close(other.moments.sum_sq, stats.moments.sum_sq, **CLOSE)
        assert_close(dict(others.sum), dict(means.sum), **CLOSE)
        assert_trees_equal(repaired, params, **CLOSE)


def failures(rank: int):
    """What goes wrong in the second of three processes: what every process holds, and what all of them say."""
    net, _, batches = setting()
    measure = functools.partial(tfx.measure, spec=net.spec, coupling=net.coupling)
    params, mine = net.params, batches[:1]
    wrong = rank == 1

    def changed(function):
        return optree.tree_map(function, params) if wrong else params

    def measured(params=params, batches=mine):
        return measure(params, batches=batches)

    infinite = [(x * torch.nan, y) for x, y in mine] if wrong else mine
    stats = measured()
    half = [(x.float(), y) for x, y in mine] if wrong else mine
    yield (
        "fails",
        lambda: measured(batches=infinite),
        "process 1: ValueError: Losses have to be finite; that of batch 0",
    )
    yield (
        "infinite",
        dataclasses.replace(stats, sum=stats.sum / (0 if wrong else 1)),
        "process 1: its Statistics is not",
    )
    yield (
        "dtype",
        measured(changed(lambda x: x.float()), half),
        "process 0: Statistics in float64 .* process 1: .* float32",
    )
    last = list(tfx.tree.flatten(params))[-1]

    def moved(path, x):
        return x + 1e-9 if wrong and path == last else x

    yield (
        "parameters",
        measured(tfx.tree.map_paths(moved, params)),
        "process 0: .* parameters (.*), units .* process 1: ",
    )
    other = dataclasses.replace(net.coupling, reads=net.coupling.reads[:1]) if wrong else net.coupling
    yield "coupling", tfx.measure(params, net.spec, mine, other), "process 0: .* units (.*); process 1: "


def one_of_three(rank: int, folder: str) -> None:
    """The first and the last have batches, the second is the one with something wrong, and ends before the last sum."""
    net, _, batches = setting()
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=3)
    shards = [batches[:1], [], batches[1:]]
    shared = tfx.distributed.total(lambda: tfx.measure(net.params, net.spec, shards[rank], net.coupling, rows=True))
    torch.save(shared, f"{folder}/{rank}")
    for what, value, words in failures(rank):
        own = rank == 1 and what == "fails"  # its own error comes as it is
        with pytest.raises(ValueError, match="^Losses have to be finite" if own else words):
            tfx.distributed.total(value)
    if rank == 1:
        os._exit(0)  # as one that is killed: no goodbye
    with pytest.raises(RuntimeError, match="process 1 of 3 did not before the connection broke"):
        tfx.distributed.total(shared)
    Path(folder, f"{rank}.done").touch()
    os._exit(0)  # the group cannot be taken down in order any more


@pytest.mark.skipif(sys.platform == "win32", reason="gloo meets in a file elsewhere")
def test_processes_with_an_empty_share_change_nothing_and_ones_that_fail_are_named(tmp_path: Path):
    net, _, batches = setting()
    stats = tfx.measure(net.params, net.spec, batches, net.coupling, rows=True)
    torch.multiprocessing.spawn(functools.partial(one_of_three, folder=str(tmp_path)), nprocs=3)
    for rank in range(3):
        shared = torch.load(tmp_path / str(rank), weights_only=False)
        assert (shared.n, shared.batches, shared.networks) == (stats.n, stats.batches, stats.networks)
        assert_close(shared.rows, stats.rows, **CLOSE)
    assert all((tmp_path / f"{rank}.done").exists() for rank in (0, 2))
