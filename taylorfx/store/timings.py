"""Timings in files: a JSON document with layers, kinds of layers and whole networks, and how long they take::

{"kind": "timings", "version": 1, "batch": 1, ..., "threads": 2, "runner": "taylorfx.cost.runners.eager",
 "table": [{"layer": "Linear", "fields": {...}, "shapes": [[1, 3]], "microseconds": 2.5}, ...],
 "kinds": [{"kind": ["o", ["Linear", ...]], "shares": [0.99, 0.97, 0.91]}, ...],
 "networks": [{"nodes": [...], ...}, ...],
 "whole": [{"network": 1, "beside": 0, "value": 0.51}, ...]}           a share of another's time, or microseconds
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from os import PathLike

import numpy as np
import torch
from numpy.typing import NDArray

from taylorfx.cost.runners import Runner, eager
from taylorfx.cost.timings import BELOW, Kind, Timings
from taylorfx.layers import Layer, Shape
from taylorfx.network.limits import impossible
from taylorfx.network.spec import Spec, SpecError
from taylorfx.store.document import FileError, Json, describe, listed, quote, read_document, to_tuples, written
from taylorfx.store.files import write_document
from taylorfx.store.schema import LayerReader, to_json, written_layer

__all__ = ["load_timings", "save_timings"]

KIND, VERSION = "timings", 1
"""What the documents are, and the version that is written and read."""

Table = dict[tuple[Layer, tuple[Shape, ...]], float]

Entry = tuple[str, Mapping[str, Json]]
"""An object of a document, after its place."""


def save_timings(path: str | PathLike[str], timings: Timings) -> None:
    """Write what was timed to a JSON file, from which `load_timings` reads it.

    Kept is all that `Latency` asks for, so that it chooses the same again and measures nothing: the layers, the
    multiples, and the networks that ran whole, with the number of threads and the name of the runner, which is code.
    All of it is of this machine; the pace and the progress bar are not kept.

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
    timed = dict.fromkeys(spec for pair in timings.shares for spec in pair if spec is not None)
    networks = {spec: number for number, spec in enumerate(timed)}
    document = {
        "kind": KIND, "version": VERSION, "batch": timings.batch, "points": timings.points,
        "repeats": timings.repeats, "device": str(timings.device), "dtype": str(timings.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "runner": _name(timings.runner), "table": table,
        "kinds": [{"kind": written(key), "shares": shares.tolist()} for key, shares in timings.kinds.items()],
        "networks": [json.loads(to_json(spec)) for spec in networks],
        "whole": [
            {"network": networks[spec], "beside": other and networks[other], "value": value}
            for (spec, other), value in timings.shares.items()
        ],
    }  # fmt: skip
    write_document(path, document)


def load_timings(
    path: str | PathLike[str], *, runner: Runner | None = eager, operators: Collection[str] = ()
) -> Timings:
    """The timings that `save_timings` wrote. What is not in them is measured on this machine.

    Of a subclass that measures in another way, take the table: ``Mine(table=load_timings(path).table)``.

    Args:
        runner: the one that ran the networks. A file holds no code; it holds the runner's name, which has to be this
            one's.
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
        FileError: if the file holds no timings, or those of another runner or number of threads; the message lists
            every error with its place.
        OSError: if the file cannot be read.
    """
    reader = _TimingsReader(operators)
    timings = reader.timings(read_document(path), runner)
    if reader.errors or timings is None:
        raise FileError(listed(f"{path} does not hold timings", reader.errors))
    return timings


class _TimingsReader(LayerReader):
    """Reads the document of timings."""

    def timings(self, data: Json, runner: Runner | None) -> Timings | None:
        names = (
            "kind", "version", "batch", "points", "repeats", "device", "dtype", "threads", "runner", "table", "kinds",
            "networks", "whole",
        )  # fmt: skip
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
        if (threads := self.count_at(data, "threads", "", least=1)) != torch.get_num_threads():
            self.wrong("threads", f"{threads} ran, and torch has {torch.get_num_threads()}: torch.set_num_threads")
        if data["runner"] != _name(runner):
            self.wrong("runner", f"{quote(data['runner'])} ran the networks, not {_name(runner)}; give it as runner=")
        table: Table = {}
        for k, entry in enumerate(self.list_at(data, "table", "")):
            self.timed(entry, f"table[{k}]", table)
        kinds = dict(filter(None, map(self.kind, self.objects_at(data, "kinds", ("kind", "shares")))))
        shares = self.shares(data)
        if self.errors or not isinstance(kind, torch.dtype):
            return None
        return Timings(batch, points, repeats, device, kind, table, runner=runner, shares=shares, kinds=kinds)

    def objects_at(self, data: Mapping[str, Json], name: str, known: tuple[str, ...]) -> list[Entry]:
        """The objects in a list, which have these entries, with their places."""
        entries: list[Entry] = []
        for k, entry in enumerate(self.list_at(data, name, "")):
            place, before = f"{name}[{k}]", len(self.errors)
            if isinstance(entry, dict):
                self.check_names(entry, place, known, known)
            self.expect_object(entry, place)
            if isinstance(entry, dict) and len(self.errors) == before:
                entries.append((place, entry))
        return entries

    def kind(self, item: Entry) -> tuple[Kind, NDArray[np.float64]] | None:
        """A kind of layer, and the shares of its time just below a round width."""
        place, entry = item
        key, values = to_tuples(entry["kind"]), entry["shares"]
        if not isinstance(key, tuple) or not _named(key):
            self.wrong(f"{place}.kind", f"expected lists of strings and integers, received {quote(entry['kind'])}")
            return None
        if not isinstance(values, list) or len(values) != len(BELOW):
            self.wrong(f"{place}.shares", f"expected {len(BELOW)} numbers, received {quote(values)}")
            return None
        return key, np.array([self.time(x, f"{place}.shares[{k}]") for k, x in enumerate(values)])

    def shares(self, data: Mapping[str, Json]) -> dict[tuple[Spec, Spec | None], float]:
        """What was measured of networks that ran whole."""
        networks: list[Spec] = []
        for k, document in enumerate(self.list_at(data, "networks", "")):
            reader = LayerReader(self.operators)
            spec = reader.read(document)
            self.errors += [f"networks[{k}].{error}" for error in reader.errors]
            networks += [spec] if spec else []
        if self.errors:
            return {}
        shares: dict[tuple[Spec, Spec | None], float] = {}
        for place, entry in self.objects_at(data, "whole", ("network", "beside", "value")):
            first, beside = self.one_of(networks, entry["network"], f"{place}.network"), entry["beside"]
            other = None if beside is None else self.one_of(networks, beside, f"{place}.beside")
            value = self.time(entry["value"], f"{place}.value")
            if first is not None:
                shares[first, other] = value
        return shares

    def one_of(self, networks: list[Spec], number: Json, place: str) -> Spec | None:
        """The network with this number."""
        if type(number) is int and 0 <= number < len(networks):
            return networks[number]
        self.wrong(place, f"expected the number of one of {len(networks)} networks, received {quote(number)}")
        return None

    def time(self, value: Json, place: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            self.wrong(place, f"expected a number, 0 or more, received {quote(value)}")
            return 0.0
        return float(value)

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
        layer, time = (
            self.layer(entry, place, len(shapes)),
            self.time(entry.get("microseconds"), f"{place}.microseconds"),
        )
        if layer is not None and len(self.errors) == before:
            table[layer, shapes] = time

    def shape(self, value: Json, place: str) -> Shape:
        sizes = value if isinstance(value, list) else [None]
        numbers = tuple(n for n in sizes if type(n) is int and n >= 0)
        if len(numbers) < len(sizes) or not isinstance(value, list):
            self.wrong(place, f"expected a list of sizes, received {describe(value)}")
        elif problem := impossible(numbers):
            self.wrong(place, f"would be {problem}")
        return numbers


def _name(runner: Runner | None) -> str | None:
    """What a file calls a runner: ``taylorfx.cost.runners.eager``; of an object that is called, its class."""
    if runner is None:
        return None
    named = runner if hasattr(runner, "__qualname__") else type(runner)
    return f"{named.__module__}.{named.__qualname__}"


def _named(kind: tuple[object, ...]) -> bool:
    """Whether this names a kind of layer: strings, integers and tuples of them."""
    return all(_named(x) if isinstance(x, tuple) else type(x) in (str, int) for x in kind)
