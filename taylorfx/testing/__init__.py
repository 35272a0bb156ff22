"""For tests, ours and our users': random networks and plans (strategies of hypothesis), and `check_layer`."""

from taylorfx.testing.laws import assert_trees_equal, check_layer
from taylorfx.testing.strategies import (
    Network,
    batch_for,
    homogeneous_specs,
    networks,
    plans,
    random_params,
    random_plan,
    specs,
    token_specs,
    trunks,
)

__all__ = [
    "Network", "assert_trees_equal", "batch_for", "check_layer", "homogeneous_specs", "networks", "plans",
    "random_params", "random_plan", "specs", "token_specs", "trunks",
]  # fmt: skip
