"""Networks on disk: a spec as JSON, parameters as safetensors with the spec in the file's header.

A safetensors file is the length of its header (eight bytes, little-endian), the header (JSON: type, shape and place of
every tensor), and the tensors' bytes: https://github.com/huggingface/safetensors#format. So it can be written as it is
read, a few rows at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, fields
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from taylorfx.interface import Interface
from taylorfx.layers import LAYERS, Shape, kind
from taylorfx.plan import Indices, Plan, PlanError, Scratch, fits, take
from taylorfx.spec import Node, Spec, SpecError, check
from taylorfx.tree import Params, flatten, unflatten

__all__ = ["cut_file", "from_json", "load", "save", "to_json"]

_KEY = "taylorfx.spec"
_ROWS = 2**23
"""Bytes that are read at once where a file is cut."""


def to_json(spec: Spec) -> str:
    """A spec as JSON; `from_json` gives an equal one back."""
    nodes: list[dict[str, Any]] = []
    for node in spec.nodes:
        values = {field.name: getattr(node.layer, field.name) for field in fields(node.layer)}
        entry = {"name": node.name, "layer": kind(type(node.layer)), "fields": values, "inputs": node.inputs}
        nodes.append({**entry, "params": node.params} if node.params is not None else entry)
    own = {"interface": asdict(spec.interface)} if spec.interface else {}
    return json.dumps({"nodes": nodes, "outputs": spec.outputs, "keys": spec.keys, **own})


def from_json(text: str) -> Spec:
    """The spec that `to_json` wrote. Layers from outside the package have to be imported before.

    Raises:
        SpecError: listing every layer class that is not known.
    """
    data = json.loads(text)
    unknown = sorted({entry["layer"] for entry in data["nodes"]} - set(LAYERS))
    if unknown:
        raise SpecError(f"A spec is read with its layer classes at hand; not known: {', '.join(unknown)}. Import them.")
    nodes = [
        Node(e["name"], LAYERS[e["layer"]](**_tuples(e["fields"])), tuple(e["inputs"]), _tuples(e.get("params")))
        for e in data["nodes"]
    ]
    interface = Interface.from_data(data["interface"]) if "interface" in data else None
    return Spec(tuple(nodes), tuple(data["outputs"]), tuple(data.get("keys", ())), interface)


def _tuples(value: Any) -> Any:
    """JSON has lists where we have tuples."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def save(path: str | PathLike[str], params: Params, spec: Spec) -> None:
    """Write a network to one safetensors file.

    Raises:
        SpecError: if the parameters do not fit the spec.
    """
    check(params, spec)
    leaves = {name: leaf.detach().contiguous() for name, leaf in flatten(params).items()}
    safetensors.torch.save_file(leaves, path, {_KEY: to_json(spec)})


def load(path: str | PathLike[str], *, device: torch.device | str = "cpu") -> tuple[Params, Spec]:
    """Read a network that `save` wrote.

    Raises:
        SpecError: if the file holds no spec, or parameters that do not fit it.
    """
    with safetensors.safe_open(path, "pt", device=str(device)) as file:
        text = (file.metadata() or {}).get(_KEY)
        leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, the file is no mapping
    if text is None:
        raise SpecError(f"A network's file has its spec in the header; {path} has none. Was it written by tfx.save?")
    spec = from_json(text)
    order = [name for name in spec.shapes if name in leaves]
    params = unflatten((name, leaves[name]) for name in [*order, *sorted(leaves.keys() - set(order))])
    check(params, spec)
    return params, spec


def cut_file(source: str | PathLike[str], target: str | PathLike[str], plan: Plan) -> None:
    """Cut a checkpoint that may be larger than memory: what `save` would write of what `cut` leaves of it.

    A few rows of one tensor are in memory at a time (8 MB, or one row where that is more). The target appears when it
    is complete; it may be the source.

    Args:
        source: a safetensors file of the plan's parameters by their paths, or of some of them (one of several shards,
            momentum). It need not be one of ours; if it names its network, that has to be the plan's.
        target: the file to write. It has the source's metadata, and ``plan.spec`` for `load`.

    Raises:
        PlanError: if the file is of another network, listing every tensor that is not the plan's.
    """
    with safetensors.safe_open(source, "pt") as file:
        metadata = file.metadata() or {}
        if _KEY in metadata and from_json(metadata[_KEY]) != plan.coupling.spec:
            raise PlanError(f"A plan cuts files of its own network; {source} holds another one.")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, the file is no mapping
        found = {name: torch.empty(part.get_shape(), device="meta") for name, part in slices.items()}
        fits(unflatten(found), plan.coupling.spec.shapes, "A plan cuts files of")
        kept = {name: _kept(part.get_shape(), plan.indices[name]) for name, part in slices.items()}
        empty = {name: part[:0] if part.get_shape() else part[...] for name, part in slices.items()}
        sizes = {name: part.itemsize for name, part in empty.items()}
        names = sorted(slices, key=lambda name: (-sizes[name], name))  # every tensor at a multiple of its element
        header: dict[str, Any] = {"__metadata__": {**metadata, _KEY: to_json(plan.spec)}}
        end = 0
        for name in names:
            start, end = end, end + sizes[name] * math.prod(kept[name])
            header[name] = {"dtype": slices[name].get_dtype(), "shape": kept[name], "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        partial = Path(f"{fspath(target)}.partial")
        try:
            with partial.open("wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                for name in names:
                    for rows in _rows(slices[name], sizes[name], plan.indices[name]):
                        out.write(rows.reshape(-1).view(torch.uint8).numpy().data)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def _kept(shape: list[int], indices: Indices) -> Shape:
    return tuple(n if index is None else len(index) for n, index in zip(shape, indices, strict=True))


def _rows(found: Any, itemsize: int, indices: Indices) -> Iterator[torch.Tensor]:
    """What stays of one tensor in a file, some rows at a time."""
    shape = found.get_shape()
    if not shape:
        yield found[...]
        return
    outer, scratch = torch.arange(shape[0]) if indices[0] is None else indices[0], Scratch()
    step = max(1, _ROWS // max(1, itemsize * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        low, high = torch.searchsorted(outer, torch.tensor([start, start + step])).tolist()
        if low < high:
            rows = found[start : start + step]
            local = outer[low:high] - start
            yield take(rows, (None if high - low == len(rows) else local, *indices[1:]), scratch)
