"""Timings in files: a JSON document with the layers that were timed, their shapes, and microseconds."""

from __future__ import annotations

import math
from collections.abc import Collection
from os import PathLike

import torch

from taylorfx.cost.timings import Timings
from taylorfx.layers import Layer, Shape
from taylorfx.network.limits import impossible
from taylorfx.network.spec import SpecError
from taylorfx.store.document import FileError, Json, describe, listed, quote, read_document
from taylorfx.store.files import write_document
from taylorfx.store.schema import LayerReader, written_layer

__all__ = ["load_timings", "save_timings"]

KIND, VERSION = "timings", 1
"""What the documents are, and the version that is written and read."""

Table = dict[tuple[Layer, tuple[Shape, ...]], float]


def save_timings(path: str | PathLike[str], timings: Timings) -> None:
    """Write what was timed to a JSON file, from which `load_timings` reads it.

    Raises:
        SpecError: if fields of layers hold other values than numbers, strings and tuples of them; lists all of them.
        OSError: if the file cannot be written; an older one is then unchanged.
    """
    errors: list[str] = []
    table: list[dict[str, object]] = []
    for number, ((layer, shapes), microseconds) in enumerate(timings.table.items()):
        entry = written_layer(layer, f"entry {number}", errors)
        table.append({**entry, "shapes": [[int(n) for n in shape] for shape in shapes], "microseconds": microseconds})
    if errors:
        raise SpecError("A document holds numbers, strings and tuples of them; received:\n  " + "\n  ".join(errors))
    document = {
        "kind": KIND, "version": VERSION, "batch": timings.batch, "points": timings.points,
        "repeats": timings.repeats, "device": str(timings.device), "dtype": str(timings.dtype).removeprefix("torch."),
        "table": table,
    }  # fmt: skip
    write_document(path, document)


def load_timings(path: str | PathLike[str], *, operators: Collection[str] = ()) -> Timings:
    """The timings that `save_timings` wrote. What is not in the table is measured on this machine.

    Of a subclass that measures in another way, take the table: ``Mine(table=load_timings(path).table)``.

    Args:
        operators: further operators that layers may use, as for `load`.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from taylorfx import layers as L, serial
    >>> timings = Timings(table={(L.Linear(3, 4), ((1, 3),)): 2.5})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_timings(Path(folder, "timings.json"), timings)
    ...     load_timings(Path(folder, "timings.json"))(serial(L.Input((3,)), L.Linear(3, 4)))
    2.5

    Raises:
        FileError: if the file holds no timings; the message lists every error with its place.
        OSError: if the file cannot be read.
    """
    reader = _TimingsReader(operators)
    timings = reader.timings(read_document(path))
    if reader.errors or timings is None:
        raise FileError(listed(f"{path} does not hold timings", reader.errors))
    return timings


class _TimingsReader(LayerReader):
    """Reads the document of timings."""

    def timings(self, data: Json) -> Timings | None:
        names = ("kind", "version", "batch", "points", "repeats", "device", "dtype", "table")
        if not isinstance(data, dict) or not self.of_kind(data, KIND, VERSION, names):
            self.expect_object(data)
            return None
        batch, points, repeats = (self.count_at(data, name, "", least=1) for name in ("batch", "points", "repeats"))
        device, dtype = self.string_at(data, "device", ""), self.string_at(data, "dtype", "")
        kind = getattr(torch, dtype, None) if dtype.isidentifier() else None
        if not isinstance(kind, torch.dtype):
            self.wrong("dtype", f"expected one of torch's dtypes, received {quote(dtype)}")
        try:
            torch.device(device)
        except RuntimeError:
            self.wrong("device", f"expected one of torch's devices, received {quote(device)}")
        table: Table = {}
        for k, entry in enumerate(self.list_at(data, "table", "")):
            self.timed(entry, f"table[{k}]", table)
        if self.errors or not isinstance(kind, torch.dtype):
            return None
        return Timings(batch, points, repeats, device, kind, table)

    def timed(self, entry: Json, place: str, table: Table) -> None:
        """Add the time of a layer to the table."""
        if not isinstance(entry, dict):
            self.expect_object(entry, place)
            return
        known = ("layer", "fields", "shapes", "microseconds")
        before = len(self.errors)
        self.check_names(entry, place, known, known)
        shapes = tuple(
            self.shape(x, f"{place}.shapes[{k}]") for k, x in enumerate(self.list_at(entry, "shapes", place))
        )
        layer, time = self.layer(entry, place, len(shapes)), entry.get("microseconds")
        if isinstance(time, bool) or not isinstance(time, (int, float)) or not 0 <= time < math.inf:
            self.wrong(f"{place}.microseconds", f"expected a number, 0 or more, received {quote(time)}")
        elif layer is not None and len(self.errors) == before:
            table[layer, shapes] = float(time)

    def shape(self, value: Json, place: str) -> Shape:
        sizes = value if isinstance(value, list) else [None]
        numbers = tuple(n for n in sizes if type(n) is int and n >= 0)
        if len(numbers) < len(sizes) or not isinstance(value, list):
            self.wrong(place, f"expected a list of sizes, received {describe(value)}")
        elif problem := impossible(numbers):
            self.wrong(place, f"would be {problem}")
        return numbers
