# pyright: reportArgumentType=false, reportReturnType=false
"""Packing by splitting experts: copies such that each rank can be filled exactly to its target.

This is splittable bin packing with a limit on the parts per bin. A bin is a rank, its capacity is the rank's target,
and the limit is its slots. An item is an expert. An item that is split over several bins is an expert with several
copies.

Legend: E experts, R ranks, P slots. A *remainder* is the load of an expert that no rank has taken yet.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.plan.compiled import Bools, Floats, Ints, compiled
from elastic_moe.plan.placement.replicas import add_copy

_LOOK_AHEAD = 8  # ranks compared before one of them is filled


@compiled
def _window(pool: Ints, size: int, remainder_E: Ints, need: int, slots: int) -> tuple[int, int]:
    """The first window of `slots` consecutive remainders that sums to `need`, else the last: (begin, width)."""
    width = min(slots, size)
    total = np.int64(0)
    for index in range(width):
        total += remainder_E[pool[index]]
    begin = 0
    while total < need and begin + width < size:
        total += remainder_E[pool[begin + width]] - remainder_E[pool[begin]]
        begin += 1
    return begin, width


@compiled
def _insert(pool: Ints, size: int, remainder_E: Ints, expert: int) -> int:
    """Insert an expert into the pool in order of its remainder. Returns the pool's new size."""
    place = size
    while place > 0 and remainder_E[pool[place - 1]] > remainder_E[expert]:
        pool[place] = pool[place - 1]
        place -= 1
    pool[place] = expert
    return size + 1


@compiled
def pack_splittable(
    load_E: Ints,
    target_R: Floats,
    start_R: Ints,
    round_robin_R: Ints,
    resident_ER: Bools,
    expert_P: Ints,
    slots_of_ER: Ints,
    copies_E: Ints,
) -> None:
    """Fill the empty slots of `expert_P` so that each rank can be filled exactly to its target.

    This succeeds for any load on equal ranks if P >= E + R - 1. The experts without a copy form a pool in order of
    remainder. Each rank needs its target less the load that it holds. It takes the first window of consecutive
    remainders, one for each of its free slots, that sums to its need. It splits the last one, and the rest of that
    returns to the pool. All but the last fit whole, because the window before did not reach the need. So each rank but
    the last adds at most one copy.

    Ranks that hold more than their target come first. They take light remainders, and the excess of their hottest
    expert goes to the pool. With copies placed before, unequal ranks or fewer slots, the method is a heuristic. Of the
    next `_LOOK_AHEAD` ranks, the one that already holds most of its window is filled next.

    Args:
        load_E: load of each expert.
        target_R: the load that each rank's speed makes its own.
        start_R: [R + 1], first slot of each rank.
        round_robin_R: order in which ranks are filled.
        resident_ER: the rank holds the expert's weights now.
        expert_P: expert of each slot; changed.
        slots_of_ER: slots of each expert; changed.
        copies_E: number of copies of each expert; changed.
    """
    num_experts, num_ranks = len(load_E), len(target_R)
    remainder_E = load_E.copy()
    pool = np.empty(num_experts + num_ranks, np.int64)  # experts, lightest remainder first
    need_R, hot_R, free_R = np.empty(num_ranks, np.int64), np.full(num_ranks, -1), np.zeros(num_ranks, np.int64)
    slots_after = np.int64(0)
    for rank in range(num_ranks):
        need_R[rank] = np.int64(target_R[rank])
        for slot in range(start_R[rank], start_R[rank + 1]):
            expert = expert_P[slot]
            if expert < 0:
                free_R[rank] += 1
                slots_after += 1
                continue
            need_R[rank] -= load_E[expert]
            if hot_R[rank] < 0 or load_E[expert] > load_E[hot_R[rank]]:
                hot_R[rank] = expert
    size = 0
    for expert in np.argsort(load_E, kind="mergesort"):
        if copies_E[expert] == 0:
            pool[size] = expert
            size += 1
    done = np.zeros(num_ranks, np.bool_)
    for _ in range(num_ranks):
        chosen, best, looked, begin, width = -1, -1, 0, 0, 0
        for rank in round_robin_R:
            if done[rank] or looked == _LOOK_AHEAD:
                continue
            over = need_R[rank] < 0
            if chosen >= 0 and not over and need_R[chosen] < 0:
                continue
            if chosen < 0 or (over and need_R[chosen] >= 0):
                best, looked = -1, 0
            looked += 1
            first, wide = _window(pool, size, remainder_E, max(need_R[rank], 0), free_R[rank])
            common = 0
            for index in range(wide):
                common += resident_ER[pool[first + index], rank]
            if common > best:
                chosen, best, begin, width = rank, common, first, wide
        rank = chosen
        done[rank] = True
        slots_after -= free_R[rank]
        need, hot = need_R[rank], hot_R[rank]
        if need < 0:
            need += load_E[hot]  # its hottest expert fills the rest
        taken, have, slot = 0, np.int64(0), start_R[rank]
        last = -1
        while taken < width and (have < need or size - taken > slots_after):
            if need_R[rank] < 0 and have + remainder_E[pool[begin + taken]] > need and size - taken <= slots_after:
                break
            last = pool[begin + taken]
            taken += 1
            while expert_P[slot] >= 0:
                slot += 1
            add_copy(last, slot, expert_P, slots_of_ER, copies_E)
            have += remainder_E[last]
        for index in range(begin, size - taken):
            pool[index] = pool[index + taken]
        size -= taken
        if need_R[rank] < 0:
            excess, last = load_E[hot] - max(need - have, 0), hot
        else:
            excess = have - need
        if excess > 0 and last >= 0 and size < slots_after:
            remainder_E[last] = excess
            size = _insert(pool, size, remainder_E, last)
