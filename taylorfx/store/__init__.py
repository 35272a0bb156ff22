"""Values on disk: networks, plans, statistics and timings, as JSON and safetensors, which hold data and no code.

``save`` and ``load`` are of networks. A plan and statistics are small next to them, and are used with the coupling of
their network: another process, or another day, chooses and cuts without a forward pass. A coupling has no file: it is
a function of the spec and of shapes, which `taylorfx.couple` computes in a fraction of a second.
"""

from taylorfx.store.document import FileError
from taylorfx.store.files import cut_file, load, save
from taylorfx.store.plans import load_plan, save_plan
from taylorfx.store.schema import from_json, to_json
from taylorfx.store.statistics import load_statistics, save_statistics
from taylorfx.store.timings import load_timings, save_timings

__all__ = [
    "FileError", "cut_file", "from_json", "load", "load_plan", "load_statistics", "load_timings", "save", "save_plan",
    "save_statistics", "save_timings", "to_json",
]  # fmt: skip
