# pyright: reportArgumentType=false, reportReturnType=false
"""Copies such that every rank can be filled exactly: splittable bin packing with a limit on the pieces per bin.

Shapes: E experts, R ranks, P slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.compiled import compiled
from elastic_moe.plan.placement.replicas import add_copy
from elastic_moe.plan.split.max_flow import Floats, Ints

_LOOK_AHEAD = 8  # ranks compared before one takes its turn


@compiled
def _window(pool: Ints, size: int, rest_E: Ints, need: int, slots: int) -> tuple[int, int]:
    """(begin, width) of the first window of `slots` consecutive pieces that reaches what the rank needs, or the last window."""
    width = min(slots, size)
    total = np.int64(0)
    for index in range(width):
        total += rest_E[pool[index]]
    begin = 0
    while total < need and begin + width < size:
        total += rest_E[pool[begin + width]] - rest_E[pool[begin]]
        begin += 1
    return begin, width


@compiled
def _insert(pool: Ints, size: int, rest_E: Ints, expert: int) -> int:
    """Put a piece into its place by size. Returns the new size."""
    place = size
    while place > 0 and rest_E[pool[place - 1]] > rest_E[expert]:
        pool[place] = pool[place - 1]
        place -= 1
    pool[place] = expert
    return size + 1


@compiled
def cut_pieces(
    load_E: Ints,
    target_R: Floats,
    start_R: Ints,
    turn_R: Ints,
    has_ER: NDArray[np.bool_],
    expert_P: Ints,
    where: Ints,
    copies_E: Ints,
) -> None:
    """Fill the empty slots so that every rank can be filled exactly: possible for any load with equal ranks and P >= E + R - 1.

    The experts without a copy are a pool of pieces in order of size. Each rank takes the first window of as many consecutive pieces as
    it has free slots whose sum reaches what it needs, and cuts the last one; what it leaves of that goes back to the pool. All but
    the last piece fit whole, because the window before did not reach the need; so each rank but the last adds one piece at most
    (splittable bin packing with cardinality constraints). Ranks that hold too much already come first: light pieces fill their slots,
    and what then is too much of their hottest expert goes to the pool. With copies there already, unequal ranks, or fewer slots, it is
    a heuristic. Of the next few ranks, the one that has most of its window already takes its turn.
    """
    num_experts, num_ranks = len(load_E), len(target_R)
    rest_E = load_E.copy()
    pool = np.empty(num_experts + num_ranks, np.int64)  # experts, lightest piece first
    need_R, hot_R, free_R = np.empty(num_ranks, np.int64), np.full(num_ranks, -1), np.zeros(num_ranks, np.int64)
    later = np.int64(0)
    for rank in range(num_ranks):
        need_R[rank] = np.int64(target_R[rank])
        for slot in range(start_R[rank], start_R[rank + 1]):
            expert = expert_P[slot]
            if expert < 0:
                free_R[rank] += 1
                later += 1
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
        for rank in turn_R:
            if done[rank] or looked == _LOOK_AHEAD:
                continue
            over = need_R[rank] < 0
            if chosen >= 0 and not over and need_R[chosen] < 0:
                continue
            if chosen < 0 or (over and need_R[chosen] >= 0):
                best, looked = -1, 0
            looked += 1
            first, wide = _window(pool, size, rest_E, max(need_R[rank], 0), free_R[rank])
            common = 0
            for index in range(wide):
                common += has_ER[pool[first + index], rank]
            if common > best:
                chosen, best, begin, width = rank, common, first, wide
        rank = chosen
        done[rank] = True
        later -= free_R[rank]
        need, hot = need_R[rank], hot_R[rank]
        if need < 0:
            need += load_E[hot]  # its hottest expert fills what the others leave
        taken, have, slot = 0, np.int64(0), start_R[rank]
        last = -1
        while taken < width and (have < need or size - taken > later):
            if need_R[rank] < 0 and have + rest_E[pool[begin + taken]] > need and size - taken <= later:
                break
            last = pool[begin + taken]
            taken += 1
            while expert_P[slot] >= 0:
                slot += 1
            add_copy(last, slot, expert_P, where, copies_E)
            have += rest_E[last]
        for index in range(begin, size - taken):
            pool[index] = pool[index + taken]
        size -= taken
        if need_R[rank] < 0:
            back, last = load_E[hot] - max(need - have, 0), hot
        else:
            back = have - need
        if back > 0 and last >= 0 and size < later:
            rest_E[last] = back
            size = _insert(pool, size, rest_E, last)
