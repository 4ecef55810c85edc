"""Many processes on one job, started by `torchrun` or `accelerate launch`.

All of them go through the same program. What they share out are micro-batches (each process walks over its own) and
matrices (each is decomposed by the process that owns it); everything else they compute alike. Without a launcher there
is one process, and every function here returns at once.
"""

from layer_surgery.parallel.group import (
    Group,
    ProcessLost,
    agree,
    alone,
    barrier,
    broadcast,
    by_owner,
    check_alone,
    from_first,
    gather,
    group,
    in_step,
    is_first,
    meet,
    new_folder,
    own,
    owners,
    rows_of_all,
    shared_folder,
    temporary_folder,
    together,
    total,
)
from layer_surgery.parallel.launch import joined, launched
from layer_surgery.parallel.sums import Sums

__all__ = [
    "Group",
    "ProcessLost",
    "Sums",
    "agree",
    "alone",
    "barrier",
    "broadcast",
    "by_owner",
    "check_alone",
    "from_first",
    "gather",
    "group",
    "in_step",
    "is_first",
    "joined",
    "launched",
    "meet",
    "new_folder",
    "own",
    "owners",
    "rows_of_all",
    "shared_folder",
    "temporary_folder",
    "together",
    "total",
]
