# pyright: reportArgumentType=false, reportReturnType=false
"""Copies of a layer's experts in slots: the bookkeeping, and the first choice, as compiled loops.

Each new copy links ranks that no chain of shared experts links yet. Linked ranks can pass load on, whatever tomorrow's load is, and
R - 1 links make one component of all ranks; that is what P >= E + R - 1 slots are good for.

`expert_P` has the expert of each slot; `where` [E, R] and `copies_E` list each expert's slots. Loads are integers, so that the order of
sums does not matter. Shapes: E experts, R ranks, P slots.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.compiled import compiled
from elastic_moe.plan.split.max_flow import Floats, Ints

EMPTY = -1
_FIXED_WEIGHT = 0.7  # how much a rank's shares of replicated experts count when the others are placed
_NODE_WORTH = 0.1  # of a rank's mean load: what a copy in another node may cost


class Layer(NamedTuple):
    """What a layer's copies are chosen for, and the index of those that the plan in hand has.

    load_E: none is zero. target_R: the share of the load that each rank's speed makes its own. start_R [R + 1]: where each rank's slots begin.
    rank_P: rank of each slot. node_R: node of each rank. turn_R: the ranks in an order that alternates between nodes.
    """

    load_E: Ints
    target_R: Floats
    start_R: Ints
    rank_P: Ints
    node_R: Ints
    turn_R: Ints
    where: Ints
    copies_E: Ints


@compiled
def add_copy(expert: int, slot: int, expert_P: Ints, where: Ints, copies_E: Ints) -> None:
    expert_P[slot] = expert
    where[expert, copies_E[expert]] = slot
    copies_E[expert] += 1


@compiled
def drop_copy(slot: int, expert_P: Ints, where: Ints, copies_E: Ints) -> None:
    expert = expert_P[slot]
    last = copies_E[expert] - 1
    for index in range(last):
        if where[expert, index] == slot:
            for later in range(index, last):
                where[expert, later] = where[expert, later + 1]
            break
    copies_E[expert] = last
    expert_P[slot] = EMPTY


@compiled
def index_copies(expert_P: Ints, where: Ints, copies_E: Ints) -> None:
    copies_E[:] = 0
    for slot in range(len(expert_P)):
        if expert_P[slot] >= 0:
            add_copy(expert_P[slot], slot, expert_P, where, copies_E)


@compiled
def appetite(load_E: Ints) -> Floats:
    """w ** (7/8), by operations that round alike everywhere: hot experts get a little less than their share of copies."""
    out = np.empty(len(load_E), np.float64)
    for expert in range(len(load_E)):
        load = np.float64(load_E[expert])
        out[expert] = load / np.sqrt(np.sqrt(np.sqrt(load)))
    return out


@compiled
def _find(link: Ints, vertex: int) -> int:
    while link[vertex] != vertex:
        link[vertex] = link[link[vertex]]
        vertex = link[vertex]
    return vertex


class _Filling(NamedTuple):
    """What is in the slots, and what the ranks carry and are linked to (`link`: vertices are the ranks, then the experts)."""

    start_R: Ints
    rank_P: Ints
    node_R: Ints
    target_R: Floats
    expert_P: Ints
    where: Ints
    copies_E: Ints
    free_R: Ints
    link: Ints
    load_R: Floats
    has_R: NDArray[np.bool_]  # of the expert looked at
    has_N: NDArray[np.bool_]


@compiled
def _choose_rank(now: _Filling, expert: int, share: float, linking: bool) -> int:
    """The rank with the least load for its speed that a copy would link anew, else any; another node if that costs little; -1: none."""
    num_ranks = len(now.free_R)
    now.has_R[:] = False
    now.has_N[:] = False
    for index in range(now.copies_E[expert]):
        rank = now.rank_P[now.where[expert, index]]
        now.has_R[rank] = True
        now.has_N[now.node_R[rank]] = True
    mine = _find(now.link, num_ranks + expert)
    best, best_cost = -1, np.inf
    for turn in range(2):
        if turn == 1 and best >= 0:
            break
        for rank in range(num_ranks):
            if now.free_R[rank] <= 0 or now.has_R[rank]:
                continue
            if turn == 0 and linking and _find(now.link, rank) == mine:
                continue
            cost = (now.load_R[rank] + share) / now.target_R[rank]
            if linking and now.has_N[now.node_R[rank]]:
                cost += _NODE_WORTH
            if cost < best_cost:
                best, best_cost = rank, cost
        if not linking:
            break
    return best


@compiled
def _place(now: _Filling, expert: int, share: float, linking: bool) -> bool:
    """One more copy of an expert, which brings its rank this share of load. Whether there was a rank for it."""
    rank = _choose_rank(now, expert, share, linking)
    if rank < 0:
        return False
    slot = now.start_R[rank]
    while now.expert_P[slot] >= 0:
        slot += 1
    add_copy(expert, slot, now.expert_P, now.where, now.copies_E)
    now.free_R[rank] -= 1
    now.load_R[rank] += share
    now.link[_find(now.link, len(now.free_R) + expert)] = _find(now.link, rank)
    return True


@compiled
def _linking_order(load_E: Ints, wanted_E: Ints, copies_E: Ints, start_R: Ints, link: Ints) -> Ints:
    """In which order experts get their further copies: the hottest that suffice to link all ranks, the least of these first; then the rest.

    What two linked parts can pass to one another is bounded by the load of the expert that links them, and the larger the parts, the more
    there will be to pass. Parts grow, so the later a link is made, the hotter its expert should be.
    """
    num_ranks, missing = len(start_R) - 1, -1
    for rank in range(num_ranks):
        missing += start_R[rank + 1] > start_R[rank] and _find(link, rank) == rank
    order = np.argsort(-load_E, kind="mergesort")
    chosen = 0
    while chosen < len(order) and missing > 0:
        missing -= wanted_E[order[chosen]] - max(copies_E[order[chosen]], 1)
        chosen += 1
    order[:chosen] = order[:chosen][::-1].copy()
    return order


@compiled
def construct(layer: Layer, expert_P: Ints) -> None:
    """Fill the empty slots of `expert_P`; the index says what is there already, and is kept up to date."""
    load_E, target_R, start_R, rank_P, node_R, _, where, copies_E = layer
    num_experts, num_ranks = len(load_E), len(target_R)
    hunger_E = appetite(load_E)
    free_R = np.zeros(num_ranks, np.int64)
    link = np.arange(num_ranks + num_experts)
    has_R, has_N = np.zeros(num_ranks, np.bool_), np.zeros(num_ranks, np.bool_)
    empty = 0
    for slot in range(len(expert_P)):
        if expert_P[slot] < 0:
            free_R[rank_P[slot]] += 1
            empty += 1
        else:
            link[_find(link, num_ranks + expert_P[slot])] = _find(link, rank_P[slot])
    # how many copies each expert is to have
    wanted_E = copies_E.copy()
    for expert in range(num_experts):
        if wanted_E[expert] == 0:
            wanted_E[expert] = 1
            empty -= 1
    able_R = 0
    for rank in range(num_ranks):
        able_R += start_R[rank + 1] > start_R[rank]
    most = target_R.max()
    for expert in np.argsort(-load_E, kind="mergesort"):  # first what the load needs at least
        while empty > 0 and wanted_E[expert] < able_R and load_E[expert] > most * wanted_E[expert]:
            wanted_E[expert] += 1
            empty -= 1
    # a heap would do; a scan per copy is as fast for a few hundred experts
    while empty > 0:
        best, best_worth = -1, -1.0
        for expert in range(num_experts):
            worth = hunger_E[expert] / wanted_E[expert]
            if worth > best_worth and wanted_E[expert] < able_R:
                best, best_worth = expert, worth
        if best < 0:
            break
        wanted_E[best] += 1
        empty -= 1
    # what the ranks carry already
    load_R = np.zeros(num_ranks, np.float64)
    for slot in range(len(expert_P)):
        if expert_P[slot] >= 0:
            load_R[rank_P[slot]] += load_E[expert_P[slot]] / wanted_E[expert_P[slot]]
    now = _Filling(start_R, rank_P, node_R, target_R, expert_P, where, copies_E, free_R, link, load_R, has_R, has_N)
    share_E = load_E / wanted_E
    by_share = np.argsort(-share_E, kind="mergesort")
    for expert in _linking_order(load_E, wanted_E, copies_E, start_R, link):
        while wanted_E[expert] > 1 and copies_E[expert] < wanted_E[expert]:
            if not _place(now, expert, share_E[expert], True):
                break
    load_R *= _FIXED_WEIGHT
    for expert in np.argsort(-load_E, kind="mergesort"):
        if copies_E[expert] == 0:
            _place(now, expert, share_E[expert], False)
    # an expert may have found no further rank: others take what is left
    for expert in by_share:
        while _place(now, expert, 0.0, True):
            pass


@compiled
def keep_copies(has_ER: NDArray[np.bool_], load_E: Ints, home_E: Ints, start_R: Ints, expert_P: Ints) -> None:
    """Homes, then as many of the copies that are there already as fit, hot ones first, into the slots."""
    order = np.argsort(-load_E, kind="mergesort")
    for rank in range(len(start_R) - 1):
        slot = start_R[rank]
        for expert in range(len(home_E)):
            if home_E[expert] == rank:
                expert_P[slot] = expert
                slot += 1
        for expert in order:
            if has_ER[expert, rank] and home_E[expert] != rank and slot < start_R[rank + 1]:
                expert_P[slot] = expert
                slot += 1


@compiled
def sort_slots(expert_LP: Ints, home_LE: Ints, start_R: Ints) -> None:
    """Within each rank: homes first, then replicas, each by expert; empty slots last."""
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
