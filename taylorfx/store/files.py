"""Parameters as safetensors, with the spec in the file's header.

A safetensors file is the length of its header (eight bytes, little-endian), the header (JSON: type, shape and place of
every tensor), and the tensors' bytes: https://github.com/huggingface/safetensors#format. So it can be written as it is
read, a few rows at a time.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from taylorfx.cutting.cut import Scratch, take
from taylorfx.cutting.plan import Indices, Plan, PlanError
from taylorfx.layers import Shape
from taylorfx.layers.tensor import operator_of
from taylorfx.network.parameters import check
from taylorfx.network.spec import Spec, SpecError
from taylorfx.store.schema import FileError, from_json, to_json
from taylorfx.tree import Params, flatten, unflatten

__all__ = ["cut_file", "load", "save"]

_KEY = "taylorfx.spec"
_RESERVED = "__metadata__"
"""What safetensors names its own entry of a header."""
_HEADER = 100_000_000
"""The bytes of the largest header that safetensors reads."""
_ROWS = 2**23
"""Bytes that are read at once where a file is cut."""


class _Stored(NamedTuple):
    """A tensor as it will be in a file: its type in safetensors' words, and its values, some rows at a time."""

    dtype: str
    itemsize: int
    shape: Shape
    rows: Callable[[], Iterator[Tensor]]


def save(path: str | PathLike[str], params: Params, spec: Spec) -> None:
    """Write a network to one safetensors file, from which `load` reads the same values.

    Every leaf is written by its own values: tied leaves, views, expansions, conjugates. The file appears when it is
    complete, in the place of an older one if there is one; a link stays a link to it.

    Raises:
        SpecError: if the parameters do not fit the spec, or cannot be stored; every one is listed.
        FileError: if the spec is none that `load` takes (too large, names that are too long).
        OSError: if the file cannot be written; an older one is then as it was.
    """
    check(params, spec)
    leaves = flatten(params)
    errors = [f"{name}: {problem}" for name, leaf in leaves.items() if (problem := _unstorable(name, leaf))]
    if errors:
        raise SpecError("Dense tensors with values are saved, by name; received:\n  " + "\n  ".join(errors))
    text = to_json(spec)
    if to_json(from_json(text, operators=_operators(spec))) != text:
        raise SpecError("A saved network is read back as it was; this one has fields that JSON does not keep.")
    _write(path, {name: _stored(leaf) for name, leaf in leaves.items()}, {_KEY: text})


def load(
    path: str | PathLike[str], *, device: torch.device | str = "cpu", operators: tuple[str, ...] | list[str] = ()
) -> tuple[Params, Spec]:
    """Read a network that `save` wrote. Nothing that the file names is run, and what it may name is a closed list.

    Args:
        device: where the tensors go.
        operators: operators of other libraries that the network may have, ``"torchvision::roi_align"``, beside those
            that the program has a `rule` for.

    Raises:
        FileError: if the file is no network's: everything that is wrong, with its place in the document.
    """
    with _opened(path, str(device)) as (file, metadata):
        leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, the file is no mapping
    if _KEY not in metadata:
        raise FileError(f"A network's file has its spec in the header; {path} has none. Was it written by tfx.save?")
    try:
        spec = from_json(metadata[_KEY], operators=operators)
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    leaves, errors = _by_path(leaves, _other_names(spec, metadata))
    errors += [f"{name}: no layer has such a parameter" for name in sorted(leaves.keys() - spec.shapes.keys())]
    params = unflatten((name, leaves[name]) for name in spec.shapes if name in leaves)
    try:
        check(params, spec)
    except SpecError as error:
        errors += str(error).splitlines()[1:]
    if errors:
        raise FileError(f"{path}: the tensors are not its network's:\n  " + "\n  ".join(map(str.strip, errors)))
    return params, spec


def _by_path(leaves: Mapping[str, Tensor], others: Mapping[str, str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by their paths in the network; a tensor with two names may stand under both."""
    found = {name: leaf for name, leaf in leaves.items() if name not in others}
    errors: list[str] = []
    for name, leaf in leaves.items():
        path = others.get(name, name)
        if not _same(found.setdefault(path, leaf), leaf):
            errors.append(f"{name}: another name of {path}, with other values")
    return found, errors


def _same(one: Tensor, other: Tensor) -> bool:
    """Two tensors are one, bit for bit."""
    if one is other or (one.dtype, one.shape) != (other.dtype, other.shape):
        return one is other
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def cut_file(source: str | PathLike[str], target: str | PathLike[str], plan: Plan) -> None:
    """Cut a checkpoint that may be larger than memory: what `save` would write of what `cut` leaves of it.

    A few rows of one tensor are in memory at a time (8 MB, or one row where that is more). The target appears when it
    is complete; it may be the source.

    Args:
        source: a safetensors file of the plan's parameters by their paths, or of some of them (one of several shards,
            momentum). It need not be one of ours; if it names its network, that has to be the plan's. A tied tensor
            may stand under any of its names, or under all of them: those that nodes would have for it by their own
            names, and those that ``safetensors.torch.save_model`` notes in the header.
        target: the file to write. It has the source's metadata and names, and ``plan.spec`` for `load`.

    Raises:
        PlanError: if the file is of another network, listing every tensor that is not the plan's.
        FileError: if it is no safetensors file, or its spec no network's.
        OSError: if the target cannot be written; an older one is then as it was.
    """
    spec = plan.coupling.spec
    with _opened(source) as (file, metadata):
        if _KEY in metadata and from_json(metadata[_KEY], operators=_operators(spec)) != spec:
            raise PlanError(f"A plan cuts files of its own network; {source} holds another one.")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, the file is no mapping
        others = _other_names(spec, metadata)
        paths = {name: others.get(name, name) for name in slices}
        errors: list[str] = []
        for name, path in paths.items():
            shape = tuple(slices[name].get_shape())
            if path not in spec.shapes:
                errors.append(f"{name}: the network has no such parameter")
            elif shape != spec.shapes[path]:
                errors.append(f"{name}: expected {spec.shapes[path]}, received {shape}")
        if errors:
            raise PlanError("A plan cuts files of its own network's parameters; received:\n  " + "\n  ".join(errors))
        kept = {name: _cut(part, plan.indices[paths[name]]) for name, part in slices.items()}
        _write(target, kept, {**metadata, _KEY: to_json(plan.spec)})


def _operators(spec: Spec) -> list[str]:
    """The operators that a network names, as ``"namespace::name"``."""
    names = [name for node in spec.nodes if (name := operator_of(node.layer)) is not None]
    return ["::".join(name.split(".")[:2]) for name in names]


def _other_names(spec: Spec, metadata: Mapping[str, str]) -> dict[str, str]:
    """Names that tied parameters have in checkpoints, and their paths in the network.

    A node whose parameter lies elsewhere would have it below its own name. ``safetensors.torch.save_model`` keeps one
    of several names, and notes in the header ``{one that it left out: the one that it kept}``.
    """
    names: dict[str, str] = {}
    for node in spec.nodes:
        for leaf, path in node.paths.items():
            names[node.name if node.layer.leaf else f"{node.name}.{leaf}"] = path
    for second, first in spec.interface.ties if spec.interface else ():  # one tensor, or one submodule
        names |= {f"{second}{x[len(first) :]}": x for x in spec.shapes if x == first or x.startswith(f"{first}.")}
    for left_out, name in metadata.items():
        path = names.get(left_out, left_out)
        if path in spec.shapes:
            names.setdefault(name, path)
    return {name: path for name, path in names.items() if name not in spec.shapes}


# What stands in a file.


@contextmanager
def _opened(path: str | PathLike[str], device: str = "cpu") -> Iterator[tuple[Any, dict[str, str]]]:
    """A safetensors file to read, and its metadata; what it says wrongly is a `FileError`."""
    try:
        with safetensors.safe_open(path, "pt", device=device) as file:
            yield file, dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise FileError(f"{path} is no safetensors file that can be read: {error}") from error


def _unstorable(name: str, leaf: Tensor) -> str:
    """Why a tensor cannot be saved, in words; nothing where it can."""
    if name == _RESERVED:
        return "safetensors keeps this name for itself; give the node another one"
    if leaf.layout is not torch.strided or leaf.is_quantized or leaf.is_meta:
        return "on the meta device, without values" if leaf.is_meta else f"not dense ({leaf.layout})"
    return "" if _type_name(leaf.dtype) else f"safetensors has no type for {leaf.dtype}"


@lru_cache(maxsize=64)
def _type_name(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype; nothing where it does not hold it as torch does."""
    try:
        data = safetensors.torch.save({"x": torch.empty(1, dtype=dtype)})
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        return ""
    entry = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["x"]
    plain = entry["shape"] == [1] and entry["data_offsets"] == [0, dtype.itemsize]
    return str(entry["dtype"]) if plain else ""


def _stored(leaf: Tensor) -> _Stored:
    def rows() -> Iterator[Tensor]:
        yield leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()

    return _Stored(_type_name(leaf.dtype), leaf.itemsize, tuple(leaf.shape), rows)


def _cut(part: Any, indices: Indices) -> _Stored:
    """What stays of one tensor in a file."""
    shape = part.get_shape()
    itemsize = (part[:0] if shape else part[...]).itemsize
    kept = tuple(n if index is None else len(index) for n, index in zip(shape, indices, strict=True))
    return _Stored(part.get_dtype(), itemsize, kept, lambda: _rows(part, itemsize, indices))


def _rows(part: Any, itemsize: int, indices: Indices) -> Iterator[Tensor]:
    """What stays of one tensor in a file, some rows at a time."""
    shape = part.get_shape()
    if not shape:
        yield part[...]
        return
    outer, scratch = torch.arange(shape[0]) if indices[0] is None else indices[0], Scratch()
    step = max(1, _ROWS // max(1, itemsize * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        low, high = torch.searchsorted(outer, torch.tensor([start, start + step])).tolist()
        if low < high:
            rows = part[start : start + step]
            local = outer[low:high] - start
            yield take(rows, (None if high - low == len(rows) else local, *indices[1:]), scratch)


def _write(path: str | PathLike[str], tensors: Mapping[str, _Stored], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: the largest elements first, so that every tensor is at a multiple of its own."""
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {_RESERVED: metadata}
    end = 0
    for name in names:
        dtype, itemsize, shape, _ = tensors[name]
        start, end = end, end + itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER:
        raise FileError(f"safetensors reads headers of at most {_HEADER:,} bytes; this network's has {len(text):,}.")
    with _replacing(path) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for rows in tensors[name].rows():
                out.write(rows.reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def _replacing(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """A new file, which takes the place of the one at the path when it is complete.

    Until then it has a name that no other file has. It gets the mode of the file that it replaces, or that of any new
    file; where the path is a link, the file that it leads to is replaced.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    with partial.open("xb") as out:
        try:
            yield out
            out.flush()
            os.fsync(out.fileno())  # a full disk is told here, not after the old file is gone
            if target.exists():
                shutil.copymode(target, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
