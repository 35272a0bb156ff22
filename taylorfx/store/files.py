"""Networks in safetensors files: the parameters as tensors, the spec in the header.

A safetensors file (https://github.com/huggingface/safetensors#format) consists of

    8 bytes         the length of the header, little-endian
    the header      JSON: type, shape and offsets of every tensor, and a table of strings that anyone may add to
    the tensors     their bytes, one tensor after the other, rows in order

A file can therefore be cut while it is read, a few rows at a time, and needs not fit into memory.
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
from typing import BinaryIO, NamedTuple, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from taylorfx.cutting.cut import Scratch, take
from taylorfx.cutting.plan import Indices, Plan, PlanError
from taylorfx.distributed import refuse_shards
from taylorfx.layers import Shape
from taylorfx.layers.tensor import operator_of
from taylorfx.network.parameters import check
from taylorfx.network.spec import Spec, SpecError
from taylorfx.store.document import FileError
from taylorfx.store.schema import from_json, to_json
from taylorfx.tree import Params, flatten, unflatten

__all__ = ["cut_file", "load", "save"]

_KEY = "taylorfx.spec"
"""The spec's entry in the table of strings."""
_RESERVED = "__metadata__"
"""The name that the table of strings has in the header; no tensor may have it."""
_HEADER = 100_000_000
"""The bytes of the largest header that safetensors reads."""
_ROWS = 2**23
"""The bytes that are read at once when a file is cut."""


class _Slice(Protocol):
    """A tensor in an open file, as safetensors gives it; indexing reads rows."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: object) -> Tensor: ...


class _File(Protocol):
    """An open file, as safetensors gives it."""

    def keys(self) -> list[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...
    def get_slice(self, name: str) -> _Slice: ...


class _Stored(NamedTuple):
    """A tensor that will be written: its dtype by safetensors' name, and its values, a few rows at a time."""

    dtype: str
    itemsize: int
    shape: Shape
    rows: Callable[[], Iterator[Tensor]]


def save(path: str | PathLike[str], params: Params, spec: Spec) -> None:
    """Write a network to one safetensors file, from which `load` reads equal values.

    Every leaf is written in full, also where several leaves share memory: views, expansions, conjugates. The file
    appears at ``path`` when it is complete. It then replaces an older one; a link stays a link to the new file.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from taylorfx import init, layers as L, serial
    >>> spec = serial(L.Input((3,)), fc=L.Linear(3, 2))
    >>> params = init(spec, torch.Generator().manual_seed(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Path(folder, "net.safetensors"), params, spec)
    ...     again, same = load(Path(folder, "net.safetensors"))
    >>> same == spec, torch.equal(again["fc"]["weight"], params["fc"]["weight"])
    (True, True)

    Raises:
        SpecError: if parameters do not fit the spec or cannot be stored; lists all of them.
        FileError: if `load` would refuse the spec, because it is too large or its names are too long.
        ValueError: for parameters of which every process has a shard.
        OSError: if the file cannot be written; an older one is then unchanged.
    """
    check(params, spec)
    refuse_shards(params)
    leaves = flatten(params)
    errors = [f"{name}: {problem}" for name, leaf in leaves.items() if (problem := _unstorable(name, leaf))]
    if errors:
        raise SpecError("A file holds dense tensors with values, each by its name; received:\n  " + "\n  ".join(errors))
    text = to_json(spec)
    if to_json(from_json(text, operators=_operators(spec))) != text:
        raise SpecError("A network is read back as it was saved; JSON does not keep some of this one's fields.")
    write(path, {name: stored(leaf) for name, leaf in leaves.items()}, {_KEY: text})


def load(
    path: str | PathLike[str], *, device: torch.device | str = "cpu", operators: tuple[str, ...] | list[str] = ()
) -> tuple[Params, Spec]:
    """Read the parameters and the spec that `save` wrote (an example is there).

    A file from elsewhere is safe to read: it can name layers and operators from a closed list, but no code.

    Args:
        device: where the tensors are put.
        operators: further operators that the network may use, such as ``"torchvision::roi_align"``. Those of torch,
            and those that the program has a rule for (`taylorfx.interop.rule`), need no mention.

    Raises:
        FileError: if the file does not hold a network; the message lists every error with its place in the document.
    """
    with opened(path, str(device)) as (file, metadata):
        leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, the file is no mapping
    if _KEY not in metadata:
        raise FileError(f"A network's file has its spec in the header; {path} has none. Only tfx.save writes it.")
    try:
        spec = from_json(metadata[_KEY], operators=operators)
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    leaves, errors = _by_path(leaves, _other_names(spec, metadata))
    errors += [f"{name}: the network has no such parameter" for name in sorted(leaves.keys() - spec.shapes.keys())]
    params = unflatten((name, leaves[name]) for name in spec.shapes if name in leaves)
    try:
        check(params, spec)
    except SpecError as error:
        errors += str(error).splitlines()[1:]
    if errors:
        raise FileError(f"{path}: the tensors are not those of its network:\n  " + "\n  ".join(map(str.strip, errors)))
    return params, spec


def _by_path(leaves: Mapping[str, Tensor], others: Mapping[str, str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by their paths in the network, and errors. A tied tensor may be there by several of its names.

    Args:
        others: other names of tied tensors, and their paths (`_other_names`).
    """
    tensors = {name: leaf for name, leaf in leaves.items() if name not in others}
    errors: list[str] = []
    for name, leaf in leaves.items():
        path = others.get(name, name)
        if not _same(tensors.setdefault(path, leaf), leaf):
            errors.append(f"{name}: another name of {path}, but with other values")
    return tensors, errors


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit."""
    if one is other or (one.dtype, one.shape) != (other.dtype, other.shape):
        return one is other
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def cut_file(source: str | PathLike[str], target: str | PathLike[str], plan: Plan) -> None:
    """Cut a checkpoint that may be larger than memory. The target is the file that `save` would write after `cut`.

    At any time at most 8 MB of one tensor, or one row of it, are in memory. The target appears when it is complete; it
    may be the source.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from taylorfx import Units, couple, init, layers as L, select, serial
    >>> spec = serial(L.Input((3,)), a=L.Linear(3, 8), relu=L.ReLU(), b=L.Linear(8, 2))
    >>> params = init(spec, torch.Generator().manual_seed(0))
    >>> coupling = couple(params, spec)
    >>> plan = select(torch.arange(8.0), coupling, budget=Units(5))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     whole, small = Path(folder, "whole.safetensors"), Path(folder, "small.safetensors")
    ...     save(whole, params, spec)
    ...     cut_file(whole, small, plan)
    ...     {name: tuple(leaf.shape) for name, leaf in flatten(load(small)[0]).items()}
    {'a.weight': (5, 3), 'a.bias': (5,), 'b.weight': (2, 5), 'b.bias': (2,)}

    Args:
        source: a safetensors file with the plan's parameters by their paths, or with some of them: one of several
            shards, or momentum. Any program may have written it; if it holds a spec, that has to be the plan's. A
            tied tensor may have any of its names, or be there by several: the names that it has at each of its nodes,
            and those that ``safetensors.torch.save_model`` notes in the header.
        target: the file to write, with the source's names and metadata, and ``plan.spec`` for `load`.

    Raises:
        PlanError: if the file belongs to another network; lists every tensor that does not fit the plan.
        FileError: if the source is no safetensors file, or its spec describes no network.
        OSError: if the target cannot be written; an older one is then unchanged.
    """
    spec = plan.coupling.spec
    with opened(source) as (file, metadata):
        if _KEY in metadata and from_json(metadata[_KEY], operators=_operators(spec)) != spec:
            raise PlanError(f"A plan cuts files of its own network; {source} holds another network.")
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
            raise PlanError("A plan cuts files with parameters of its own network; received:\n  " + "\n  ".join(errors))
        staying = {name: part for name, part in slices.items() if paths[name] not in plan.gone}
        kept = {name: _cut(part, plan.indices[paths[name]]) for name, part in staying.items()}
        write(target, kept, {**metadata, _KEY: to_json(plan.spec)})


def _operators(spec: Spec) -> list[str]:
    """The operators that a network uses, as ``"namespace::name"``."""
    names = [name for node in spec.nodes if (name := operator_of(node.layer)) is not None]
    return ["::".join(name.split(".")[:2]) for name in names]


def _other_names(spec: Spec, metadata: Mapping[str, str]) -> dict[str, str]:
    """Names that checkpoints may have for tied parameters, each with the parameter's path in the network.

    A parameter that several nodes share has one path, but in a ``state_dict`` it also appears below the names of the
    other nodes. ``safetensors.torch.save_model`` keeps one of the names and notes the others in the header, as
    ``{name that was left out: name that was kept}``.
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


# Reading and writing.


@contextmanager
def opened(path: str | PathLike[str], device: str = "cpu") -> Iterator[tuple[_File, dict[str, str]]]:
    """Open a safetensors file; errors in reading it become `FileError`."""
    try:
        with safetensors.safe_open(path, "pt", device=device) as file:
            yield file, dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise FileError(f"{path} cannot be read as a safetensors file: {error}") from error


def _unstorable(name: str, leaf: Tensor) -> str:
    """Why a tensor cannot be saved; empty if it can."""
    if name == _RESERVED:
        return "safetensors reserves this name; rename the node"
    if leaf.layout is not torch.strided or leaf.is_quantized or leaf.is_meta:
        return "on the meta device, so without values" if leaf.is_meta else f"not dense ({leaf.layout})"
    return "" if _type_name(leaf.dtype) else f"safetensors has no type for {leaf.dtype}"


@lru_cache(maxsize=64)
def _type_name(dtype: torch.dtype) -> str:
    """The name that safetensors has for a dtype; empty if it does not store such tensors element by element."""
    try:
        data = safetensors.torch.save({"x": torch.empty(1, dtype=dtype)})
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        return ""
    entry = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["x"]
    plain = entry["shape"] == [1] and entry["data_offsets"] == [0, dtype.itemsize]
    return str(entry["dtype"]) if plain else ""


def stored(leaf: Tensor) -> _Stored:
    def rows() -> Iterator[Tensor]:
        yield leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()

    return _Stored(_type_name(leaf.dtype), leaf.itemsize, tuple(leaf.shape), rows)


def _cut(part: _Slice, indices: Indices) -> _Stored:
    """The tensor that a plan leaves of one in a file; ``indices`` are the kept positions of each of its axes."""
    shape = part.get_shape()
    itemsize = (part[:0] if shape else part[...]).itemsize
    kept = tuple(n if index is None else len(index) for n, index in zip(shape, indices, strict=True))
    return _Stored(part.get_dtype(), itemsize, kept, lambda: _rows(part, itemsize, indices))


def _rows(part: _Slice, itemsize: int, indices: Indices) -> Iterator[Tensor]:
    """The values of `_cut`, a few rows at a time.

    Read four rows at a time, a tensor of eight rows of which 0, 2, 3 and 6 stay gives::

        rows of the file   0 1 2 3 | 4 5 6 7
        rows that stay     0   2 3 |     6
        local              0   2 3 |     2
    """
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


def write(path: str | PathLike[str], tensors: Mapping[str, _Stored], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, dtypes with the widest elements first, so that every tensor is aligned to its own."""
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, object] = {_RESERVED: metadata}
    end = 0
    for name in names:
        dtype, itemsize, shape, _ = tensors[name]
        start, end = end, end + itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER:
        raise FileError(f"safetensors reads headers of at most {_HEADER:,} bytes; this one has {len(text):,}.")
    with replacing(path) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for rows in tensors[name].rows():
                out.write(rows.reshape(-1).view(torch.uint8).numpy().data)


def write_document(path: str | PathLike[str], document: Mapping[str, object]) -> None:
    """Write a document as JSON; an older file is replaced when it is complete."""
    with replacing(path) as out:
        out.write(json.dumps(document).encode())


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that replaces the one at ``path`` when it is complete.

    Until then it has a random name in the same folder. It gets the mode of the file that it replaces, or else that of
    any new file. If the path is a link, the file that the link leads to is replaced.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    with partial.open("xb") as out:
        try:
            yield out
            out.flush()
            os.fsync(out.fileno())  # a full disk raises here, while the old file is still there
            if target.exists():
                shutil.copymode(target, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
