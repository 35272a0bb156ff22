"""How near a smaller copy of a module is to its network: whether a difference is of rounding alone.

A proof takes small differences, as of sums in another order. So small are also those of a scale of attention that does
not fit, where attention looks at all positions nearly alike. They stay in double precision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from taylorfx.internals import pytree
from taylorfx.interop.proof import Call, outputs_of, rounding, truth
from taylorfx.network.spec import Spec
from taylorfx.tree import Params, map_paths

__all__ = ["apart", "only_rounding"]


def apart(model: nn.Module, params: Params, spec: Spec, call: Call) -> float:
    """How far outputs of a model are from those of the network, as a share of the largest number.

    What is no more than rounding is nothing.
    """
    results, expected = call.outputs(model), truth(params, spec, call)
    shares = [0.0]
    for key, x in outputs_of(results, spec).items():
        wanted = expected.outputs.get(key)
        if wanted is not None and x.is_floating_point() and x.numel():
            share = float((x - wanted).abs().nan_to_num(0).max() / wanted.abs().nan_to_num(0).max().clamp(min=1e-30))
            shares.append(share if share > 4 * rounding(x) else 0.0)
    return max(shares)


def only_rounding(share: float, model: nn.Module, params: Params, spec: Spec, call: Call) -> bool:
    """Whether hardly anything of this share, by which they are `apart`, is left in double precision.

    The model is changed. Where its code computes in one precision only, nothing tells the share from rounding.
    """
    arguments, inputs, then = pytree.tree_map(_doubled, (call.arguments, dict(call.inputs), call.then))
    doubled = replace(call, arguments=arguments, inputs=inputs, then=then)
    try:
        return apart(model.double(), map_paths(lambda _, x: _doubled(x), params), spec, doubled) < 0.1 * share
    except (RuntimeError, TypeError, ValueError):
        return True


def _doubled(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
