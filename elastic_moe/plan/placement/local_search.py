# pyright: reportArgumentType=false, reportReturnType=false
"""Local search: change copies where the present load does not fit.

It computes the maximum flow of the load through the copies, as the token split does. If a cut blocks the flow, one
copy is added across the cut, or two experts are swapped across it. If no change helps, the time limit rises to the
need of the cut.

Legend: E experts, R ranks, P slots. `flow_P` is the load that a slot takes, `unplaced_E` the load of an expert that no
slot takes yet, `slack_R` the load that a rank can still take within the time limit. The *inside* of the cut are the
experts and ranks that the search reaches from an expert with unplaced load. Makespan is the time of the slowest rank;
1 is the mean.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from elastic_moe.plan.compiled import Bools, Ints, compiled
from elastic_moe.plan.placement.replicas import LayerPlan, add_copy, drop_copy, index_copies

TOLERANCE = 1 / 512  # of the mean: a plan this close to the bound is not changed any more


class _Search(NamedTuple):
    """The copies, the flow of the load through them, and the state of the search for an augmenting path.

    home_E pins a copy to a rank; -1: not pinned. seen_E, seen_R: inside the cut. slot_into_R: the slot by which a rank
    was reached. slot_out_E: the slot from which an expert was reached, -1 at the start. bottleneck_E: load that can be
    passed on to the expert.
    """

    load_E: Ints
    start_R: Ints
    rank_P: Ints
    expert_P: Ints
    slots_of_ER: Ints
    copies_E: Ints
    home_E: Ints
    flow_P: Ints
    unplaced_E: Ints
    slack_R: Ints
    seen_E: Bools
    seen_R: Bools
    slot_into_R: Ints
    slot_out_E: Ints
    bottleneck_E: Ints


@compiled
def _augment(state: _Search, start: int, goal: int) -> None:
    """Send as much unplaced load of expert `start` as fits along the path that was found to rank `goal`."""
    amount = min(state.unplaced_E[start], state.slack_R[goal])
    rank = goal
    while True:
        gives = state.slot_out_E[state.expert_P[state.slot_into_R[rank]]]
        if gives < 0:
            break
        amount = min(amount, state.flow_P[gives])
        rank = state.rank_P[gives]
    state.slack_R[goal] -= amount
    state.unplaced_E[start] -= amount
    rank = goal
    while True:
        state.flow_P[state.slot_into_R[rank]] += amount
        gives = state.slot_out_E[state.expert_P[state.slot_into_R[rank]]]
        if gives < 0:
            break
        state.flow_P[gives] -= amount
        rank = state.rank_P[gives]


@compiled
def _add_copy_across(state: _Search, min_gain: int) -> bool:
    """Place one copy of an expert inside the cut on a rank outside, in the slot with the largest gain.

    Returns False if no slot gains more than `min_gain`. A slot's gain is the load that it would take, less the load it
    takes now.
    """
    best_slot, best_gain = -1, np.int64(min_gain)
    most = np.int64(0)
    for expert in range(len(state.load_E)):
        if state.seen_E[expert]:
            most = max(most, state.bottleneck_E[expert])
    for rank in range(len(state.slack_R)):
        if state.seen_R[rank] or state.slack_R[rank] <= min_gain:
            continue
        for slot in range(state.start_R[rank], state.start_R[rank + 1]):
            expert = state.expert_P[slot]
            lost = np.int64(0)
            if expert >= 0:
                if state.copies_E[expert] == 1 or state.home_E[expert] == rank:
                    continue
                lost = state.flow_P[slot]
            gain = min(most, state.slack_R[rank] + lost) - lost
            if gain > best_gain:
                best_slot, best_gain = slot, gain
    if best_slot < 0:
        return False
    rank = state.rank_P[best_slot]
    dropped = state.expert_P[best_slot]
    space = state.slack_R[rank] + state.flow_P[best_slot]
    best, best_flow = -1, np.int64(0)
    for expert in range(len(state.load_E)):
        if state.seen_E[expert] and expert != dropped:
            flow = min(state.bottleneck_E[expert], space)
            if flow > best_flow or (flow == best_flow and best >= 0 and state.load_E[expert] > state.load_E[best]):
                best, best_flow = expert, flow
    if best < 0 or best_flow <= min_gain:
        return False
    if dropped >= 0:
        state.unplaced_E[dropped] += state.flow_P[best_slot]
        state.slack_R[rank] += state.flow_P[best_slot]
        state.flow_P[best_slot] = 0
        drop_copy(best_slot, state.expert_P, state.slots_of_ER, state.copies_E)
    add_copy(best, best_slot, state.expert_P, state.slots_of_ER, state.copies_E)
    return True


@compiled
def _swap_across(state: _Search, min_gain: int, home_moves: int) -> int:
    """Swap a copy inside the cut with the only copy of a colder expert outside, for the pair with the largest gain.

    Returns the number of homes moved, at most `home_moves`; -1 if no pair gains more than `min_gain`.
    """
    best_in, best_out, best_gain = -1, -1, np.int64(min_gain)
    for outside in range(len(state.expert_P)):
        rank, cold = state.rank_P[outside], state.expert_P[outside]
        if state.seen_R[rank] or state.slack_R[rank] <= best_gain or cold < 0 or state.copies_E[cold] != 1:
            continue
        pinned = 1 if state.home_E[cold] >= 0 else 0
        if pinned > home_moves:
            continue
        for inside in range(len(state.expert_P)):
            hot = state.expert_P[inside]
            if hot < 0 or not state.seen_R[state.rank_P[inside]] or not state.seen_E[hot]:
                continue
            if pinned + (1 if state.home_E[hot] == state.rank_P[inside] else 0) > home_moves:
                continue
            gain = state.load_E[hot] - state.load_E[cold]
            if gain > state.slack_R[rank]:
                # an expert with one copy brings all its load, also the part beyond the slack
                gain = state.slack_R[rank] if state.copies_E[hot] > 1 else 2 * state.slack_R[rank] - gain
            if gain > best_gain or (
                best_in >= 0 and gain == best_gain and state.load_E[hot] > state.load_E[state.expert_P[best_in]]
            ):
                best_in, best_out, best_gain = inside, outside, gain
    if best_in < 0:
        return -1
    hot, cold = state.expert_P[best_in], state.expert_P[best_out]
    moved = 0
    for slot in (best_in, best_out):
        expert, rank = state.expert_P[slot], state.rank_P[slot]
        if state.home_E[expert] == rank:
            state.home_E[expert] = state.rank_P[best_out] if slot == best_in else state.rank_P[best_in]
            moved += 1
        state.unplaced_E[expert] += state.flow_P[slot]
        state.slack_R[rank] += state.flow_P[slot]
        state.flow_P[slot] = 0
    state.expert_P[best_in], state.expert_P[best_out] = cold, hot
    state.slots_of_ER[cold, 0] = best_in
    for index in range(state.copies_E[hot]):
        if state.slots_of_ER[hot, index] == best_in:
            state.slots_of_ER[hot, index] = best_out
    return moved


@compiled
def improve(layer: LayerPlan, expert_P: Ints, home_E: Ints, changes: int, home_moves: int, goal: float) -> float:
    """Change copies until the load fits into a makespan of `goal`, no change helps, or `changes` are used up.

    Args:
        layer: the problem, and the index of `expert_P`; the index is updated.
        expert_P: expert of each slot; changed.
        home_E: rank to which a copy of the expert is pinned, -1 for none; changed where homes move.
        changes: number of changes allowed.
        home_moves: number of pinned copies that may move.
        goal: makespan at which the search begins.

    Returns:
        The makespan reached.
    """
    load_E, target_R, start_R, rank_P, _, _, slots_of_ER, copies_E = layer
    num_experts, num_ranks, num_slots = len(load_E), len(target_R), len(expert_P)
    makespan = goal
    flow_P = np.zeros(num_slots, np.int64)
    unplaced_E = load_E.copy()
    slack_R = np.empty(num_ranks, np.int64)
    for rank in range(num_ranks):
        slack_R[rank] = np.int64(target_R[rank] * makespan)
    for limit in (1, 2, 3, num_ranks):
        for expert in range(num_experts):
            if copies_E[expert] > limit:
                continue
            while unplaced_E[expert] > 0:
                best = -1
                for index in range(copies_E[expert]):
                    slot = slots_of_ER[expert, index]
                    if slack_R[rank_P[slot]] > 0 and (best < 0 or slack_R[rank_P[slot]] > slack_R[rank_P[best]]):
                        best = slot
                if best < 0:
                    break
                amount = min(unplaced_E[expert], slack_R[rank_P[best]])
                flow_P[best] += amount
                unplaced_E[expert] -= amount
                slack_R[rank_P[best]] -= amount
    seen_E, seen_R = np.empty(num_experts, np.bool_), np.empty(num_ranks, np.bool_)
    slot_into_R, slot_out_E, bottleneck_E = (
        np.empty(num_ranks, np.int64),
        np.empty(num_experts, np.int64),
        np.empty(num_experts, np.int64),
    )
    state = _Search(
        load_E,
        start_R,
        rank_P,
        expert_P,
        slots_of_ER,
        copies_E,
        home_E,
        flow_P,
        unplaced_E,
        slack_R,
        seen_E,
        seen_R,
        slot_into_R,
        slot_out_E,
        bottleneck_E,
    )
    queue = np.empty(num_experts, np.int64)
    min_gain = np.int64(target_R.max() / 8192)
    start, idle = 0, 0
    while idle < num_experts:  # a copy that was dropped may have left load unplaced
        if unplaced_E[start] <= 0:
            start, idle = (start + 1) % num_experts, idle + 1
            continue
        idle = 0
        seen_E[:] = False
        seen_R[:] = False
        seen_E[start], slot_out_E[start], bottleneck_E[start], queue[0] = True, -1, unplaced_E[start], start
        head, tail, end = 0, 1, -1
        while head < tail and end < 0:
            expert = queue[head]
            head += 1
            for index in range(copies_E[expert]):
                slot = slots_of_ER[expert, index]
                rank = rank_P[slot]
                if seen_R[rank]:
                    continue
                seen_R[rank], slot_into_R[rank] = True, slot
                if slack_R[rank] > 0:
                    end = rank
                    break
                for other in range(start_R[rank], start_R[rank + 1]):
                    found = expert_P[other]
                    if found >= 0 and flow_P[other] > 0 and not seen_E[found]:
                        seen_E[found], slot_out_E[found], queue[tail] = True, other, found
                        bottleneck_E[found] = min(bottleneck_E[expert], flow_P[other])
                        tail += 1
        if end >= 0:
            _augment(state, start, end)
            continue
        if changes > 0:
            done = _add_copy_across(state, min_gain)
            if not done:
                moved = _swap_across(state, min_gain, home_moves)
                if moved >= 0:
                    done = True
                    home_moves -= moved
            if done:
                changes -= 1
                continue
        need, speed = np.int64(0), 0.0
        for expert in range(num_experts):
            if seen_E[expert]:
                need += unplaced_E[expert]
        for rank in range(num_ranks):
            if seen_R[rank]:
                speed += target_R[rank]
        rise = need / speed + 1e-9
        makespan += rise
        for rank in range(num_ranks):
            slack_R[rank] += np.int64(target_R[rank] * rise) + (1 if target_R[rank] > 1.0 else 0)
    return makespan


@compiled
def improve_or_keep(
    layer: LayerPlan, expert_P: Ints, home_E: Ints, changes: int, home_moves: int, goal: float
) -> float:
    """Like `improve`, but the copies and homes stay as they were if the changes made the makespan worse.

    The search is greedy: in about one of 10,000 small problems, changes towards a goal out of reach do harm.
    """
    first_P, first_home = expert_P.copy(), home_E.copy()
    makespan = improve(layer, expert_P, home_E, changes, home_moves, goal)
    if changes == 0 or makespan <= goal + 1e-6:
        return makespan
    changed_P, changed_home = expert_P.copy(), home_E.copy()
    expert_P[:], home_E[:] = first_P, first_home
    index_copies(expert_P, layer.slots_of_ER, layer.copies_E)
    first_makespan = improve(layer, expert_P, home_E, 0, 0, goal)
    if first_makespan <= makespan:
        return first_makespan
    expert_P[:], home_E[:] = changed_P, changed_home
    index_copies(expert_P, layer.slots_of_ER, layer.copies_E)
    return makespan
