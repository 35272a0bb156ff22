"""What a network costs: parameters, FLOPs, peak memory and time, as functions of the units that are kept."""

from taylorfx.cost.counts import Cost, flops, memory, parameters
from taylorfx.cost.timings import Timings

__all__ = ["Cost", "Timings", "flops", "memory", "parameters"]
