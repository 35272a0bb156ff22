"""The truth about a network, to judge scores by: its loss by gates, without units, and along the way to them."""

from taylorfx.truth.correlations import Fidelity, Interval, fidelity
from taylorfx.truth.forecasts import exact_second_order, path_integral, plan_path_integral, plan_second_order
from taylorfx.truth.gated import curvature, gated_loss, gradient
from taylorfx.truth.oracles import Oracle, oracle

__all__ = [
    "Fidelity", "Interval", "Oracle", "curvature", "exact_second_order", "fidelity", "gated_loss", "gradient", "oracle",
    "path_integral", "plan_path_integral", "plan_second_order",
]  # fmt: skip
