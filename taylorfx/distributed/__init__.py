"""Several processes that decide as one: every process has batches of its own, `total` adds up what they measure.

::

    params, spec = tfx.prune(
        params, spec, my_batches, budget=tfx.Flops(0.5), repair=tfx.reconstruct, total=tfx.distributed.total
    )

`measure`, `iterate` and the repairs take the same keyword. Without them, anything that adds up is added up by hand::

    means = tfx.distributed.total(lambda: tfx.repair.means(params, spec, my_batches, coupling))

Before the processes exchange what they have, they meet: each leaves a short report in the store of the process group,
and none goes on until the reports of all are there. So what has failed in one process is an error in all of them, and
so is a process that does not come::

    process 0                  process 1                  process 2
    measures                   measures                   measures
    reports "float64, ..."     reports "ValueError: ..."  reports "float64, ..."
    ---------------------------- all have reported -----------------------------
    raises "process 1: ..."    raises its own error       raises "process 1: ..."
"""

from taylorfx.distributed.meeting import Same, Total, agreed, alone, total
from taylorfx.distributed.shards import (
    Deferred,
    alike,
    computed,
    gathered,
    indexed,
    is_shared,
    placed,
    refuse_alone,
    refuse_shards,
    sharded,
    sharing,
    whole,
)

__all__ = [
    "Deferred", "Same", "Total", "agreed", "alike", "alone", "computed", "gathered", "indexed", "is_shared", "placed",
    "refuse_alone", "refuse_shards", "sharded", "sharing", "total", "whole",
]  # fmt: skip
