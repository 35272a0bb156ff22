"""The copy of a network that scoring runs: the same values at the reads, with less time and memory.

The copy is differentiated once, by the gates, and thrown away. So it need not keep what only other derivatives need.
It is the result of some passes, each of which rewrites a network into one with the same values at the reads:

    network --> unused_positions --> folded --> norms_as_scales --> ... --> lean copy
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from taylorfx.coupling.units import Coupling
from taylorfx.distributed import is_shared
from taylorfx.layers.roles import Memory, Mixing
from taylorfx.network.parameters import check
from taylorfx.network.spec import Spec
from taylorfx.rewrite.draft import Draft, Pass
from taylorfx.rewrite.folding import fold
from taylorfx.rewrite.fused import fused_attention
from taylorfx.rewrite.gated import gated_products
from taylorfx.rewrite.in_place import written_over
from taylorfx.rewrite.parts import slices_as_parts
from taylorfx.rewrite.rotary import rotations
from taylorfx.rewrite.scales import norms_as_scales
from taylorfx.rewrite.unused import unused_positions
from taylorfx.tree import Params, flatten

__all__ = ["PASSES", "in_channels_last", "lean"]


def lean(
    params: Params, coupling: Coupling, *, channels_last: bool = False, whole: bool = False
) -> tuple[Params, Spec]:
    """A network with the same reads and the same derivatives by their gates, up to rounding; for nothing else.

    Args:
        channels_last: also lay the weights of convolutions out for images in that memory format, where every forward
            pass would otherwise copy them.
        whole: compute all positions that are read, also those that no output depends on.

    Raises:
        SpecError: if the parameters do not fit the network.
    """
    check(params, coupling.spec)
    draft = Draft.of(params, coupling)
    left = {unused_positions} if whole else set[Pass]()
    if not channels_last:
        left.add(weights_in_channels_last)
    if any(map(is_shared, flatten(params).values())):  # whose numbers are not at hand
        left.update((folded, weights_in_channels_last))
    for rewrite in PASSES:
        if rewrite not in left:
            draft = rewrite(draft)
    return draft.params, draft.spec


def folded(draft: Draft) -> Draft:
    """Fold norms into the layers before them (`taylorfx.fold`).

    x --> conv --> bn --> y                              x --> conv of other weights --> y
    """
    params, spec = fold(draft.params, draft.spec)
    return Draft(flatten(params), spec, draft.coupling)


def weights_in_channels_last(draft: Draft) -> Draft:
    """Lay the weights of convolutions of images out in ``torch.channels_last``; the numbers are the same."""
    return draft.rewritten(draft.spec.nodes, in_channels_last(draft.leaves, draft.spec))


def in_channels_last(leaves: Mapping[str, Tensor], spec: Spec) -> dict[str, Tensor]:
    """The weights of convolutions of images, by their paths, in ``torch.channels_last``."""
    weights: dict[str, Tensor] = {}
    for node in spec.nodes:
        mixing, memory = node.layer.role(Mixing), node.layer.role(Memory)
        if mixing is not None and memory is not None and memory.channels_last:
            path = node.path(mixing.weight)
            weights[path] = leaves[path].contiguous(memory_format=torch.channels_last)
    return weights


PASSES: tuple[Pass, ...] = (
    unused_positions,
    folded,
    norms_as_scales,
    gated_products,
    rotations,
    written_over,
    slices_as_parts,
    fused_attention,
    weights_in_channels_last,
)
"""In the order in which they are run."""
