"""Parts of a plan that know nothing of one another, planned in several threads where that pays."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

WORTH_THREADS = 24_000  # slots of all layers, from which on they are planned in several threads
_MOST_THREADS = 8  # other workers of the machine plan at the same time


def for_each(number: int, plan: Callable[[int], None], slots: int) -> None:
    """Plan each of so many parts with `slots` slots together. Planning one leaves the interpreter to others."""
    threads = min(number, len(os.sched_getaffinity(0)), _MOST_THREADS)
    if slots < WORTH_THREADS or threads < 2:
        for part in range(number):
            plan(part)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="plan") as pool:
        for _ in pool.map(plan, range(number)):
            pass
