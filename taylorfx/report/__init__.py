"""Figures of what was measured, drawn by matplotlib."""

from taylorfx.report.plots import plot_fidelity, plot_frontier

__all__ = ["plot_fidelity", "plot_frontier"]
