"""Parameters of which every process has a shard: gathered one after the other, where and when they are used.

Parameters may be ``DTensor``s, as ``torch.distributed.fsdp.fully_shard`` and ``distribute_tensor`` leave them. Each
process measures batches of its own, so that one may have more of them than another, or fail. So whoever needs a
parameter asks for it, and whoever has nothing to do any more still takes part, until all have finished::

    process 0       process 1                  process 2
    asks for up     asks for up                asks for up       all gather up
    asks for down   asks for down              has finished      all gather down
    asks for up     fails, has finished        has finished      all gather up, for process 0
    has finished    has finished               has finished      all go on, with an error that names process 1

What a layer has gathered is freed when the layer has computed. Its memory is filled again right before its derivative
is computed, as `fully_shard` does it (Zhao et al. 2023, arXiv 2304.11277, section 4.3): whole is about one parameter at
a time.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from taylorfx.distributed.meeting import Same, total
from taylorfx.internals import below, without_transforms
from taylorfx.tree import Params, flatten, map_paths, unflatten

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

__all__ = [
    "Deferred", "alike", "computed", "gathered", "indexed", "is_shared", "refuse_alone", "refuse_shards", "sharded",
    "sharing", "whole",
]  # fmt: skip


def is_shared(leaf: object) -> TypeGuard[DTensor]:
    """Whether a leaf is gathered before it is used: a ``DTensor``, or what stands for one."""
    if type(leaf) in (Tensor, torch.nn.Parameter):
        return False
    if isinstance(leaf, Deferred):
        return True
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(leaf, module.DTensor)


class Deferred(Tensor):
    """Stands for a parameter that is gathered when it is used: its shape, dtype and device, without any numbers."""

    numbered: int
    pool: _Pool

    @staticmethod
    def of(leaf: DTensor, number: int, pool: _Pool) -> Deferred:
        """The parameter that has this number in a pool."""
        deferred = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta").as_subclass(Deferred)
        deferred.numbered, deferred.pool = number, pool
        return deferred

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the parameter will be."""
        device: torch.device = self.pool.leaves[self.numbered].device
        return device

    def detach(self) -> Deferred:
        """Itself: nothing follows it."""
        return self

    def whole(self) -> Tensor:
        """The parameter, gathered from all processes."""
        return self.pool.ask(self.numbered)


def whole(leaf: Any) -> Tensor:
    """A parameter as a plain tensor, gathered from all processes if each has a shard; then all of them call this."""
    if isinstance(leaf, Deferred):
        return leaf.whole()
    tensor: Tensor = leaf.full_tensor() if is_shared(leaf) else leaf
    return tensor


def computed(leaves: Mapping[str, Tensor], compute: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
    """What a layer computes of its parameters, which are whole while it does, and while its derivative is computed.

    Args:
        leaves: the layer's parameters, some of which may be shared.
    """
    new = {name: whole(leaf) for name, leaf in leaves.items() if isinstance(leaf, Deferred)}
    value = compute({name: new[name] if name in new else whole(leaf) for name, leaf in leaves.items()})
    freed = [(leaves[name], x) for name, x in new.items() if not _same_memory(x, below(value))]
    if not freed:
        return value

    def refill(_: object) -> None:
        first, _ = freed[0]
        assert isinstance(first, Deferred)
        first.pool.refill([(leaf, x) for leaf, x in freed if isinstance(leaf, Deferred)])

    node = value.grad_fn
    if node is not None:  # the last step of the layer, and so the first one of its derivative
        node.register_prehook(refill)
    for _, x in freed:
        x.untyped_storage().resize_(0)
    return value


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


class _Pool:
    """The shared parameters of a network, and the processes that gather them for each other.

    Attributes:
        leaves: the parameters, which all processes number alike.
        full: those that are whole again for a derivative, of which the last one is freed when the next one comes: the
            engine computes the derivatives of what was computed last first, and of one layer after the other.
    """

    def __init__(self, leaves: Sequence[Any], group: ProcessGroup | None) -> None:
        self.leaves, self.group = leaves, group
        self.full: list[Tensor] = []
        self.broken = False

    def ask(self, number: int) -> Tensor:
        """One of the parameters, as a tensor with memory of its own."""
        with torch.no_grad(), without_transforms():
            tensor = self._round(number)[number]
            assert tensor is not None, "what is asked for is kept"
            return tensor.clone() if _same_memory(tensor, self.leaves[number].to_local()) else tensor

    def refill(self, parameters: Sequence[tuple[Deferred, Tensor]]) -> None:
        """Gather parameters again, into the memory that they had; the ones before are freed."""
        for x in self.full:
            x.untyped_storage().resize_(0)
        self.full = []
        for leaf, x in parameters:
            again = leaf.whole()
            x.untyped_storage().resize_(again.untyped_storage().nbytes())
            x.data.copy_(again)  # to autograd, it is the tensor that it was
            again.untyped_storage().resize_(0)  # which a thread of the gathering may hold for a moment
            self.full.append(x)

    def serve(self) -> None:
        """Take part until no process asks any more."""
        with torch.no_grad():
            while not self.broken and self._round(None):
                pass

    def _round(self, number: int | None) -> dict[int, Tensor | None]:
        """Every process says what it asks for, and all of that is gathered by all of them; here is kept the own."""
        self.broken = True  # unless all of this succeeds
        mine = torch.tensor([-1 if number is None else number], device=self.leaves[0].device)
        said = mine.new_empty(torch.distributed.get_world_size(self.group))
        torch.distributed.all_gather_single(said, mine, group=self.group)
        asked: dict[int, Tensor | None] = dict.fromkeys(sorted({*said.tolist()} - {-1}))
        for one in asked:
            tensor = self.leaves[one].full_tensor()
            asked[one] = tensor if one == number else None
        self.broken = False
        return asked


@contextmanager
def sharing(params: Params, *, small: Container[str] = ()) -> Iterator[Params]:
    """The parameters, of which the shared ones are gathered when they are used; without such, those that are given.

    Every process has to come here, and none leaves before all have finished with the block. What has failed elsewhere
    is named here.

    Args:
        small: the paths of parameters that are gathered at the beginning and stay whole, as all vectors are.

    Raises:
        ValueError: as `alike`.
    """
    shared = _shared(params)
    if not shared:
        yield params
        return
    group = alike(params, "in use")
    pool = _Pool([leaf.detach() for leaf in shared.values()], group)
    numbers = {path: k for k, path in enumerate(shared)}

    def deferred(path: str, leaf: Any) -> Tensor:
        if path not in numbers:
            return leaf  # type: ignore[no-any-return]
        if leaf.ndim < 2 or path in small:
            return pool.ask(numbers[path])
        return Deferred.of(leaf, numbers[path], pool)

    try:
        yield map_paths(deferred, params)
    finally:
        pool.serve()


def alike(params: Params, what: str) -> ProcessGroup | None:
    """Wait until all processes that share parameters come to use them alike; nothing if none are shared.

    Args:
        what: text that has to be the same in all of them.

    Returns:
        Their group; ``None`` for all processes.

    Raises:
        ValueError: for parameters on several meshes, or placed so that they are no shards, all of which are listed; if
            other processes have other parameters or another text; and for what has failed there (`total`).
    """
    shared = _shared(params)
    if not shared:
        return None
    group = _group(shared)
    kinds = hashlib.sha256(repr([(path, leaf.shape, leaf.placements) for path, leaf in shared.items()]).encode())
    total(Same(f"{len(shared)} shared parameters {kinds.hexdigest()[:12]}, {what}"), group)
    return group


def _shared(params: Params) -> dict[str, DTensor]:
    """The parameters that are shards, by their paths."""
    return {path: x for path, x in flatten(params).items() if is_shared(x) and not isinstance(x, Deferred)}


def refuse_alone(params: Params) -> None:
    """Refuse parameters that other processes have shards of, where nothing adds up what they measure."""
    if shared := _shared(params):
        raise ValueError(
            f"Parameters of which every process has a shard are measured by all of them together; received "
            f"{_some(shared)} without total=. Give total=taylorfx.distributed.total to measure, prune or the repair, "
            "in every process."
        )


def refuse_shards(params: Params) -> None:
    """Refuse parameters that other processes have shards of, where a network is written or deployed."""
    if shared := _shared(params):
        raise ValueError(
            f"Files and deployed networks hold parameters that are whole; received {_some(shared)} of which every "
            "process has a shard. Call taylorfx.distributed.gathered(params) in every process, and go on in the first."
        )


def _some(shared: Mapping[str, DTensor]) -> str:
    """How many there are, and the first of them."""
    return f"{len(shared)} of them ({', '.join([*shared][:3])}{', ...' * (len(shared) > 3)})"


def _group(shared: Mapping[str, DTensor]) -> ProcessGroup | None:
    """The processes that have the shards.

    Raises:
        ValueError: as `alike`.
    """
    from torch.distributed.tensor import Replicate, Shard

    meshes = dict.fromkeys(leaf.device_mesh for leaf in shared.values())
    lines = []
    if len(meshes) > 1:
        lines += [
            f"{path}: on {leaf.device_mesh}" for path, leaf in shared.items() if leaf.device_mesh != next(iter(meshes))
        ]
        lines.insert(0, f"{next(iter(shared))}: on {next(iter(meshes))}")
    for path, leaf in shared.items():
        if any(type(placement) not in (Shard, Replicate) for placement in leaf.placements):
            lines.append(f"{path}: placed as {leaf.placements}")
    if lines:
        raise ValueError(
            "Shared parameters lie on one mesh, each as Shard or Replicate; received\n  "
            + "\n  ".join(lines)
            + "\nRedistribute these: leaf.redistribute(mesh, placements)."
        )
    mesh = next(iter(meshes))
    if mesh.size() == torch.distributed.get_world_size():
        return None
    if mesh.ndim > 1:
        raise ValueError(
            f"A mesh of several dimensions has all processes, {torch.distributed.get_world_size()}; received {mesh}. "
            "Flatten it, or give a mesh of all processes."
        )
    return mesh.get_group()


def indexed(leaf: DTensor, indices: Sequence[Tensor | None], take: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """A shared parameter of which only some indices of every axis stay, placed as it was. All processes call this.

    An axis that is not sharded is cut in every shard. One that is, is cut after that, of the whole, since how many
    rows a process has afterwards follows from how many there are in all::

        2 processes, rows 0 1 2 | 3 4 5, of which 0 and 1 leave        all rows, then 2 3 | 4 5

    Args:
        indices: for every axis what stays, in order; ``None`` for all.
        take: takes indices of a plain tensor.
    """
    from torch.distributed.tensor import DTensor, Shard

    mesh, placements = leaf.device_mesh, leaf.placements
    split = {placement.dim % leaf.ndim for placement in placements if isinstance(placement, Shard)}
    inner = [None if axis in split else index for axis, index in enumerate(indices)]
    outer = [index if axis in split else None for axis, index in enumerate(indices)]
    if all(index is None for index in indices):
        return leaf
    with torch.no_grad():
        part = take(leaf.to_local(), inner)
        shape = [n if index is None else len(index) for n, index in zip(leaf.shape, inner, strict=True)]
        stride = torch.empty(shape, device="meta").stride()
        result = DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
        if all(index is None for index in outer):
            return result
        return placed(take(result.full_tensor(), outer), leaf)


def placed(tensor: Tensor, like: Any) -> Tensor:
    """A tensor that all processes have, of which each keeps the shard that it has of another one, if it has one."""
    if not is_shared(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh, everywhere = like.device_mesh, [Replicate()] * like.device_mesh.ndim
    with torch.no_grad():
        return DTensor.from_local(tensor, mesh, everywhere, run_check=False).redistribute(mesh, like.placements)


def gathered(params: Params, *, device: torch.device | str = "cpu") -> Params:
    """The tree in the first process, each of its tensors whole; an empty one in all others.

    To save, export or use what was pruned. One tensor after the other is gathered and copied to ``device``, so that
    only one at a time is whole where the shards are. Every process has to call it. ::

        small = tfx.distributed.gathered(small_params)
        if torch.distributed.get_rank() == 0:
            tfx.save("small.safetensors", small, small_spec)
    """
    leaves, first = flatten(params), not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    tree: dict[str, Tensor] = {}
    for path, leaf in leaves.items():
        tensor = whole(leaf.detach())
        if first:
            tree[path] = tensor.to(device)
    return unflatten(tree)


def sharded(params: Params, tensors: Mapping[str, Tensor]) -> Params:
    """The parameters with the tensors that a module has by their names now: shards, after it was captured whole.

    A module that is too large for one device is captured on the ``meta`` device, without numbers. `fully_shard`, or
    tensor parallelism, then makes shards of its parameters, and they are loaded as ever::

        params, spec = tfx.from_torch(model, example)              # on meta
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
        ...                                                         # to a device, and load the shards
        params = tfx.distributed.sharded(params, {**dict(model.named_buffers()), **model.state_dict()})

    Args:
        params: as captured.
        tensors: by the names of the module; those that the network does not have are left out. A parameter that has no
            name here stays as it is.

    Raises:
        ValueError: listing the parameters of another shape than was captured, and those without numbers, on ``meta``.
    """
    new = map_paths(lambda path, leaf: tensors[path].detach() if path in tensors else leaf, params)
    old, lines = flatten(params), []
    for path, leaf in flatten(new).items():
        if leaf.shape != old[path].shape:
            lines.append(f"{path}: captured as {tuple(old[path].shape)}, received {tuple(leaf.shape)}")
        elif leaf.is_meta:
            lines.append(f"{path}: has no numbers, as it is on meta")
    if lines:
        raise ValueError(
            "Parameters come by their names, in the shapes that were captured; received\n  " + "\n  ".join(lines)
        )
    return new
