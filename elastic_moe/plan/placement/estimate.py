# pyright: reportArgumentType=false, reportReturnType=false
"""An estimate of the shortest time that a placement with few slots can reach, so that the search for it knows when to
stop.

It is a guess and no bound: `scripts/benchmarks/placement_bound.py` has the same count with a proof.

Legend: E experts, the heaviest first; R ranks. Times are relative; 1 is the mean.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.plan.compiled import Floats, Ints, compiled


@compiled
def sums_from_lightest(load_E: Ints) -> Ints:
    """Total load of the n lightest experts for n = 0 to E, int64[E + 1].

    Args:
        load_E: loads, the heaviest first.
    """
    light = np.zeros(len(load_E) + 1, np.int64)
    light[1:] = np.cumsum(load_E[::-1])
    return light


@compiled
def estimate_least_time(load_E: Ints, target_R: Floats, slots_R: Ints) -> float:
    """Estimate the shortest makespan from the light experts that must share the hot experts' ranks; found by bisection.

    There are P - E spare slots. With u of them, an expert's group has at most u + 1 ranks and u fewer experts than
    slots. For a given time, each expert needs the least u with which it fits, together with the lightest experts that
    fill its group. An expert that takes longer than the time on one rank is counted as if it had a group of its own.
    Two others may share one spare slot. When each was counted alone, the search stopped 4 % short on three ranks.

    Args:
        load_E: loads, the heaviest first.
        target_R: the load that each rank's speed makes its own.
        slots_R: slots of each rank; 0 for a rank that computes nothing.
    """
    light = sums_from_lightest(load_E)
    num_experts, slots, target, links = len(load_E), slots_R.max(), target_R.max(), slots_R.sum() - len(load_E)
    for rank in range(len(slots_R)):
        if slots_R[rank] > 0:
            slots = min(slots, slots_R[rank])
    low, high = 1.0, 1.0 + load_E[0] / target
    for _ in range(16):
        makespan = (low + high) / 2
        links_left, halves = links, 0
        for expert in range(num_experts):
            used, fits = -1, False
            while not fits and used < links_left:
                used += 1
                for ranks in range(1, used + 2):
                    others = min(max(ranks * slots - used - 1, 0), num_experts - 1)
                    fits |= load_E[expert] + light[others] <= ranks * makespan * target
            if not fits:
                links_left = -1
            elif load_E[expert] > makespan * target:
                links_left -= used
            else:
                halves += min(used, 1)
            if used == 0 or links_left < 0:
                break
        low, high = (makespan, high) if links_left < (halves + 1) // 2 else (low, makespan)
    return high
