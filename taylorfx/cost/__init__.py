"""What a network costs: parameters, FLOPs, peak memory and time, as functions of the units that are kept."""

from taylorfx.cost.algebra import Cost, CostFunction
from taylorfx.cost.counts import flops, memory, parameters
from taylorfx.cost.runners import Pace, compiled, eager
from taylorfx.cost.timings import Timings

__all__ = ["Cost", "CostFunction", "Pace", "Timings", "compiled", "eager", "flops", "memory", "parameters"]
