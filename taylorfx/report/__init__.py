"""Tables and figures of what was measured; figures are drawn by matplotlib."""

from taylorfx.report.plots import plot_fidelity, plot_frontier
from taylorfx.report.sweeps import Sweep, sweep

__all__ = ["Sweep", "plot_fidelity", "plot_frontier", "sweep"]
