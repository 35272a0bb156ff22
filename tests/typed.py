"""What the type checker has to know of a user's own types; it is checked with the package and never run."""

from torch import Tensor, nn
from typing_extensions import assert_type

import taylorfx as tfx
from taylorfx.interop.module import SpecModule


def comes_back(params: tfx.Params, spec: tfx.Spec, module: nn.Linear, x: Tensor) -> None:
    """The module's own class with ``like``, otherwise one of ours."""
    assert_type(tfx.to_torch(params, spec, like=module), nn.Linear)
    assert_type(tfx.to_torch(params, spec, like=module, example_inputs=x, unchanged=["head"]), nn.Linear)
    assert_type(tfx.to_torch(params, spec), SpecModule)


def is_a_pair(params: tfx.Params, spec: tfx.Spec, batch: tuple[Tensor, Tensor]) -> None:
    """What `prune` returns is unpacked as two, and has its plan."""
    pruned = tfx.prune(params, spec, batch, budget=tfx.Flops(0.5))
    small, smaller = pruned
    assert_type(small, tfx.Params)
    assert_type(smaller, tfx.Spec)
    assert_type(pruned.plan, tfx.Plan)
