# pyright: reportArgumentType=false, reportReturnType=false
"""Homes of the experts of one layer: which stay, which are given up, and which are chosen anew.

The home of an expert is the rank that keeps its optimizer state. It holds one of the expert's copies, and moving it
moves that state.

Legend: E experts, R ranks, P slots. `home_E` holds the home rank of each expert, -1 for none. `max_homes_R` is the
number of homes that a rank should have at most.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.plan.compiled import Bools, Floats, Ints, compiled


@compiled
def choose_homes(max_homes_R: Ints, rank_P: Ints, slots_of_ER: Ints, copies_E: Ints, home_E: Ints) -> None:
    """Choose a home among its copies for each expert without one, at most `max_homes_R` per rank where that is
    possible.

    Bipartite matching by augmenting paths. A rank without slack passes one of the homes chosen here on to another copy
    of that expert. Experts with few copies come first, because they have the least choice.
    """
    num_experts, num_ranks = len(home_E), len(max_homes_R)
    slack_R = max_homes_R.copy()
    open_E = home_E < 0
    for expert in range(num_experts):
        if home_E[expert] >= 0:
            slack_R[home_E[expert]] -= 1
    seen_R = np.empty(num_ranks, np.bool_)
    via_expert_R = np.empty(num_ranks, np.int64)  # the expert by which the search reached a rank
    queue = np.empty(num_ranks, np.int64)
    for copies in range(1, num_ranks + 1):  # experts with little choice first
        for expert in range(num_experts):
            if home_E[expert] >= 0 or copies_E[expert] != copies:
                continue
            seen_R[:] = False
            head, tail, goal, emptiest = 0, 0, -1, -1
            for index in range(copies):
                rank = rank_P[slots_of_ER[expert, index]]
                seen_R[rank], via_expert_R[rank], queue[tail] = True, expert, rank
                tail += 1
                if emptiest < 0 or slack_R[rank] > slack_R[emptiest]:
                    emptiest = rank
            if slack_R[emptiest] > 0:
                goal = emptiest
            while head < tail and goal < 0:
                full = queue[head]
                head += 1
                for other in range(num_experts):
                    if home_E[other] != full or not open_E[other] or goal >= 0:
                        continue
                    for index in range(copies_E[other]):
                        rank = rank_P[slots_of_ER[other, index]]
                        if seen_R[rank]:
                            continue
                        seen_R[rank], via_expert_R[rank], queue[tail] = True, other, rank
                        tail += 1
                        if slack_R[rank] > 0:
                            goal = rank
                            break
            if goal < 0:
                goal = emptiest  # above its maximum: no path leads to a rank with slack
            slack_R[goal] -= 1
            while True:
                comes = via_expert_R[goal]
                before = home_E[comes]
                home_E[comes] = goal
                if comes == expert:
                    break
                goal = before


@compiled
def _home_totals(load_E: Ints, home_E: Ints, num_ranks: int) -> tuple[Ints, Ints]:
    """Number of homes of each rank, and their total load."""
    count_R, load_R = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
    for expert in range(len(load_E)):
        if home_E[expert] >= 0:
            count_R[home_E[expert]] += 1
            load_R[home_E[expert]] += load_E[expert]
    return count_R, load_R


@compiled
def release_homes(
    load_E: Ints, target_R: Floats, max_homes_R: Ints, slots_R: Ints, resident_ER: Bools, home_E: Ints
) -> None:
    """Release the homes beyond `max_homes_R`, and give homeless experts to ranks that hold a copy.

    A rank first releases homes of which it holds no copy. It inherited these as the mirror of a dead rank, and their
    weights must be fetched anyway: from 8 to 7 ranks this lowered the copies fetched from 25 % to 14 %. Then it
    releases the experts that bring its load nearest to its target. A rank whose slots are all homes, with less load
    than its target, also releases its lightest home. A homeless expert goes to the rank with the fewest homes that
    holds a copy and has less than its maximum.
    """
    num_experts, num_ranks = len(load_E), len(target_R)
    count_R, load_R = _home_totals(load_E, home_E, num_ranks)
    for rank in range(num_ranks):
        while count_R[rank] > max_homes_R[rank]:
            ideal = (load_R[rank] - target_R[rank]) / (count_R[rank] - max_homes_R[rank])
            gone, absent, miss = -1, False, np.inf
            for expert in range(num_experts):
                if home_E[expert] != rank:
                    continue
                away, distance = not resident_ER[expert, rank], abs(load_E[expert] - ideal)
                if gone < 0 or (away and not absent) or (away == absent and distance < miss):
                    gone, absent, miss = expert, away, distance
            home_E[gone] = -1
            count_R[rank] -= 1
            load_R[rank] -= load_E[gone]
        if count_R[rank] == slots_R[rank] and load_R[rank] < target_R[rank]:  # it needs a slot to take more load
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
                    resident_ER[expert, rank]
                    and count_R[rank] < max_homes_R[rank]
                    and (best < 0 or count_R[rank] < count_R[best])
                ):
                    best = rank
        if best >= 0:
            home_E[expert] = best
            count_R[best] += 1


@compiled
def place_homeless(load_E: Ints, target_R: Floats, max_homes_R: Ints, slots_R: Ints, home_E: Ints) -> None:
    """Give each homeless expert, the heaviest first, to the rank with the least load for its speed.

    Ranks below `max_homes_R` come first, then ranks with a free slot.
    """
    num_ranks = len(target_R)
    count_R, load_R = _home_totals(load_E, home_E, num_ranks)
    for expert in np.argsort(-load_E, kind="mergesort"):
        best, best_cost = -1, np.inf
        for turn in range(2):
            if home_E[expert] >= 0 or best >= 0:
                break
            for rank in range(num_ranks):
                cost = (load_R[rank] + load_E[expert]) / max(target_R[rank], 1e-9)
                if count_R[rank] < (max_homes_R[rank] if turn == 0 else slots_R[rank]) and cost < best_cost:
                    best, best_cost = rank, cost
        if best >= 0:
            home_E[expert] = best
            count_R[best] += 1
            load_R[best] += load_E[expert]
