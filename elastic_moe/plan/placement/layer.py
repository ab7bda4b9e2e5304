# pyright: reportArgumentType=false, reportReturnType=false
"""The plan of one layer: what stays, what is added, and which of several ways is taken.

Shapes: E experts, R ranks, P slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.compiled import compiled
from elastic_moe.plan.placement.bin_packing import cut_pieces
from elastic_moe.plan.placement.homes import choose_homes, place_homeless, release_homes
from elastic_moe.plan.placement.local_search import TOLERANCE, mend
from elastic_moe.plan.placement.partition import group_copies, guess_least
from elastic_moe.plan.placement.replicas import EMPTY, Layer, construct, index_copies, keep_copies
from elastic_moe.plan.split.max_flow import Floats, Ints

WAYS = 3  # to choose copies, see `_fresh`
LINK, CUT, GROUP = range(WAYS)
FITS, GOOD = 1 + TOLERANCE, 1 + 1.5 * TOLERANCE
# With copies there already: a plan worse than this is worth more changes, and made anew where homes may move.
ENOUGH = 1 / 0.995
CROWDED_ENOUGH, CROWDED_POOR = 1 / 0.99, 1 / 0.98  # where ranks came or went: worth more changes; made anew


@compiled
def _relabel(has_ER: NDArray[np.bool_], target_R: Floats, start_R: Ints, expert_P: Ints) -> None:
    """Give each rank's contents to the equal rank that holds most of them already, greedily."""
    num_ranks = len(target_R)
    common = np.zeros((num_ranks, num_ranks), np.int64)
    for source in range(num_ranks):
        for slot in range(start_R[source], start_R[source + 1]):
            if expert_P[slot] >= 0:
                for rank in range(num_ranks):
                    common[source, rank] += has_ER[expert_P[slot], rank]
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
def _settle(layer: Layer, expert_P: Ints, home_E: Ints, home_moves: int) -> float:
    """Mend a plan; what cannot be made to fit at once, by less at a time, since changes towards a goal out of reach do harm. Returns the time."""
    changes = 2 * len(layer.target_R) + 16
    first_home, best_home, best_P = home_E.copy(), home_E.copy(), expert_P.copy()
    index_copies(expert_P, layer.where, layer.copies_E)
    z = mend(layer, expert_P, home_E, 0, 0, FITS)
    part = 1.0
    while z > GOOD and part > 0.04:
        goal = max(FITS, 1 + (z - 1) * (1 - part))
        left = home_moves - (best_home != first_home).sum()
        other_z = mend(layer, expert_P, home_E, changes, left, goal)
        if other_z < z:
            z = other_z
            best_P[:], best_home[:] = expert_P, home_E
        if other_z > goal + 1e-6:
            part /= 2
        expert_P[:], home_E[:] = best_P, best_home
        index_copies(expert_P, layer.where, layer.copies_E)
    return z


@compiled
def _fresh(layer: Layer, has_ER: NDArray[np.bool_], tight: bool, least: float, expert_P: Ints) -> float:
    """Copies without regard to the past: linked by load, of pieces cut to fit, or in groups of ranks; the best, and no more than it takes.

    Groups come first where slots are too few to link all ranks (`tight`), and last elsewhere. No plan is expected to take less time than `least`.
    """
    load_E, target_R, start_R, _, _, turn_R, where, copies_E = layer
    changes, free = 2 * len(target_R) + 16, 1 << 30
    nowhere, other_P = np.full(len(load_E), -1), np.empty(len(expert_P), np.int64)
    first = GROUP if tight else LINK
    z = np.inf
    for turn in range(WAYS):
        if z <= GOOD * least:
            break
        way, grouped_z = (first + turn) % WAYS, np.inf
        other_P[:] = EMPTY
        copies_E[:] = 0
        if way == CUT:
            cut_pieces(load_E, target_R, start_R, turn_R, has_ER, other_P, where, copies_E)
        elif way == GROUP:
            grouped_z = group_copies(layer, other_P, GOOD * least)
        construct(layer, other_P)
        left = 0 if way == GROUP else changes
        other_z = mend(layer, other_P, nowhere, left, free, FITS)
        if way == GROUP and other_z > max(GOOD, grouped_z + TOLERANCE):  # unequal ranks may not divide exactly
            other_z = _settle(layer, other_P, nowhere, free)
        if other_z < z:
            z = other_z
            expert_P[:] = other_P
    index_copies(expert_P, where, copies_E)
    return z


@compiled
def plan_layer(
    load_E: Ints,
    target_R: Floats,
    start_R: Ints,
    rank_P: Ints,
    node_R: Ints,
    turn_R: Ints,
    cap_R: Ints,
    has_ER: NDArray[np.bool_],
    expert_P: Ints,
    home_E: Ints,
    crowded: bool,
    home_moves: int,
) -> float:
    """One layer. Returns the time of the slowest rank on this load; 1 is the mean.

    Args:
        load_E: loads, none of them zero.
        target_R: the share of the load that each rank's speed makes its own.
        start_R: [R + 1], where each rank's slots begin.
        rank_P: rank of each slot.
        node_R: node of each rank.
        turn_R: the ranks in an order that alternates between nodes.
        cap_R: homes that a rank should have at most.
        has_ER: copies that are there already.
        expert_P: the result, expert of each slot.
        home_E: homes that are to stay, -1 for none; completed.
        crowded: ranks give up homes beyond their cap.
        home_moves: homes that may move for the load's sake.
    """
    num_experts, num_ranks = len(load_E), len(target_R)
    where = np.empty((num_experts, num_ranks), np.int64)
    copies_E = np.empty(num_experts, np.int64)
    layer = Layer(load_E, target_R, start_R, rank_P, node_R, turn_R, where, copies_E)
    expert_P[:] = EMPTY
    slots_R = start_R[1:] - start_R[:-1]
    tight, least = len(expert_P) < num_experts + (slots_R > 0).sum() - 1, 1.0
    if tight:
        least = guess_least(-np.sort(-load_E), target_R, slots_R)
    if not (home_E >= 0).any():
        z = _fresh(layer, has_ER, tight, least, expert_P)
        if has_ER.any():
            _relabel(has_ER, target_R, start_R, expert_P)
            index_copies(expert_P, where, copies_E)
        choose_homes(cap_R, rank_P, where, copies_E, home_E)
        return z
    enough = least * (CROWDED_ENOUGH if crowded else ENOUGH)
    poor = least * (CROWDED_POOR if crowded else ENOUGH)
    if crowded:
        release_homes(load_E, target_R, cap_R, slots_R, has_ER, home_E)
    stay_E = home_E.copy()
    place_homeless(load_E, target_R, cap_R, slots_R, home_E)
    keep_copies(has_ER, load_E, home_E, start_R, expert_P)
    index_copies(expert_P, where, copies_E)
    construct(layer, expert_P)
    changes = 2 * num_ranks + 16
    z = mend(layer, expert_P, home_E, changes, 0, FITS)
    other_P, other_home = np.full(len(expert_P), EMPTY), stay_E.copy()
    if z > enough:  # keep the homes that stay, and nothing else
        keep_copies(np.zeros_like(has_ER), load_E, stay_E, start_R, other_P)
        index_copies(other_P, where, copies_E)
        cut_pieces(load_E, target_R, start_R, turn_R, has_ER, other_P, where, copies_E)
        construct(layer, other_P)
        other_z = mend(layer, other_P, other_home, changes, 0, FITS)
        if other_z < z:
            z = other_z
            choose_homes(cap_R, rank_P, where, copies_E, other_home)
            expert_P[:], home_E[:] = other_P, other_home
    if z > enough and home_moves > 0:
        other_P[:], other_home[:] = expert_P, home_E
        other_z = _settle(layer, other_P, other_home, home_moves)
        if other_z < z:
            z = other_z
            expert_P[:], home_E[:] = other_P, other_home
    if z > poor and home_moves >= num_experts:
        other_P[:] = EMPTY
        other_z = _fresh(layer, has_ER, tight, least, other_P)
        if other_z < z:
            z = other_z
            _relabel(has_ER, target_R, start_R, other_P)
            expert_P[:] = other_P
            index_copies(expert_P, where, copies_E)
            for expert in range(num_experts):
                kept = False
                for index in range(copies_E[expert]):
                    kept |= rank_P[where[expert, index]] == home_E[expert]
                if not kept:
                    home_E[expert] = -1
            choose_homes(cap_R, rank_P, where, copies_E, home_E)
    return z
