"""What gathering costs: the share of the time of `measure` that processes with shards spend on it, and its bandwidth.

Gloo processes on one machine, so that the figures are of this machine's memory and cores. The last line computes
what as many bytes take at the bandwidth of a link::

    python benchmarks/gathering.py --processes 2 --width 512 --layers 8
"""

from __future__ import annotations

import argparse
import tempfile
from time import perf_counter

import torch
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import taylorfx as tfx
from taylorfx import layers as L


def process(rank: int, options: argparse.Namespace, folder: str) -> None:
    """One of the processes; the first one prints."""
    torch.set_num_threads(1)
    size, width = options.processes, options.width
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=size)
    parts = [part for _ in range(options.layers) for part in (L.Linear(width, width), L.GELU())]
    spec = tfx.serial(tfx.Input((width,)), *parts, L.Linear(width, 16))
    params = tfx.init(spec, torch.Generator().manual_seed(0))
    coupling, mesh = tfx.couple(params, spec), init_device_mesh("cpu", (size,))
    shards = tfx.tree.map_paths(lambda _, x: distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None), params)
    weights = [x for x in tfx.tree.flatten(shards).values() if x.ndim > 1]
    received = sum(x.nbytes for x in weights) * (size - 1) / size
    generator = torch.Generator().manual_seed(rank)
    batch = torch.randn(options.examples, width, generator=generator), torch.arange(options.examples) % 16

    def seconds(call: object) -> float:
        torch.distributed.barrier()
        start = perf_counter()
        call()  # type: ignore[operator]
        return perf_counter() - start

    rounds = []
    for _ in range(options.rounds):
        rounds.append((
            seconds(lambda: [x.full_tensor() for x in weights]),
            seconds(lambda: tfx.measure(params, spec, [batch] * 4, coupling, total=tfx.distributed.total)),
            seconds(lambda: tfx.measure(shards, spec, [batch] * 4, coupling, total=tfx.distributed.total)),
        ))  # fmt: skip
    gather, whole, shared = torch.tensor(rounds).median(0).values.tolist()
    if rank == 0:
        print(f"{size} processes, {received / 1e6:.1f} MB received per gather of all weights")
        print(f"bandwidth of gathers          {received / gather / 1e9:.2f} GB/s")
        print(f"measure, shards / whole       {shared / whole:.2f}")
        print(f"share of gathers, of shards   {8 * gather / shared:.0%} (4 batches, forward and backward)")
        print(f"as many bytes at {options.link:g} GB/s     {received / options.link / 1e6:.3f} ms per gather of all")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"processes": 2, "width": 512, "layers": 8, "examples": 256, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--link", type=float, default=450.0, help="GB/s in one direction")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (options, folder), nprocs=options.processes)


if __name__ == "__main__":
    main()
