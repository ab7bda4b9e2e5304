# pyright: reportArgumentType=false, reportReturnType=false
"""Where the experts' homes are: kept, given up, found anew. Shapes: E experts, R ranks, P slots."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.compiled import compiled
from elastic_moe.plan.split.max_flow import Floats, Ints


@compiled
def choose_homes(cap_R: Ints, rank_P: Ints, where: Ints, copies_E: Ints, home_E: Ints) -> None:
    """A home among its copies for every expert that has none, at most `cap_R` per rank where that is possible.

    Augmenting paths: a full rank passes one of the homes chosen here on to another copy of that expert.
    """
    num_experts, num_ranks = len(home_E), len(cap_R)
    room_R = cap_R.copy()
    open_E = home_E < 0
    for expert in range(num_experts):
        if home_E[expert] >= 0:
            room_R[home_E[expert]] -= 1
    seen_R = np.empty(num_ranks, np.bool_)
    from_R = np.empty(num_ranks, np.int64)  # the expert that would come to a rank
    queue = np.empty(num_ranks, np.int64)
    for copies in range(1, num_ranks + 1):  # those with little choice first
        for expert in range(num_experts):
            if home_E[expert] >= 0 or copies_E[expert] != copies:
                continue
            seen_R[:] = False
            head, tail, goal, emptiest = 0, 0, -1, -1
            for index in range(copies):
                rank = rank_P[where[expert, index]]
                seen_R[rank], from_R[rank], queue[tail] = True, expert, rank
                tail += 1
                if emptiest < 0 or room_R[rank] > room_R[emptiest]:
                    emptiest = rank
            if room_R[emptiest] > 0:
                goal = emptiest
            while head < tail and goal < 0:
                full = queue[head]
                head += 1
                for other in range(num_experts):
                    if home_E[other] != full or not open_E[other] or goal >= 0:
                        continue
                    for index in range(copies_E[other]):
                        rank = rank_P[where[other, index]]
                        if seen_R[rank]:
                            continue
                        seen_R[rank], from_R[rank], queue[tail] = True, other, rank
                        tail += 1
                        if room_R[rank] > 0:
                            goal = rank
                            break
            if goal < 0:
                goal = emptiest  # more than its cap: no other copies could take one
            room_R[goal] -= 1
            while True:
                comes = from_R[goal]
                before = home_E[comes]
                home_E[comes] = goal
                if comes == expert:
                    break
                goal = before


@compiled
def _held(load_E: Ints, home_E: Ints, num_ranks: int) -> tuple[Ints, Ints]:
    """Homes of each rank, and their load."""
    count_R, load_R = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
    for expert in range(len(load_E)):
        if home_E[expert] >= 0:
            count_R[home_E[expert]] += 1
            load_R[home_E[expert]] += load_E[expert]
    return count_R, load_R


@compiled
def release_homes(
    load_E: Ints, target_R: Floats, most_R: Ints, slots_R: Ints, has_ER: NDArray[np.bool_], home_E: Ints
) -> None:
    """Ranks give up the homes beyond `most_R`: first those of which they have no copy (a dead rank's, which their mirrors inherited), then
    the experts that bring them nearest to their target. A lost home (-1) goes to the rank with the fewest homes that has a copy, while it
    has less than `most_R`.
    """
    num_experts, num_ranks = len(load_E), len(target_R)
    count_R, load_R = _held(load_E, home_E, num_ranks)
    for rank in range(num_ranks):
        while count_R[rank] > most_R[rank]:
            wish = (load_R[rank] - target_R[rank]) / (count_R[rank] - most_R[rank])
            gone, absent, miss = -1, False, np.inf
            for expert in range(num_experts):
                if home_E[expert] != rank:
                    continue
                away, distance = not has_ER[expert, rank], abs(load_E[expert] - wish)
                if gone < 0 or (away and not absent) or (away == absent and distance < miss):
                    gone, absent, miss = expert, away, distance
            home_E[gone] = -1
            count_R[rank] -= 1
            load_R[rank] -= load_E[gone]
        if count_R[rank] == slots_R[rank] and load_R[rank] < target_R[rank]:  # it could take more, if it had a slot
            lightest = -1
            for expert in range(num_experts):
                if home_E[expert] == rank and (lightest < 0 or load_E[expert] < load_E[lightest]):
                    lightest = expert
            home_E[lightest] = -1
            count_R[rank] -= 1
            load_R[rank] -= load_E[lightest]
    for expert in range(num_experts):
        best = -1
        if home_E[expert] < 0:
            for rank in range(num_ranks):
                if (
                    has_ER[expert, rank]
                    and count_R[rank] < most_R[rank]
                    and (best < 0 or count_R[rank] < count_R[best])
                ):
                    best = rank
        if best >= 0:
            home_E[expert] = best
            count_R[best] += 1


@compiled
def place_homeless(load_E: Ints, target_R: Floats, cap_R: Ints, slots_R: Ints, home_E: Ints) -> None:
    """Experts without a home, heaviest first, to the least loaded rank under its cap; beyond the caps where that is not enough."""
    num_ranks = len(target_R)
    count_R, load_R = _held(load_E, home_E, num_ranks)
    for expert in np.argsort(-load_E, kind="mergesort"):
        best, best_cost = -1, np.inf
        for turn in range(2):
            if home_E[expert] >= 0 or best >= 0:
                break
            for rank in range(num_ranks):
                cost = (load_R[rank] + load_E[expert]) / max(target_R[rank], 1e-9)
                if count_R[rank] < (cap_R[rank] if turn == 0 else slots_R[rank]) and cost < best_cost:
                    best, best_cost = rank, cost
        if best >= 0:
            home_E[expert] = best
            count_R[best] += 1
            load_R[best] += load_E[expert]
