"""Statistics in files: the sums as tensors in a safetensors file, what they are of in its header.

Another budget, criterion or constraint needs no data then, and neither does another process or machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike

import torch
from torch import Tensor

from taylorfx.coupling.units import Coupling
from taylorfx.layers import Shape
from taylorfx.layers.sizes import fault
from taylorfx.scoring.statistics import Moments, Statistics
from taylorfx.store.document import FileError, Json, Reader, listed, parse
from taylorfx.store.files import opened, stored, write

__all__ = ["load_statistics", "save_statistics"]

KIND, VERSION = "statistics", 1
"""What the documents are, and the version that is written and read."""

KEY = "taylorfx.statistics"
"""The entry of the document in the file's table of strings."""

TENSORS = ("loss", "sum", "sum_abs", "sum_sq", "sum_abs_mean", "sum_batch_abs", "sum_batch_sq")
"""The attributes of `Statistics` that every file has as tensors."""

MOMENTS = tuple(field.name for field in fields(Moments))
"""Those of `Moments`, which a file has as ``moments.count``, ... or not at all."""


def save_statistics(path: str | PathLike[str], stats: Statistics) -> None:
    """Write statistics to a safetensors file, from which `load_statistics` reads equal ones.

    Raises:
        FileError: if the names of the units are longer than a header may be.
        OSError: if the file cannot be written; an older one is then unchanged.
    """
    tensors = {name: getattr(stats, name) for name in TENSORS}
    if stats.moments is not None:
        tensors |= {f"moments.{name}": getattr(stats.moments, name) for name in MOMENTS}
    if stats.rows is not None:
        tensors["rows"] = stats.rows
    document: dict[str, object] = {
        "kind": KIND, "version": VERSION, "n": stats.n, "batches": stats.batches, "per_example": stats.per_example,
        "per_position": stats.per_position, "units": stats.units, "networks": stats.networks,
    }  # fmt: skip
    text = json.dumps({**document, "digest": _digest(document, tensors)})
    write(path, {name: stored(tensor) for name, tensor in tensors.items()}, {KEY: text})


def load_statistics(
    path: str | PathLike[str], coupling: Coupling | None = None, *, device: torch.device | str = "cpu"
) -> Statistics:
    """The statistics that `save_statistics` wrote.

    Args:
        coupling: the units that they have to be of; of any without it. They are compared by their names.
        device: where the tensors are put.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_statistics(Path(folder, "stats.safetensors"), Statistics.neutral(("a[0]", "a[1]")))
    ...     load_statistics(Path(folder, "stats.safetensors"))
    Statistics(0 examples in 0 batches, 2 units)

    Raises:
        FileError: if the file holds no statistics, or those of other units; the message lists every error.
        OSError: if the file cannot be read.
    """
    with opened(path, str(device)) as (file, metadata):
        if KEY not in metadata:
            raise FileError(f"A file of statistics has a document in its header; {path} has none.")
        reader = _StatisticsReader({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118, no mapping
    try:
        stats = reader.read(parse(metadata[KEY]))
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    if stats is not None and coupling is not None and stats.units != coupling.names:
        lacking = len({*coupling.names} - {*stats.units})
        reader.wrong("units", f"{len(stats.units)}, of this network {len(coupling)}, of which {lacking} are lacking")
    if reader.errors or stats is None:
        raise FileError(listed(f"{path} does not hold statistics of this network", reader.errors))
    return stats


def _digest(document: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    """What tells a file from one that was changed after it was written."""
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _StatisticsReader(Reader):
    """Reads the document of statistics, whose sums are these tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def read(self, data: Json) -> Statistics | None:
        names = ("kind", "version", "n", "batches", "per_example", "per_position", "units", "networks", "digest")
        if not isinstance(data, dict) or not self.of_kind(data, KIND, VERSION, names):
            self.expect_object(data)
            return None
        n, batches = (self.count_at(data, name, "") for name in ("n", "batches"))
        units, networks = (self.strings_at(data, name, "") for name in ("units", "networks"))
        per_example = data["per_example"]
        if not isinstance(per_example, bool):
            self.wrong("per_example", "expected a boolean")
        axis = data["per_position"]
        per_position = axis if isinstance(axis, str) and not fault(axis) else None
        if axis != per_position:
            self.wrong("per_position", "expected an axis of an input, or null")
        if len({*units}) < len(units):
            self.wrong("units", "two have the same name")
        self.check(n, len(units))
        rest = {name: value for name, value in data.items() if name != "digest"}
        if not self.errors and data["digest"] != _digest(rest, self.tensors):
            self.wrong("digest", "the file was changed after it was written")
        if self.errors:
            return None
        with_moments = "moments.count" in self.tensors
        moments = Moments(*(self.tensors[f"moments.{name}"] for name in MOMENTS)) if with_moments else None
        sums = {name: self.tensors[name] for name in TENSORS}
        return Statistics(
            n, batches, **sums, moments=moments, rows=self.tensors.get("rows"), units=units,
            per_example=bool(per_example), per_position=per_position, networks=networks,
        )  # fmt: skip

    def check(self, n: int, units: int) -> None:
        """Check that all sums are there, and only these, of the right shapes, and finite."""
        shapes: dict[str, Shape] = dict.fromkeys(TENSORS, (units,)) | {"loss": ()}
        if any(name.startswith("moments.") for name in self.tensors):
            shapes |= {f"moments.{name}": (units,) for name in MOMENTS}
        if "rows" in self.tensors:
            shapes["rows"] = (n, units)
        for name in sorted(shapes.keys() | self.tensors.keys()):
            tensor = self.tensors.get(name)
            if tensor is None or name not in shapes:
                self.wrong(f"tensor {name:.80}", "missing" if tensor is None else "unknown")
            elif tensor.shape != shapes[name]:
                self.wrong(f"tensor {name}", f"expected the shape {shapes[name]}, received {tuple(tensor.shape)}")
            elif tensor.dtype not in (torch.float32, torch.float64, torch.int64):
                self.wrong(f"tensor {name}", f"expected float32, float64 or int64, received {tensor.dtype}")
            elif not tensor.isfinite().all():
                self.wrong(f"tensor {name}", "not all of its numbers are finite")
