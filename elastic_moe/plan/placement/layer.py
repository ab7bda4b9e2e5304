# pyright: reportArgumentType=false, reportReturnType=false
"""The plan of one layer: which copies stay, which are added, and which of several methods is taken.

Legend: E experts, R ranks, P slots. Makespan is the time of the slowest rank with an optimal token split; 1 is the
mean.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.plan.compiled import Bools, Floats, Ints, compiled
from elastic_moe.plan.placement.bin_packing import pack_splittable
from elastic_moe.plan.placement.estimate import estimate_least_time
from elastic_moe.plan.placement.homes import choose_homes, place_homeless, release_homes
from elastic_moe.plan.placement.local_search import TOLERANCE, improve, improve_or_keep
from elastic_moe.plan.placement.partition import fill_by_partition
from elastic_moe.plan.placement.replicas import EMPTY, LayerPlan, construct, index_copies, keep_copies

NUM_METHODS = 3  # of choosing copies, see `_from_scratch`
BY_LINKS, BY_PACKING, BY_PARTITION = range(NUM_METHODS)
FITS, GOOD = 1 + TOLERANCE, 1 + 1.5 * TOLERANCE  # makespans: the goal of the local search; the end of all search
# Above this makespan, extra changes are allowed; if homes may move, the layer is planned from scratch.
GOOD_ENOUGH = 1 / 0.995
CHANGED_GOOD_ENOUGH, CHANGED_TOO_POOR = 1 / 0.99, 1 / 0.98  # the same two limits after a change of membership


@compiled
def _relabel(resident_ER: Bools, target_R: Floats, start_R: Ints, expert_P: Ints) -> None:
    """Permute equal ranks so that each gets the contents most of which it holds already; greedy."""
    num_ranks = len(target_R)
    common = np.zeros((num_ranks, num_ranks), np.int64)
    for source in range(num_ranks):
        for slot in range(start_R[source], start_R[source + 1]):
            if expert_P[slot] >= 0:
                for rank in range(num_ranks):
                    common[source, rank] += resident_ER[expert_P[slot], rank]
    old_P = expert_P.copy()
    given, taken = np.zeros(num_ranks, np.bool_), np.zeros(num_ranks, np.bool_)
    for _ in range(num_ranks):
        best_s, best_r, most = -1, -1, -1
        for source in range(num_ranks):
            if given[source]:
                continue
            slots = start_R[source + 1] - start_R[source]
            for rank in range(num_ranks):
                if taken[rank] or common[source, rank] <= most:
                    continue
                if start_R[rank + 1] - start_R[rank] == slots and target_R[rank] == target_R[source]:
                    best_s, best_r, most = source, rank, common[source, rank]
        given[best_s], taken[best_r] = True, True
        for offset in range(start_R[best_s + 1] - start_R[best_s]):
            expert_P[start_R[best_r] + offset] = old_P[start_R[best_s] + offset]


@compiled
def _improve_in_steps(layer: LayerPlan, expert_P: Ints, home_E: Ints, home_moves: int) -> float:
    """Improve a plan towards goals that come nearer in steps, since changes towards a goal out of reach do harm.

    Moves at most `home_moves` homes. Returns the makespan; the best plan found is left in `expert_P` and `home_E`.
    """
    changes = 2 * len(layer.target_R) + 16
    first_home, best_home, best_P = home_E.copy(), home_E.copy(), expert_P.copy()
    index_copies(expert_P, layer.slots_of_ER, layer.copies_E)
    makespan = improve(layer, expert_P, home_E, 0, 0, FITS)
    part = 1.0
    while makespan > GOOD and part > 0.04:
        goal = max(FITS, 1 + (makespan - 1) * (1 - part))
        moves_left = home_moves - (best_home != first_home).sum()
        other_makespan = improve(layer, expert_P, home_E, changes, moves_left, goal)
        if other_makespan < makespan:
            makespan = other_makespan
            best_P[:], best_home[:] = expert_P, home_E
        if other_makespan > goal + 1e-6:
            part /= 2
        expert_P[:], home_E[:] = best_P, best_home
        index_copies(expert_P, layer.slots_of_ER, layer.copies_E)
    return makespan


@compiled
def _from_scratch(layer: LayerPlan, resident_ER: Bools, few_slots: bool, least_time: float, expert_P: Ints) -> float:
    """Choose all copies without regard to earlier ones, by up to three methods; the best result is left in `expert_P`.

    The methods: construction by links (`replicas.py`), splittable packing (`bin_packing.py`) and partition
    (`partition.py`). The partition comes first if the slots are too few to link all ranks (`few_slots`), else last. A
    method is tried only while the best makespan is above `GOOD` times `least_time`, the least that is expected to be
    possible. Returns the makespan.
    """
    load_E, target_R, start_R, _, _, round_robin_R, slots_of_ER, copies_E = layer
    changes, free = 2 * len(target_R) + 16, 1 << 30
    unpinned_E, other_P = np.full(len(load_E), -1), np.empty(len(expert_P), np.int64)
    first = BY_PARTITION if few_slots else BY_LINKS
    makespan = np.inf
    for turn in range(NUM_METHODS):
        if makespan <= GOOD * least_time:
            break
        method, partition_makespan = (first + turn) % NUM_METHODS, np.inf
        other_P[:] = EMPTY
        copies_E[:] = 0
        if method == BY_PACKING:
            pack_splittable(load_E, target_R, start_R, round_robin_R, resident_ER, other_P, slots_of_ER, copies_E)
        elif method == BY_PARTITION:
            partition_makespan = fill_by_partition(layer, other_P, GOOD * least_time)
        construct(layer, other_P)
        max_changes = 0 if method == BY_PARTITION else changes
        other_makespan = improve_or_keep(layer, other_P, unpinned_E, max_changes, free, FITS)
        # unequal ranks may not divide their load exactly
        if method == BY_PARTITION and other_makespan > max(GOOD, partition_makespan + TOLERANCE):
            other_makespan = _improve_in_steps(layer, other_P, unpinned_E, free)
        if other_makespan < makespan:
            makespan = other_makespan
            expert_P[:] = other_P
    index_copies(expert_P, slots_of_ER, copies_E)
    return makespan


@compiled
def plan_layer(  # noqa: PLR0913 - compiled code sees plain arrays
    load_E: Ints,
    target_R: Floats,
    start_R: Ints,
    rank_P: Ints,
    node_R: Ints,
    round_robin_R: Ints,
    max_homes_R: Ints,
    resident_ER: Bools,
    expert_P: Ints,
    home_E: Ints,
    membership_changed: bool,
    home_moves: int,
) -> float:
    """Plan one layer. Returns the makespan on this load.

    Earlier copies are kept in order of price: first everything; then the homes alone; then all homes but `home_moves`.
    If homes may move freely and the result is still poor, the layer is planned from scratch and ranks are relabelled.

    Args:
        load_E: load of each expert, never 0.
        target_R: the load that each rank's speed makes its own.
        start_R: [R + 1], first slot of each rank.
        rank_P: rank of each slot.
        node_R: node of each rank.
        round_robin_R: the ranks in an order that alternates between nodes.
        max_homes_R: number of homes that a rank should have at most.
        resident_ER: the rank holds the expert's weights now.
        expert_P: the result: expert of each slot; filled in.
        home_E: home of each expert that is to stay, -1 for none; filled in.
        membership_changed: ranks release homes beyond `max_homes_R`.
        home_moves: number of homes that may move to balance the load.
    """
    num_experts, num_ranks = len(load_E), len(target_R)
    slots_of_ER = np.empty((num_experts, num_ranks), np.int64)
    copies_E = np.empty(num_experts, np.int64)
    layer = LayerPlan(load_E, target_R, start_R, rank_P, node_R, round_robin_R, slots_of_ER, copies_E)
    expert_P[:] = EMPTY
    slots_R = start_R[1:] - start_R[:-1]
    few_slots, least_time = len(expert_P) < num_experts + (slots_R > 0).sum() - 1, 1.0
    if few_slots:
        least_time = estimate_least_time(-np.sort(-load_E), target_R, slots_R)
    if not (home_E >= 0).any():
        makespan = _from_scratch(layer, resident_ER, few_slots, least_time, expert_P)
        if resident_ER.any():
            _relabel(resident_ER, target_R, start_R, expert_P)
            index_copies(expert_P, slots_of_ER, copies_E)
        choose_homes(max_homes_R, rank_P, slots_of_ER, copies_E, home_E)
        return makespan
    enough = least_time * (CHANGED_GOOD_ENOUGH if membership_changed else GOOD_ENOUGH)
    poor = least_time * (CHANGED_TOO_POOR if membership_changed else GOOD_ENOUGH)
    if membership_changed:
        release_homes(load_E, target_R, max_homes_R, slots_R, resident_ER, home_E)
    stay_E = home_E.copy()
    place_homeless(load_E, target_R, max_homes_R, slots_R, home_E)
    keep_copies(resident_ER, load_E, home_E, start_R, expert_P)
    index_copies(expert_P, slots_of_ER, copies_E)
    construct(layer, expert_P)
    changes = 2 * num_ranks + 16
    makespan = improve_or_keep(layer, expert_P, home_E, changes, 0, FITS)
    other_P, other_home = np.full(len(expert_P), EMPTY), stay_E.copy()
    if makespan > enough:  # keep the homes, and choose all replicas anew
        keep_copies(np.zeros_like(resident_ER), load_E, stay_E, start_R, other_P)
        index_copies(other_P, slots_of_ER, copies_E)
        pack_splittable(load_E, target_R, start_R, round_robin_R, resident_ER, other_P, slots_of_ER, copies_E)
        construct(layer, other_P)
        other_makespan = improve_or_keep(layer, other_P, other_home, changes, 0, FITS)
        if other_makespan < makespan:
            makespan = other_makespan
            choose_homes(max_homes_R, rank_P, slots_of_ER, copies_E, other_home)
            expert_P[:], home_E[:] = other_P, other_home
    if makespan > enough and home_moves > 0:
        other_P[:], other_home[:] = expert_P, home_E
        other_makespan = _improve_in_steps(layer, other_P, other_home, home_moves)
        if other_makespan < makespan:
            makespan = other_makespan
            expert_P[:], home_E[:] = other_P, other_home
    if makespan > poor and home_moves >= num_experts:
        other_P[:] = EMPTY
        other_makespan = _from_scratch(layer, resident_ER, few_slots, least_time, other_P)
        if other_makespan < makespan:
            makespan = other_makespan
            _relabel(resident_ER, target_R, start_R, other_P)
            expert_P[:] = other_P
            index_copies(expert_P, slots_of_ER, copies_E)
            for expert in range(num_experts):
                kept = False
                for index in range(copies_E[expert]):
                    kept |= rank_P[slots_of_ER[expert, index]] == home_E[expert]
                if not kept:
                    home_E[expert] = -1
            choose_homes(max_homes_R, rank_P, slots_of_ER, copies_E, home_E)
    return makespan
