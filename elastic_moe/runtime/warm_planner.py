"""Compiles the planner before its first use: `python -m elastic_moe.plan.warm`, and every worker before it joins.

A file lock makes one process of a machine compile. The others wait for it and load the result from the cache.
"""

from __future__ import annotations

import fcntl

import numpy as np

from elastic_moe.plan.compiled import cache_dir
from elastic_moe.plan.placement import Topology, plan_placement
from elastic_moe.plan.split import split_tokens


def warm_up() -> None:
    """Run the planner and the split once, with the types of arguments that a run uses."""
    with open(cache_dir() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        placement = plan_placement(np.ones((1, 4)), Topology(("a", "b"), (1.0, 1.0)), [3, 3])
        split_tokens(np.ones((2, 4), dtype=np.int64), placement, 0)


if __name__ == "__main__":
    warm_up()
