# pyright: reportArgumentType=false, reportReturnType=false
"""Groups of ranks and experts: the value that `partition.py` searches over, and its elementary moves.

Legend: E experts, R ranks, G groups (numbered like the ranks; a merge retires one of the numbers).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from elastic_moe.plan.compiled import Bools, Floats, Ints, compiled


class Partition(NamedTuple):
    """A division of ranks and experts into groups; the functions here change it in place.

    load_E, target_R, slots_R: the problem, constant. group_E, group_R: group of each expert and of each rank.
    alive_G: the group exists. target_G, load_G: sums over its ranks and its experts. experts_G: number of its experts.
    max_experts_G: number of experts that its slots can hold beside the links.
    """

    load_E: Ints
    target_R: Floats
    slots_R: Ints
    group_E: Ints
    group_R: Ints
    alive_G: Bools
    target_G: Floats
    max_experts_G: Ints
    experts_G: Ints
    load_G: Ints


@compiled
def clone(state: Partition) -> Partition:
    """A copy that can be changed without changing the original."""
    return Partition(
        state.load_E,
        state.target_R,
        state.slots_R,
        state.group_E.copy(),
        state.group_R.copy(),
        state.alive_G.copy(),
        state.target_G.copy(),
        state.max_experts_G.copy(),
        state.experts_G.copy(),
        state.load_G.copy(),
    )


@compiled
def slowest_group(state: Partition) -> tuple[int, float]:
    """The group with the largest time, and that time: the makespan."""
    group, makespan = -1, -1.0
    for other in range(len(state.load_G)):
        if state.alive_G[other] and state.load_G[other] / state.target_G[other] > makespan:
            group, makespan = other, state.load_G[other] / state.target_G[other]
    return group, makespan


@compiled
def move_expert(state: Partition, expert: int, group: int) -> None:
    """Move an expert to another group."""
    before = state.group_E[expert]
    state.experts_G[before] -= 1
    state.load_G[before] -= state.load_E[expert]
    state.group_E[expert] = group
    state.experts_G[group] += 1
    state.load_G[group] += state.load_E[expert]


@compiled
def move_rank(state: Partition, rank: int, group: int) -> None:
    """Move a rank to another group. The number of links stays the same."""
    before = state.group_R[rank]
    state.target_G[before] -= state.target_R[rank]
    state.max_experts_G[before] -= state.slots_R[rank] - 1
    state.group_R[rank] = group
    state.target_G[group] += state.target_R[rank]
    state.max_experts_G[group] += state.slots_R[rank] - 1


@compiled
def one_group_per_rank(load_E: Ints, target_R: Floats, slots_R: Ints) -> Partition:
    """One group per rank. Each expert, the heaviest first, goes to the rank with a free slot that would then finish
    first.
    """
    num_ranks = len(slots_R)
    state = Partition(
        load_E,
        target_R,
        slots_R,
        np.full(len(load_E), -1),
        np.arange(num_ranks),
        slots_R > 0,
        target_R.copy(),
        slots_R.copy(),
        np.zeros(num_ranks, np.int64),
        np.zeros(num_ranks, np.int64),
    )
    for expert in range(len(load_E)):
        best, best_makespan = -1, np.inf
        for rank in range(num_ranks):
            if state.experts_G[rank] < slots_R[rank]:
                makespan = (state.load_G[rank] + load_E[expert]) / target_R[rank]
                if makespan < best_makespan:
                    best, best_makespan = rank, makespan
        state.group_E[expert] = best
        state.experts_G[best] += 1
        state.load_G[best] += load_E[expert]
    return state
