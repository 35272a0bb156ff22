"""Plans in files: a small JSON document with the units that leave, by name, and with what becomes of the parameters.

A plan names units, so that it can be made again for another capture or checkpoint of its network::

    {"kind": "plan", "version": 1, "asked": "at most 50.0% of the FLOPs",
     "scopes": [{"name": "conv1", "units": 4, "leave": [1, 2]}, ...],
     "parameters": {"conv1.weight": [[4, 3, 3, 3], [2, 3, 3, 3]], ...},    of those that shrink, before and after;
                                                     [[4, 3, 3, 3]] of those that leave as a whole, with a branch
     "indices": "9f86d0..."}                                               a digest of what stays along every axis
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from os import PathLike

import numpy as np

from taylorfx.coupling.units import Coupling
from taylorfx.cutting.plan import Plan, PlanError
from taylorfx.store.document import FileError, Json, Reader, listed, quote, read_document
from taylorfx.store.files import write_document

__all__ = ["load_plan", "save_plan"]

KIND, VERSION = "plan", 1
"""What the documents are, and the version that is written and read."""


def save_plan(path: str | PathLike[str], plan: Plan) -> None:
    """Write a plan to a JSON file, from which `load_plan` makes an equal one.

    Raises:
        OSError: if the file cannot be written; an older one is then unchanged.
    """
    coupling = plan.coupling
    scopes: list[dict[str, object]] = [
        {"name": name, "units": size, "leave": coupling.index[(coupling.scope == k) & ~plan.keep].tolist()}
        for k, (name, size) in enumerate(zip(coupling.scopes, coupling.sizes.tolist(), strict=True))
    ]
    document = {
        "kind": KIND, "version": VERSION, "asked": plan.asked, "scopes": scopes, "parameters": _shrinking(plan),
        "indices": _digest(plan),
    }  # fmt: skip
    write_document(path, document)


def load_plan(path: str | PathLike[str], coupling: Coupling) -> Plan:
    """The plan that `save_plan` wrote, for the coupling of its network: of this checkpoint or another, captured again.

    If branches leave, the coupling has them as units: ``couple(params, spec, branches=True)``.

    That it is the plan's network is proven by the names and numbers of units, by the shapes of all parameters that
    shrink, before and after, and by what stays along their axes. Sizes of inputs may differ.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from taylorfx import Units, couple, init, layers as L, select, serial
    >>> spec = serial(L.Input((3,)), a=L.Linear(3, 8), relu=L.ReLU(), b=L.Linear(8, 2))
    >>> coupling = couple(init(spec, torch.Generator()), spec)
    >>> plan = select(torch.arange(8.0), coupling, budget=Units(5))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_plan(Path(folder, "plan.json"), plan)
    ...     load_plan(Path(folder, "plan.json"), coupling) == plan
    True

    Raises:
        FileError: if the file holds no plan, or one of another network; the message lists every error with its place.
        OSError: if the file cannot be read.
    """
    reader = _PlanReader(coupling)
    plan = reader.read(read_document(path))
    if reader.errors or plan is None:
        raise FileError(listed(f"{path} does not hold a plan of this network", reader.errors))
    return plan


def _shrinking(plan: Plan) -> dict[str, list[list[int]]]:
    """The shapes, before and after, of all parameters that lose something; of those that leave, before alone."""
    shapes: dict[str, list[list[int]]] = {}
    for path, indices in sorted(plan.indices.items()):
        if any(index is not None for index in indices):
            before = [*plan.coupling.spec.shapes[path]]
            shapes[path] = [before, [n if i is None else len(i) for n, i in zip(before, indices, strict=True)]]
    shapes |= {path: [[*plan.coupling.spec.shapes[path]]] for path in plan.gone}
    return dict(sorted(shapes.items()))


def _digest(plan: Plan) -> str:
    """What tells apart what plans keep along the axes of parameters."""
    digest = hashlib.sha256()
    for path in _shrinking(plan):
        if path in plan.gone:
            digest.update(f"{path} leaves ".encode())
        for axis, index in enumerate(plan.indices.get(path, ())):
            if index is not None:
                digest.update(f"{path} {axis} {len(index)} ".encode() + index.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


class _PlanReader(Reader):
    """Reads the document of a plan for the network of a coupling."""

    def __init__(self, coupling: Coupling) -> None:
        super().__init__()
        self.coupling = coupling

    def read(self, data: Json) -> Plan | None:
        names = ("kind", "version", "asked", "scopes", "parameters", "indices")
        if not isinstance(data, dict) or not self.of_kind(data, KIND, VERSION, names):
            self.expect_object(data)
            return None
        keep = np.ones(len(self.coupling), bool)
        seen: set[str] = set()
        for k, entry in enumerate(self.list_at(data, "scopes", "")):
            self.scope(entry, f"scopes[{k}]", seen, keep)
        for name in self.coupling.scopes if not self.errors else ():
            if name not in seen:
                self.wrong("scopes", f"{quote(name)} of the network is missing; the plan is of another one")
        asked = self.string_at(data, "asked", "")
        if self.errors:
            return None
        try:
            plan = Plan(self.coupling, keep, asked)
        except PlanError as error:
            self.wrong("scopes", str(error))
            return None
        self.check(plan, data)
        return plan

    def scope(self, entry: Json, place: str, seen: set[str], keep: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> None:
        """Take the units of a scope that leave out of those that stay."""
        if not isinstance(entry, dict):
            self.expect_object(entry, place)
            return
        known = ("name", "units", "leave")
        self.check_names(entry, place, known, known)
        name, leave = self.string_at(entry, "name", place), self.list_at(entry, "leave", place)
        if name not in self.coupling.scopes or name in seen:
            problem = "twice" if name in seen else "no scope of the network"
            self.wrong(f"{place}.name", f"{quote(name)} is {'here ' * (name in seen)}{problem}")
            return
        seen.add(name)
        units = np.flatnonzero(self.coupling.scope == self.coupling.scopes.index(name))
        if type(entry.get("units")) is not int or entry["units"] != len(units):
            received = quote(entry.get("units"))
            self.wrong(f"{place}.units", f"{quote(name)} has {len(units)} units in this network, received {received}")
            return
        numbers = dict(zip(self.coupling.index[units].tolist(), units.tolist(), strict=True))
        for j, number in enumerate(leave):
            if type(number) is not int or number not in numbers:
                self.wrong(f"{place}.leave[{j}]", f"no number of a unit of {quote(name)}: {quote(number)}")
            elif not keep[numbers[number]]:
                self.wrong(f"{place}.leave[{j}]", f"{number} is there twice")
            else:
                keep[numbers[number]] = False

    def check(self, plan: Plan, data: Mapping[str, Json]) -> None:
        """Check that the plan cuts the parameters as the one did that was written."""
        expected, received = _shrinking(plan), data["parameters"]
        if not isinstance(received, dict):
            self.expect_object(received, "parameters")
            return
        for path in sorted(expected.keys() | received.keys()):
            if path not in received or path not in expected:
                problem = "shrinks in this network only" if path in expected else "does not shrink in this network"
                self.wrong(f"parameters.{path:.80}", problem)
            elif expected[path] != received[path]:
                here, there = (" to ".join(map(str, shapes)) for shapes in (expected[path], [quote(received[path])]))
                self.wrong(f"parameters.{path:.80}", f"from {here} in this network, {there} in the plan")
        if not self.errors and data["indices"] != _digest(plan):
            self.wrong("indices", "other indices stay in this network; the plan is of another one")
