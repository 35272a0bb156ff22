"""What tells networks apart, as short texts that are the same in every process."""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor

from taylorfx.coupling.units import Coupling
from taylorfx.distributed import sharing, whole
from taylorfx.network.spec import Spec
from taylorfx.tree import Params, flatten

__all__ = ["fingerprint", "of_layers", "of_params", "plain"]


def fingerprint(params: Params, coupling: Coupling) -> str:
    """What tells networks apart: dtypes, and digests of parameters, units and layers."""
    units = hashlib.sha256(repr(coupling.names).encode())
    for place in coupling.reads:
        units.update(f"{place.key} {place.units.shape} ".encode() + place.units.tobytes())
    return f"{of_params(params)}, units {units.hexdigest()[:12]}, {of_layers(coupling.spec)}"


def of_params(params: Params) -> str:
    """The dtypes of parameters, and a digest of them.

    Of a parameter the shape and some 4,000 of its numbers count, evenly spread, so that this costs next to nothing.
    """
    values = hashlib.sha256()
    with sharing(params) as own:
        leaves = flatten(own)
        for path, leaf in leaves.items():
            _add(values, path, whole(leaf))
    dtypes = "/".join(sorted({str(leaf.dtype).removeprefix("torch.") for leaf in leaves.values()}))
    return f"{dtypes}, parameters {values.hexdigest()[:12]}"


def _add(values: hashlib._Hash, path: str, leaf: Tensor) -> None:
    flat = leaf.detach().resolve_conj().resolve_neg().flatten()
    some = flat[:: max(1, -(-len(flat) // 2**12))].contiguous()
    values.update(f"{path} {leaf.dtype} {tuple(leaf.shape)} ".encode())
    values.update(some.view(torch.uint8).cpu().numpy().tobytes())


def plain(value: object) -> str:
    """``repr``, without what differs from process to process: where functions lie in memory.

    >>> plain([len, lambda x: x])
    '[<built-in function len>, <function <lambda>>]'
    """
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def of_layers(spec: Spec) -> str:
    """A digest of the layers, and of how they are connected."""
    return f"layers {hashlib.sha256(plain((spec.nodes, spec.outputs, spec.keys)).encode()).hexdigest()[:12]}"
