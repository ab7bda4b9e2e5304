# pyright: reportArgumentType=false, reportReturnType=false
"""Copies of one layer's experts in slots: their index, and the first construction of a plan.

Two ranks that hold the same expert are *linked*: the token split can move load from one to the other. Each new copy
joins ranks that no chain of links joins yet. R - 1 links join all ranks into one component, for which P >= E + R - 1
slots are enough. Joined ranks can pass load on, whatever the load becomes later.

A *copy* is an expert in a slot. One copy is the expert's home, the others are its replicas. `expert_P` holds the
expert of each slot. `slots_of_ER` and `copies_E` are its index: the first `copies_E[e]` entries of row e are the slots
of expert e. Loads are integers, so that the order of sums does not matter.

Legend: E experts, R ranks, P slots, N nodes, V = R + E vertices (the ranks, then the experts).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from elastic_moe.plan.compiled import Bools, Floats, Ints, compiled

EMPTY = -1
_FIXED_WEIGHT = 0.7  # weight of the load of experts with several copies, when the experts with one copy are placed
_NODE_PENALTY = 0.1  # of a rank's mean load: added to the cost of a rank in a node that holds the expert already


class LayerPlan(NamedTuple):
    """The problem of one layer, and the index of the copies in the plan that is being made.

    load_E: load of each expert, never 0. target_R: the load that each rank's speed makes its own.
    start_R: [R + 1], first slot of each rank. rank_P: rank of each slot. node_R: node of each rank.
    round_robin_R: the ranks in an order that alternates between nodes.
    slots_of_ER, copies_E: the index; functions that place copies keep it up to date.
    """

    load_E: Ints
    target_R: Floats
    start_R: Ints
    rank_P: Ints
    node_R: Ints
    round_robin_R: Ints
    slots_of_ER: Ints
    copies_E: Ints


@compiled
def add_copy(expert: int, slot: int, expert_P: Ints, slots_of_ER: Ints, copies_E: Ints) -> None:
    """Put an expert into an empty slot."""
    expert_P[slot] = expert
    slots_of_ER[expert, copies_E[expert]] = slot
    copies_E[expert] += 1


@compiled
def drop_copy(slot: int, expert_P: Ints, slots_of_ER: Ints, copies_E: Ints) -> None:
    """Empty a slot; the order of the expert's other slots stays."""
    expert = expert_P[slot]
    last = copies_E[expert] - 1
    for index in range(last):
        if slots_of_ER[expert, index] == slot:
            for later in range(index, last):
                slots_of_ER[expert, later] = slots_of_ER[expert, later + 1]
            break
    copies_E[expert] = last
    expert_P[slot] = EMPTY


@compiled
def index_copies(expert_P: Ints, slots_of_ER: Ints, copies_E: Ints) -> None:
    """Build the index of `expert_P` from scratch."""
    copies_E[:] = 0
    for slot in range(len(expert_P)):
        if expert_P[slot] >= 0:
            add_copy(expert_P[slot], slot, expert_P, slots_of_ER, copies_E)


@compiled
def replication_weight(load_E: Ints) -> Floats:
    """load ** (7/8): the number of copies grows a little less than in proportion to load, so more experts have two.

    Computed by operations that round alike on all processors.
    """
    out = np.empty(len(load_E), np.float64)
    for expert in range(len(load_E)):
        load = np.float64(load_E[expert])
        out[expert] = load / np.sqrt(np.sqrt(np.sqrt(load)))
    return out


@compiled
def _find(parent_V: Ints, vertex: int) -> int:
    """Representative of a vertex's component (union-find with path halving)."""
    while parent_V[vertex] != vertex:
        parent_V[vertex] = parent_V[parent_V[vertex]]
        vertex = parent_V[vertex]
    return vertex


class _Filling(NamedTuple):
    """A plan in construction: its copies, each rank's free slots and load, and the components of linked ranks.

    time_R: time of a rank per unit of load, 1 / target. parent_V: union-find forest. holds_R, holds_N: ranks and nodes
    that hold the expert at hand.
    """

    start_R: Ints
    rank_P: Ints
    node_R: Ints
    time_R: Floats
    expert_P: Ints
    slots_of_ER: Ints
    copies_E: Ints
    free_R: Ints
    parent_V: Ints
    load_R: Floats
    holds_R: Bools
    holds_N: Bools


@compiled
def _choose_rank(state: _Filling, expert: int, load_per_copy: float, linking: bool) -> int:
    """The rank for the next copy of an expert, which adds load `load_per_copy` there; -1 if no rank has a free slot
    for it.

    With `linking`, ranks outside the expert's component come first, and nodes that hold the expert cost
    `_NODE_PENALTY`. Among the candidates, the rank with the least load for its speed is taken.
    """
    num_ranks = len(state.free_R)
    state.holds_R[:] = False
    state.holds_N[:] = False
    for index in range(state.copies_E[expert]):
        rank = state.rank_P[state.slots_of_ER[expert, index]]
        state.holds_R[rank] = True
        state.holds_N[state.node_R[rank]] = True
    mine = _find(state.parent_V, num_ranks + expert)
    free_R, load_R, time_R, holds_R = state.free_R, state.load_R, state.time_R, state.holds_R
    best, best_cost = -1, np.inf
    for turn in range(2):
        if turn == 1 and best >= 0:
            break
        for rank in range(num_ranks):
            cost = (load_R[rank] + load_per_copy) * time_R[rank]
            if cost >= best_cost or free_R[rank] <= 0 or holds_R[rank]:  # these tests are the cheap ones
                continue
            if turn == 0 and linking and _find(state.parent_V, rank) == mine:
                continue
            if linking and state.holds_N[state.node_R[rank]]:
                cost += _NODE_PENALTY
            if cost < best_cost:
                best, best_cost = rank, cost
        if not linking:
            break
    return best


@compiled
def _place_copy(state: _Filling, expert: int, load_per_copy: float, linking: bool) -> bool:
    """Place one more copy of an expert, which adds load `load_per_copy` to its rank. Returns False if no rank can take
    it.
    """
    rank = _choose_rank(state, expert, load_per_copy, linking)
    if rank < 0:
        return False
    slot = state.start_R[rank]
    while state.expert_P[slot] >= 0:
        slot += 1
    add_copy(expert, slot, state.expert_P, state.slots_of_ER, state.copies_E)
    state.free_R[rank] -= 1
    state.load_R[rank] += load_per_copy
    state.parent_V[_find(state.parent_V, len(state.free_R) + expert)] = _find(state.parent_V, rank)
    return True


@compiled
def _linking_order(load_E: Ints, wanted_E: Ints, copies_E: Ints, start_R: Ints, parent_V: Ints) -> Ints:
    """The order in which experts get their further copies, int64[E].

    First the hottest experts that suffice to link all ranks, in ascending order of load; then the others in descending
    order. The load of the linking expert bounds the load that two linked components can pass to one another. Larger
    components have more to pass. Components grow, so a later link should have a hotter expert. Against hottest first,
    this raised the balance on the next interval from 0.716 to 0.727 (256 experts, 64 ranks, 320 slots) and from 0.714
    to 0.728 (128, 64, 192), over twenty seeds.
    """
    num_ranks, missing = len(start_R) - 1, -1
    for rank in range(num_ranks):
        missing += start_R[rank + 1] > start_R[rank] and _find(parent_V, rank) == rank
    order = np.argsort(-load_E, kind="mergesort")
    chosen = 0
    while chosen < len(order) and missing > 0:
        missing -= wanted_E[order[chosen]] - max(copies_E[order[chosen]], 1)
        chosen += 1
    order[:chosen] = order[:chosen][::-1].copy()
    return order


@compiled
def construct(layer: LayerPlan, expert_P: Ints) -> None:
    """Fill the empty slots of `expert_P` and update the index, which must describe the copies that are there already.

    First the number of copies of each expert is chosen, then a rank for each copy, experts with several copies first.
    """
    load_E, target_R, start_R, rank_P, node_R, _, slots_of_ER, copies_E = layer
    num_experts, num_ranks = len(load_E), len(target_R)
    weight_E = replication_weight(load_E)
    free_R = np.zeros(num_ranks, np.int64)
    parent_V = np.arange(num_ranks + num_experts)
    holds_R, holds_N = np.zeros(num_ranks, np.bool_), np.zeros(num_ranks, np.bool_)
    empty = 0
    for slot in range(len(expert_P)):
        if expert_P[slot] < 0:
            free_R[rank_P[slot]] += 1
            empty += 1
        else:
            parent_V[_find(parent_V, num_ranks + expert_P[slot])] = _find(parent_V, rank_P[slot])
    # the number of copies of each expert
    wanted_E = copies_E.copy()
    for expert in range(num_experts):
        if wanted_E[expert] == 0:
            wanted_E[expert] = 1
            empty -= 1
    num_able = 0
    for rank in range(num_ranks):
        num_able += start_R[rank + 1] > start_R[rank]
    most = target_R.max()
    # first the copies without which the expert exceeds its ranks' targets
    for expert in np.argsort(-load_E, kind="mergesort"):
        while empty > 0 and wanted_E[expert] < num_able and load_E[expert] > most * wanted_E[expert]:
            wanted_E[expert] += 1
            empty -= 1
    # a scan per copy is as fast as a heap for a few hundred experts
    while empty > 0:
        best, best_worth = -1, -1.0
        for expert in range(num_experts):
            worth = weight_E[expert] / wanted_E[expert]
            if worth > best_worth and wanted_E[expert] < num_able:
                best, best_worth = expert, worth
        if best < 0:
            break
        wanted_E[best] += 1
        empty -= 1
    # the load of the copies that are there already
    load_R = np.zeros(num_ranks, np.float64)
    for slot in range(len(expert_P)):
        if expert_P[slot] >= 0:
            load_R[rank_P[slot]] += load_E[expert_P[slot]] / wanted_E[expert_P[slot]]
    time_R = 1 / np.maximum(target_R, 1e-300)
    state = _Filling(
        start_R, rank_P, node_R, time_R, expert_P, slots_of_ER, copies_E, free_R, parent_V, load_R, holds_R, holds_N
    )
    load_per_copy_E = load_E / wanted_E
    by_load_per_copy = np.argsort(-load_per_copy_E, kind="mergesort")
    for expert in _linking_order(load_E, wanted_E, copies_E, start_R, parent_V):
        while wanted_E[expert] > 1 and copies_E[expert] < wanted_E[expert]:
            if not _place_copy(state, expert, load_per_copy_E[expert], True):
                break
    load_R *= _FIXED_WEIGHT
    for expert in np.argsort(-load_E, kind="mergesort"):
        if copies_E[expert] == 0:
            _place_copy(state, expert, load_per_copy_E[expert], False)
    # an expert may have found no further rank: other experts take the slots that remain
    for expert in by_load_per_copy:
        while _place_copy(state, expert, 0.0, True):
            pass


@compiled
def keep_copies(resident_ER: Bools, load_E: Ints, home_E: Ints, start_R: Ints, expert_P: Ints) -> None:
    """Put each rank's homes into its slots, then as many of its resident experts as fit, the hottest first."""
    order = np.argsort(-load_E, kind="mergesort")
    for rank in range(len(start_R) - 1):
        slot = start_R[rank]
        for expert in range(len(home_E)):
            if home_E[expert] == rank:
                expert_P[slot] = expert
                slot += 1
        for expert in order:
            if resident_ER[expert, rank] and home_E[expert] != rank and slot < start_R[rank + 1]:
                expert_P[slot] = expert
                slot += 1


@compiled
def sort_slots(expert_LP: Ints, home_LE: Ints, start_R: Ints) -> None:
    """Sort each rank's slots: homes, then replicas, each by expert number, then empty slots."""
    num_experts = home_LE.shape[1]
    for layer in range(len(expert_LP)):
        for rank in range(len(start_R) - 1):
            begin, end = start_R[rank], start_R[rank + 1]
            key = np.empty(end - begin, np.int64)
            for index in range(end - begin):
                expert = expert_LP[layer, begin + index]
                key[index] = expert + num_experts if expert >= 0 and home_LE[layer, expert] != rank else expert
                if expert < 0:
                    key[index] = 2 * num_experts
            key.sort()
            for index in range(end - begin):
                expert_LP[layer, begin + index] = EMPTY if key[index] == 2 * num_experts else key[index] % num_experts
