"""The parameters of a network: drawing them, checking that they fit, and telling which of them are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from taylorfx.network.spec import Spec, SpecError
from taylorfx.tree import Params, Tree, flatten, unflatten

__all__ = ["check", "fits", "gather", "init", "partition"]


def init(
    spec: Spec, generator: torch.Generator, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tree:
    """New parameters, drawn as torch initializes its layers; parameters that several nodes share are drawn once.

    >>> from taylorfx import layers as L, serial
    >>> spec = serial(L.Input((3,)), fc=L.Linear(3, 2))
    >>> {path: tuple(leaf.shape) for path, leaf in flatten(init(spec, torch.Generator().manual_seed(0))).items()}
    {'fc.weight': (2, 3), 'fc.bias': (2,)}

    Args:
        generator: draws the parameters, on its own device.
        dtype: of all floating-point parameters and buffers.
        device: where the parameters are put.

    Raises:
        SpecError: if a layer cannot be initialized; names the node.
    """
    leaves: dict[str, Tensor] = {}
    for node in spec.nodes:
        try:
            fresh = node.layer.init(generator)
        except RuntimeError as error:
            raise SpecError(f"{node.name}: {node.layer} cannot be initialized: {error}") from error
        for leaf, tensor in fresh.items():
            if node.path(leaf) not in leaves:
                leaves[node.path(leaf)] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    params = unflatten(leaves)
    check(params, spec)
    return params


def check(params: Params, spec: Spec) -> None:
    """Refuse parameters that do not fit the network.

    Raises:
        SpecError: if parameters are missing, unknown, of another shape, or no tensors; lists all of them.
    """
    if not isinstance(params, Mapping) or not isinstance(spec, Spec):
        raise SpecError(
            "Parameters are nested dicts of tensors and come first, then the network, a Spec; "
            f"received {type(params).__name__}, {type(spec).__name__}."
        )
    expected, leaves = spec.shapes, flatten(params)
    errors = [f"{path}: missing, expected {shape}" for path, shape in expected.items() if path not in leaves]
    for path, leaf in leaves.items():
        shape = expected.get(path)
        if shape is None:
            errors.append(f"{path}: the network has no such parameter")
        elif not isinstance(leaf, Tensor):
            errors.append(f"{path}: expected a tensor, received {type(leaf).__name__}")
        elif leaf.shape != shape:
            errors.append(f"{path}: expected {shape}, received {tuple(leaf.shape)}")
    if errors:
        raise SpecError("Parameters have to fit the network; received:\n  " + "\n  ".join(errors))


def gather(params: Params, spec: Spec) -> list[Tensor]:
    """The parameters in the order of ``spec.layout.paths``; refused as `check` does if they do not fit the network."""
    if torch.compiler.is_compiling():
        return spec.layout.leaves(spec.layout.walk(params))
    if isinstance(params, Mapping) and isinstance(spec, Spec):
        try:
            subtrees = spec.layout.walk(params)
            leaves = spec.layout.leaves(subtrees)
            if spec.layout.complete(subtrees) and fits(leaves, spec):
                return leaves
        except (AttributeError, LookupError, TypeError):
            pass
    check(params, spec)
    flat = flatten(params)  # an unusual tree that fits, for example one with empty subtrees
    return [flat[path] for path in spec.layout.paths]


def fits(leaves: Sequence[object], spec: Spec) -> bool:
    """Whether these are tensors of the shapes that the network's parameters have, in the order of their paths."""
    shapes = [getattr(leaf, "shape", None) for leaf in leaves]
    return shapes == [*spec.shapes.values()] and all(issubclass(kind, Tensor) for kind in {*map(type, leaves)})


def partition(params: Params, spec: Spec) -> tuple[Tree, Tree]:
    """The parameters that are trained, and those that are not: running statistics and frozen parameters.

    `taylorfx.tree.combine` joins the two again.

    >>> from taylorfx import layers as L, serial
    >>> spec = serial(L.Input((2, 4, 4)), bn=L.BatchNorm2d(2))
    >>> [list(flatten(part)) for part in partition(init(spec, torch.Generator()), spec)]
    [['bn.weight', 'bn.bias'], ['bn.running_mean', 'bn.running_var', 'bn.num_batches_tracked']]
    """
    buffers = {*(spec.interface.frozen if spec.interface else ())}
    buffers |= {node.path(leaf) for node in spec.nodes for leaf in node.layer.buffers}
    leaves = flatten(params)
    return (
        unflatten((path, leaf) for path, leaf in leaves.items() if path not in buffers),
        unflatten((path, leaf) for path, leaf in leaves.items() if path in buffers),
    )
