"""Compiles planner and optimizer before their first use: `python -m elastic_moe.plan.warm`, and every worker before it
joins.

A file lock makes one process of a machine compile, and that one says so. The others wait for it and load the result
from the cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

from elastic_moe.checkpoint.local_file import lock
from elastic_moe.optim import adamw
from elastic_moe.plan.compiled import cache_dir
from elastic_moe.plan.placement import Topology, plan_placement
from elastic_moe.plan.split import split_tokens
from elastic_moe.runtime.exchange import rounding

READY = "ready"  # file in the cache: everything is compiled
LOCK_S = 900.0  # after so long a process compiles itself, whatever the one with the lock does
POLL_S = 0.1
REASON = "the planner is compiled for this machine, once: this takes a minute or two"


def warm_up(tell: Callable[[str], None] = lambda _: None) -> None:
    """Run the planner, the split and all compiled loops once, with the types of arguments that a run uses.

    Args:
        tell: called with a sentence if this process is going to compile.
    """
    ready = cache_dir() / READY
    if ready.exists():
        _run()
        return
    with open(cache_dir() / "lock", "w") as file:
        lock(file, LOCK_S, POLL_S)
        if not ready.exists():
            tell(REASON)
        _run()
        ready.touch()


def _run() -> None:
    placement = plan_placement(np.ones((1, 4)), Topology(("a", "b"), (1.0, 1.0)), [3, 3])
    split_tokens(np.ones((2, 4), dtype=np.int64), placement, 0)
    adamw.warm_up()
    rounding.warm_up()


def main() -> None:
    """Compile the planner, and say so."""
    warm_up(lambda reason: print(reason, file=sys.stderr))
