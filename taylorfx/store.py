"""Networks on disk: a spec as JSON, parameters as safetensors with the spec in the file's header."""

from __future__ import annotations

import json
from dataclasses import fields
from os import PathLike
from typing import Any

import safetensors
import safetensors.torch
import torch

from taylorfx.layers import LAYERS, kind
from taylorfx.spec import Node, Spec, SpecError, check
from taylorfx.tree import Params, flatten, unflatten

__all__ = ["from_json", "load", "save", "to_json"]

_KEY = "taylorfx.spec"


def to_json(spec: Spec) -> str:
    """A spec as JSON; `from_json` gives an equal one back."""
    nodes: list[dict[str, Any]] = []
    for node in spec.nodes:
        values = {field.name: getattr(node.layer, field.name) for field in fields(node.layer)}
        entry = {"name": node.name, "layer": kind(type(node.layer)), "fields": values, "inputs": node.inputs}
        nodes.append({**entry, "params": node.params} if node.params is not None else entry)
    return json.dumps({"nodes": nodes, "outputs": spec.outputs, "keys": spec.keys})


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
    return Spec(tuple(nodes), tuple(data["outputs"]), tuple(data.get("keys", ())))


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
