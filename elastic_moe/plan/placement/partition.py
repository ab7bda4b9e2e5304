# pyright: reportArgumentType=false, reportReturnType=false
"""Placement with too few slots to link all ranks: divide ranks and experts into groups.

The problem. Two ranks are *linked* if they hold the same expert, because the token split can then move load from one
to the other. A *group* is a set of ranks that a chain of links joins, with the experts that they hold. m ranks with s
slots in all need m - 1 slots for the copies that link them, so a group holds at most s - m + 1 experts. It can divide
their load exactly (`bin_packing.py`). There are P - E slots beyond one per expert, hence P - E links. The best
placement is the best division of ranks and experts into R - (P - E) groups: number partitioning with limited
cardinality.

The method. Each rank begins as a group of its own. The slowest group exchanges experts with the other groups. If no
exchange can help, it is merged with the group that leaves both fastest, which costs one link. When all links are used,
ranks change groups.

Legend: E experts, the heaviest first; R ranks; P slots; G groups (`groups.py`). Load is in integer units, target is
the load that a rank's speed makes its own. Makespan is the time of the slowest; 1 is the mean.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.plan.compiled import Floats, Ints, compiled
from elastic_moe.plan.placement.bin_packing import pack_splittable
from elastic_moe.plan.placement.estimate import sums_from_lightest
from elastic_moe.plan.placement.groups import (
    Partition,
    clone,
    move_expert,
    move_rank,
    one_group_per_rank,
    slowest_group,
)
from elastic_moe.plan.placement.replicas import LayerPlan, index_copies

_TRIALS = 256  # exchanges of ranks tried before the search ends
_MIN_GAIN = 1e-6  # of the mean time: the least gain for which experts or ranks move


@compiled
def _slower_after(state: Partition, group: int, load: int, other: int) -> float:
    """The larger of two groups' times after `group` has given `load` to `other`."""
    return max(
        (state.load_G[group] - load) / state.target_G[group], (state.load_G[other] + load) / state.target_G[other]
    )


@compiled
def _exchange_experts(state: Partition) -> float:
    """Lower the makespan by moves out of the slowest group, until none helps. Returns the makespan.

    A move gives one expert to another group, or swaps it for a lighter expert of another group.
    """
    num_experts, num_groups = len(state.load_E), len(state.load_G)
    while True:
        group, makespan = slowest_group(state)
        gives, takes, goal, best_makespan = -1, -1, -1, makespan - _MIN_GAIN
        for expert in range(num_experts):
            if state.group_E[expert] != group:
                continue
            for other in range(num_groups):
                if state.alive_G[other] and other != group and state.experts_G[other] < state.max_experts_G[other]:
                    worse = _slower_after(state, group, state.load_E[expert], other)
                    if worse < best_makespan:
                        gives, takes, goal, best_makespan = expert, -1, other, worse
            for lighter in range(num_experts - 1, expert, -1):
                less = state.load_E[expert] - state.load_E[lighter]
                if (state.load_G[group] - less) / state.target_G[group] >= best_makespan:
                    break  # the following experts are heavier still
                other = state.group_E[lighter]
                if other != group:
                    worse = _slower_after(state, group, less, other)
                    if worse < best_makespan:
                        gives, takes, goal, best_makespan = expert, lighter, other, worse
        if gives < 0:
            return makespan
        move_expert(state, gives, goal)
        if takes >= 0:
            move_expert(state, takes, group)


@compiled
def _evict_excess(state: Partition, group: int) -> None:
    """Move the experts that the group's slots cannot hold to other groups, each time by the best move."""
    while state.experts_G[group] > state.max_experts_G[group]:
        gives, goal, best_makespan = -1, -1, np.inf
        for other in range(len(state.load_G)):
            if state.alive_G[other] and other != group and state.experts_G[other] < state.max_experts_G[other]:
                for expert in range(len(state.load_E)):
                    if state.group_E[expert] == group:
                        worse = _slower_after(state, group, state.load_E[expert], other)
                        if worse < best_makespan:
                            gives, goal, best_makespan = expert, other, worse
        move_expert(state, gives, goal)


@compiled
def _merge(state: Partition, group: int) -> bool:
    """Merge a group with the one that gives the smallest joint time. Returns False if there is no other group."""
    best, best_makespan = -1, np.inf
    for other in range(len(state.load_G)):
        if state.alive_G[other] and other != group:
            makespan = (state.load_G[group] + state.load_G[other]) / (state.target_G[group] + state.target_G[other])
            if makespan < best_makespan:
                best, best_makespan = other, makespan
    if best < 0:
        return False
    for rank in range(len(state.group_R)):
        if state.group_R[rank] == best:
            move_rank(state, rank, group)
    for expert in range(len(state.load_E)):
        if state.group_E[expert] == best:
            move_expert(state, expert, group)
    state.alive_G[best] = False
    _evict_excess(state, group)
    return True


@compiled
def _interchangeable(state: Partition, rank: int, other: int) -> bool:
    """Whether two ranks have the same slots and the same target."""
    return state.slots_R[other] == state.slots_R[rank] and state.target_R[other] == state.target_R[rank]


@compiled
def _first_of_its_kind(state: Partition, rank: int) -> bool:
    """Whether no lower rank of its group is interchangeable with it; one trial stands for all of a kind."""
    first = 0
    while state.group_R[first] != state.group_R[rank] or not _interchangeable(state, rank, first):
        first += 1
    return first == rank


@compiled
def _move_ranks(state: Partition, trials: int) -> tuple[Partition, int]:
    """Give the slowest group a rank of another group, alone or in exchange for one of its own; the first change that
    helps.

    Returns the division (the old one if no change helps) and the number of trials that remain; 0 ends the search.
    """
    num_ranks = len(state.group_R)
    group, makespan = slowest_group(state)
    ranks_G = np.zeros(num_ranks, np.int64)
    for rank in range(num_ranks):
        ranks_G[state.group_R[rank]] += 1
    order = np.argsort(
        np.where(state.alive_G, state.load_G / np.maximum(state.target_G, 1e-9), np.inf), kind="mergesort"
    )
    for other in order:
        if not state.alive_G[other] or other == group:
            continue
        for rank in range(num_ranks):
            if state.group_R[rank] != other or not _first_of_its_kind(state, rank):
                continue
            for back in range(-1, num_ranks):  # the rank given in exchange; -1: none
                if back < 0 and ranks_G[other] < 2:
                    continue
                if back >= 0 and (state.group_R[back] != group or not _first_of_its_kind(state, back)):
                    continue
                if back >= 0 and _interchangeable(state, rank, back):
                    continue
                if trials == 0:
                    return state, 0
                trials -= 1
                trial = clone(state)
                move_rank(trial, rank, group)
                if back >= 0:
                    move_rank(trial, back, other)
                _evict_excess(trial, other)
                _evict_excess(trial, group)
                if _exchange_experts(trial) < makespan - _MIN_GAIN:
                    return trial, trials
    return state, 0


@compiled
def partition_experts(load_E: Ints, target_R: Floats, slots_R: Ints, goal: float) -> Partition:
    """Divide ranks and experts into groups; stops at a makespan of `goal`, or the smallest that the search finds.

    Args:
        load_E: the heaviest first.
        target_R: the load that each rank's speed makes its own.
        slots_R: slots of each rank; 0 for a rank that computes nothing.
    """
    state = one_group_per_rank(load_E, target_R, slots_R)
    links = slots_R.sum() - len(load_E)
    light = sums_from_lightest(load_E)
    while True:
        group, makespan = slowest_group(state)
        if makespan <= goal:
            break
        hot = 0
        while state.group_E[hot] != group:
            hot += 1
        others = max(min(state.max_experts_G[group] - links, state.experts_G[group]) - 1, 0)
        if links == 0 or load_E[hot] + light[others] <= goal * state.target_G[group]:  # else no exchange can reach it
            if _exchange_experts(state) <= goal or links == 0:
                break
            group, makespan = slowest_group(state)
        if not _merge(state, group):
            break
        links -= 1
    trials = _TRIALS
    while trials > 0 and slowest_group(state)[1] > goal:
        state, trials = _move_ranks(state, trials)
    return state


@compiled
def fill_by_partition(layer: LayerPlan, expert_P: Ints, goal: float) -> float:
    """Fill the empty slots of `expert_P` group by group. Returns the makespan if each group divides its load exactly.

    The division does not tell interchangeable ranks apart. Each group takes its ranks in the order of `round_robin_R`,
    so that they lie on different nodes.
    """
    load_E, target_R, start_R, _, _, round_robin_R, slots_of_ER, copies_E = layer
    num_ranks = len(target_R)
    order = np.argsort(-load_E, kind="mergesort")
    slots_R = start_R[1:] - start_R[:-1]
    groups = partition_experts(load_E[order], target_R, slots_R, goal)
    taken_R = np.zeros(num_ranks, np.bool_)
    for group in range(num_ranks):
        if not groups.alive_G[group]:
            continue
        ranks, size = np.empty(num_ranks, np.int64), 0
        for like in range(num_ranks):
            if groups.group_R[like] != group:
                continue
            for rank in round_robin_R:
                if not taken_R[rank] and _interchangeable(groups, rank, like):
                    taken_R[rank] = True
                    ranks[size] = rank
                    size += 1
                    break
        few_first = np.argsort(slots_R[ranks[:size]], kind="mergesort")  # ranks with few slots need the heavy experts
        ranks = ranks[few_first]
        experts = order[groups.group_E == group]
        start = np.zeros(size + 1, np.int64)
        start[1:] = np.cumsum(slots_R[ranks])
        target = target_R[ranks] * (groups.load_G[group] / groups.target_G[group])
        inside_P = np.full(start[size], -1)
        inside = np.empty((len(experts), size), np.int64)
        pack_splittable(
            load_E[experts],
            target,
            start,
            np.arange(size),
            np.zeros((len(experts), size), np.bool_),
            inside_P,
            inside,
            np.zeros(len(experts), np.int64),
        )
        for index in range(size):
            for slot in range(start[index], start[index + 1]):
                if inside_P[slot] >= 0:
                    expert_P[start_R[ranks[index]] + slot - start[index]] = experts[inside_P[slot]]
    index_copies(expert_P, slots_of_ER, copies_E)
    return slowest_group(groups)[1]
