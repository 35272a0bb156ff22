"""Several processes, each with examples of its own, prune one network as one: sums are added up, plans are the same.

Started by itself it is one process; torchrun starts as many as there are cores, machines or devices, and so does
accelerate:

    torchrun --standalone --nproc-per-node 2 examples/several_processes.py
    accelerate launch --multi_gpu --num_processes 2 examples/several_processes.py

The network of the quickstart learns scikit-learn's digits. Every process measures its share of the examples. The
statistics, and later what layers read and gave out, are added up, so that all decide and repair alike: that is what
``total=`` is for. With ``--sharded`` every process holds a part of each parameter only, as `fully_shard` leaves them;
the rest of the program is the same. The first one prints. In one word, the sentence is ``tfx.prune(params, spec, mine,
budget=..., repair=tfx.reconstruct, total=tfx.distributed.total)``.
"""

from __future__ import annotations

import time

import torch
from quickstart import digits, network
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from training import accuracy, arguments, learn, some

import taylorfx as tfx


def main() -> None:
    options = arguments(
        __doc__, {"epochs": 3, "width": 8},
        flops=(0.4, "share of the FLOPs that may remain"),
        epochs=(12, "epochs of training"),
        width=(16, "channels of the first stage"),
        sharded=(False, "give every process a part of each parameter"),
    )  # fmt: skip
    torch.set_num_threads(1)
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group("gloo")  # "nccl" where every process has a device
    together = torch.distributed.is_initialized()
    rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)

    generator = torch.Generator().manual_seed(options.seed)  # the same network and examples everywhere
    images, targets, *test = digits()
    spec = network(options.width)
    params = learn(spec, images, targets, epochs=options.epochs, generator=generator)
    coupling = tfx.couple(params, spec)
    batches = some(images, targets, 512, generator)
    mine = batches[rank * len(batches) // size : (rank + 1) * len(batches) // size]
    if options.sharded and together:
        mesh = init_device_mesh("cpu", (size,))
        params = tfx.tree.map_paths(lambda _, x: distribute_tensor(x, mesh, [Shard(0)]) if x.ndim else x, params)

    stats = tfx.measure(params, spec, mine, coupling, rows=True, total=tfx.distributed.total)
    plan = tfx.joint(stats, coupling, budget=tfx.Flops(options.flops), floor=2, cautious=True)
    small, smaller = tfx.reconstruct(params, plan, mine, total=tfx.distributed.total)
    params, small = tfx.distributed.gathered(params), tfx.distributed.gathered(small)  # whole, in the first process

    digests = [plan.digest] * size
    if together:
        torch.distributed.all_gather_object(digests, plan.digest)
    if rank == 0:
        print(
            f"{size} process{'es' * (size > 1)}, {stats.n} examples, {len(mine)} batches in the first; "
            f"{'one plan' if len({*digests}) == 1 else 'plans differ'}: {plan.digest}, {int(plan.keep.sum())} of "
            f"{len(coupling)} units; accuracy {accuracy(params, spec, *test):.4f} -> "
            f"{accuracy(small, smaller, *test):.4f} at {options.flops:.0%} of the FLOPs"
        )
    if together:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        # DTensor's caches keep gloo's threads alive; one that still holds a tensor when Python ends aborts the process.
        time.sleep(0.5)


if __name__ == "__main__":
    main()
