"""Two processes with half of the batches each know what one with all of them knows."""

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo  # torch.func needs it; imported when there is a group, it would keep that and its threads alive
import torch.multiprocessing
from constructs import CONSTRUCTS
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx.testing import assert_trees_equal, network, random_plan

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
    means = tfx.means(net.params, net.spec, batches, net.coupling)
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
