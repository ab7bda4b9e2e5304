# pyright: reportArgumentType=false, reportReturnType=false
"""Exact token split of one MoE layer over the copies of its experts: the smallest possible time of the slowest rank.

min z  such that  sum over ranks x[e, r] = w[e],  sum over experts x[e, r] <= z * speed[r]   (integers, x only where r has e).

For a fixed z this is a maximum flow. z starts at a lower bound; tokens go to their own rank where they fit, the rest along
augmenting paths; when none exists, the ranks reached from the stuck expert are a minimum cut, and z rises to what that set of
ranks needs (discrete Newton: few rises, and the flow found so far stays valid). See section 3 of the balance reference and
Dinkelbach (1967). Among the optimal splits, the one that sends the fewest tokens to other nodes is taken, and among those the one
that sends the fewest to other ranks (a minimum-cost flow). Only experts with several copies take part, about one per spare slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.compiled import compiled
from elastic_moe.plan.split.max_flow import (
    Floats,
    Ints,
    arcs_by_rank,
    balance_quota,
    first_caps,
    near_first,
    shorten_ways,
)
from elastic_moe.plan.values import Placement


@dataclass(frozen=True, slots=True, eq=False)
class RankSplit:
    """A layer's split as one rank needs it: nothing in it grows with ranks times slots.

    Attributes:
        sent_P: int64[P], tokens from this rank to each slot.
        here_RS: int64[R, S], tokens from each rank to this rank's slots.
        tokens_P: int64[P], tokens of each slot.
        far: tokens that leave their node.
        rows_RR: int64[R, R], tokens from each rank to each other; None where only this rank's are known.
    """

    sent_P: NDArray[np.int64]
    here_RS: NDArray[np.int64]
    tokens_P: NDArray[np.int64]
    far: int
    rows_RR: NDArray[np.int64] | None = None


def split_tokens(
    counts: NDArray[np.integer], placement: Placement, layer: int, speeds: Sequence[float] | None = None
) -> NDArray[np.int64]:
    """Tokens from source rank r to slot p, int64[R, P]. Every rank computes the same from the same counts.

    Args:
        counts: [R, E], tokens of each source rank routed to each expert.
        placement: where the copies are, and on which nodes the ranks.
        layer: index among the MoE layers.
        speeds: relative speed per rank; None for equal ones. A rank of speed 0 gets only what no other can take.
    """
    counts_RE = np.ascontiguousarray(counts, dtype=np.int64)
    num_ranks = len(counts_RE)
    out_RP = np.zeros((num_ranks, len(placement.rank_of_slot)), dtype=np.int64)
    none = np.zeros((num_ranks, 0), dtype=np.int64)
    _solve(counts_RE, placement, layer, speeds, -1, out_RP, none)
    return out_RP


def split_for_rank(
    counts: NDArray[np.integer],
    placement: Placement,
    layer: int,
    rank: int,
    speeds: Sequence[float] | None = None,
) -> RankSplit:
    """What `split_tokens` says about one rank, without the matrix of all ranks and slots."""
    counts_RE = np.ascontiguousarray(counts, dtype=np.int64)
    span = placement.slots_of(rank)
    sent_1P = np.zeros((1, len(placement.rank_of_slot)), dtype=np.int64)
    here_RS = np.zeros((len(counts_RE), span.stop - span.start), dtype=np.int64)
    tokens_P, far = _solve(counts_RE, placement, layer, speeds, rank, sent_1P, here_RS)
    return RankSplit(sent_1P[0], here_RS, tokens_P, far)


def of_rank(split_RP: NDArray[np.int64], placement: Placement, rank: int) -> RankSplit:
    """One rank's part of a whole split, with the tokens between all ranks."""
    bounds = np.searchsorted(placement.rank_of_slot, np.arange(len(split_RP) + 1))
    until = np.concatenate([np.zeros((len(split_RP), 1), dtype=np.int64), np.cumsum(split_RP, axis=1)], axis=1)
    rows_RR = np.diff(until[:, bounds], axis=1)
    node_R = placement.node_of_rank
    far = 0 if node_R is None else int(rows_RR[node_R[:, None] != node_R[None, :]].sum())
    return RankSplit(split_RP[rank], split_RP[:, placement.slots_of(rank)], split_RP.sum(axis=0), far, rows_RR)


def _solve(
    counts_RE: NDArray[np.int64],
    placement: Placement,
    layer: int,
    speeds: Sequence[float] | None,
    rank: int,
    out_RP: NDArray[np.int64],
    here_RS: NDArray[np.int64],
) -> tuple[NDArray[np.int64], int]:
    num_ranks = len(counts_RE)
    expert_P = np.ascontiguousarray(placement.expert_of_slot[layer], dtype=np.int64)
    rank_P = np.ascontiguousarray(placement.rank_of_slot, dtype=np.int64)
    node_R = np.zeros(num_ranks, dtype=np.int64)
    if placement.node_of_rank is not None:
        node_R[:] = placement.node_of_rank
    tokens_P = np.zeros(len(rank_P), dtype=np.int64)
    speed_R = np.array(_safe_speeds(speeds, num_ranks))
    far = _split(counts_RE, expert_P, rank_P, node_R, speed_R, rank, out_RP, here_RS, tokens_P)
    assert far >= 0, "tokens for an expert without a copy"
    return tokens_P, far


@compiled
def _split(
    counts_RE: Ints,
    expert_P: Ints,
    rank_P: Ints,
    node_R: Ints,
    speeds: Floats,
    only: int,
    out_RP: Ints,
    here_RS: Ints,
    tokens_P: Ints,
) -> int:
    """Solve, and write what every rank (`only` < 0) or one rank sends and receives. Returns the tokens that leave their node."""
    num_ranks, num_experts = counts_RE.shape
    num_slots = len(expert_P)
    total_E = np.zeros(num_experts, np.int64)
    for rank in range(num_ranks):
        for expert in range(num_experts):
            total_E[expert] += counts_RE[rank, expert]
    # slots of each expert, in order
    first_E = np.zeros(num_experts + 1, np.int64)
    for slot in range(num_slots):
        if expert_P[slot] >= 0:
            first_E[expert_P[slot] + 1] += 1
    for expert in range(num_experts):
        if total_E[expert] > 0 and first_E[expert + 1] == 0:
            return -1
        first_E[expert + 1] += first_E[expert]
    slots_E = np.empty(first_E[num_experts], np.int64)
    place = first_E.copy()
    for slot in range(num_slots):
        if expert_P[slot] >= 0:
            slots_E[place[expert_P[slot]]] = slot
            place[expert_P[slot]] += 1
    # the flexible experts' arcs
    fixed_R = np.zeros(num_ranks, np.int64)
    flexible = np.empty(num_experts, np.int64)
    num_flexible, num_arcs = 0, 0
    for expert in range(num_experts):
        copies = first_E[expert + 1] - first_E[expert]
        if copies == 1:
            slot = slots_E[first_E[expert]]
            fixed_R[rank_P[slot]] += total_E[expert]
            tokens_P[slot] = total_E[expert]
        elif total_E[expert] > 0:
            flexible[num_flexible] = expert
            num_flexible += 1
            num_arcs += copies
    total_K = np.empty(num_flexible, np.int64)
    first_k = np.zeros(num_flexible + 1, np.int64)
    arc_k, arc_r, arc_slot = np.empty(num_arcs, np.int64), np.empty(num_arcs, np.int64), np.empty(num_arcs, np.int64)
    own_A, group_A = np.empty(num_arcs, np.int64), np.empty(num_arcs, np.int64)
    near_G, expert_G = np.zeros(num_arcs, np.int64), np.empty(num_arcs, np.int64)
    num_nodes = 0
    for rank in range(num_ranks):
        num_nodes = max(num_nodes, node_R[rank] + 1)
    group_of_node = np.full(num_nodes, -1, np.int64)
    reach_R = np.zeros(num_ranks, np.bool_)
    arc, num_groups, total = 0, 0, np.int64(0)
    for k in range(num_flexible):
        expert = flexible[k]
        total_K[k] = total_E[expert]
        total += total_E[expert]
        begin = num_groups
        for index in range(first_E[expert], first_E[expert + 1]):
            slot = slots_E[index]
            rank = rank_P[slot]
            arc_k[arc], arc_r[arc], arc_slot[arc] = k, rank, slot
            own_A[arc] = counts_RE[rank, expert]
            reach_R[rank] = True
            if group_of_node[node_R[rank]] < begin:
                group_of_node[node_R[rank]] = num_groups
                expert_G[num_groups] = k
                num_groups += 1
            group_A[arc] = group_of_node[node_R[rank]]
            arc += 1
        first_k[k + 1] = arc
        for rank in range(num_ranks):
            group = group_of_node[node_R[rank]]
            if group >= begin:
                near_G[group] += counts_RE[rank, expert]
    quota = np.zeros(num_arcs, np.int64)
    if num_flexible > 0:
        left_K = total_K.copy()
        cap, room = np.empty(num_ranks, np.int64), np.empty(num_ranks, np.int64)
        by_rank, first_r = arcs_by_rank(arc_r, num_ranks)
        first_caps(total, fixed_R, speeds, reach_R, cap, room)
        near = near_G[:num_groups]
        near_first(quota, left_K, room, own_A, near, arc_r, first_k, group_A)
        balance_quota(
            quota, left_K, total_K, fixed_R, speeds, arc_k, arc_r, first_k, by_rank, first_r, cap, room, near, group_A
        )
        shorten_ways(quota, room, own_A, near, arc_r, group_A, expert_G[:num_groups], num_ranks, num_flexible)
        for arc in range(num_arcs):
            tokens_P[arc_slot[arc]] = quota[arc]
    return _deal(counts_RE, total_E, rank_P, node_R, tokens_P, first_E, slots_E, only, out_RP, here_RS)


@compiled
def _deal(
    counts_RE: Ints,
    total_E: Ints,
    rank_P: Ints,
    node_R: Ints,
    tokens_P: Ints,
    first_E: Ints,
    slots_E: Ints,
    only: int,
    out_RP: Ints,
    here_RS: Ints,
) -> int:
    """Sources to slots: own rank first, then within the node, then the rest, each in order. Returns tokens that leave their node."""
    num_ranks, num_experts = counts_RE.shape
    first_slot = 0
    if only >= 0:
        first_slot = np.searchsorted(rank_P, only)
    supply = np.empty(num_ranks, np.int64)
    far = np.int64(0)
    for expert in range(num_experts):
        if total_E[expert] == 0:
            continue
        begin, end = first_E[expert], first_E[expert + 1]
        for rank in range(num_ranks):
            supply[rank] = counts_RE[rank, expert]
        if end - begin == 1:
            slot = slots_E[begin]
            target = rank_P[slot]
            for source in range(num_ranks):
                if node_R[source] != node_R[target]:
                    far += supply[source]
                if only < 0:
                    out_RP[source, slot] = supply[source]
                elif target == only:
                    here_RS[source, slot - first_slot] = supply[source]
            if 0 <= only < num_ranks:
                out_RP[0, slot] = supply[only]
            continue
        want = tokens_P[slots_E[begin:end]]
        for stage in range(3):
            start = 0  # no source before this one has tokens left; holds for the last stage alone
            for index in range(end - begin):
                slot = slots_E[begin + index]
                target = rank_P[slot]
                source = target if stage == 0 else start
                while want[index] > 0 and source < num_ranks:
                    amount = min(want[index], supply[source])
                    if amount > 0 and (stage != 1 or node_R[source] == node_R[target]):
                        supply[source] -= amount
                        want[index] -= amount
                        if stage == 2:
                            far += amount
                        if only < 0:
                            out_RP[source, slot] += amount
                        else:
                            if source == only:
                                out_RP[0, slot] += amount
                            if target == only:
                                here_RS[source, slot - first_slot] += amount
                    if stage == 0:
                        break
                    if stage == 2 and supply[source] == 0:
                        start = source + 1
                    source += 1
    return far


def slowest_times(
    load: NDArray[np.floating], placement: Placement, speeds: Sequence[float] | None = None
) -> NDArray[np.float64]:
    """Time of the slowest rank per layer on a load, with an optimal split; 1 is the mean over the ranks that have slots.

    Args:
        load: [L, E], tokens per expert in any unit.
        placement: where the copies are.
        speeds: relative speed per rank; None for equal ones.
    """
    load_LE = np.asarray(load, dtype=np.float64)
    num_ranks = len(speeds) if speeds is not None else int(placement.rank_of_slot.max()) + 1
    speed_R = np.array(_safe_speeds(speeds, num_ranks))
    able_R = np.isin(np.arange(num_ranks), placement.rank_of_slot)
    time_L = np.ones(len(load_LE))
    for layer, load_E in enumerate(load_LE):
        total = float(load_E.sum())
        if total > 0:
            counts_RE = np.zeros((num_ranks, len(load_E)), dtype=np.int64)
            counts_RE[0] = np.rint(load_E / total * 1e9)
            none = np.zeros((num_ranks, 0), dtype=np.int64)
            one = np.zeros((1, len(placement.rank_of_slot)), dtype=np.int64)
            tokens_P, _ = _solve(counts_RE, placement, layer, speeds, num_ranks, one, none)
            time_R = np.bincount(placement.rank_of_slot, weights=tokens_P, minlength=num_ranks) / speed_R
            time_L[layer] = time_R.max() / (tokens_P.sum() / speed_R[able_R].sum())
    return time_L


def split_whole(
    counts: NDArray[np.integer], placement: Placement, layer: int, speeds: Sequence[float] | None = None
) -> NDArray[np.int64]:
    """As `split_tokens`, but all that one rank sends to one expert goes to one copy: for sums that must not depend on the split.

    Greedy, largest first, to the copy whose rank is done first; the sender's own rank where that is a tie.
    """
    counts_RE = np.asarray(counts, dtype=np.int64)
    num_ranks, num_experts = counts_RE.shape
    expert_P, rank_P = placement.expert_of_slot[layer], placement.rank_of_slot
    speed_R = np.array(_safe_speeds(speeds, num_ranks))
    slots_of: list[list[int]] = [np.flatnonzero(expert_P == expert).tolist() for expert in range(num_experts)]
    load_R = np.zeros(num_ranks)
    out_RP = np.zeros((num_ranks, len(expert_P)), dtype=np.int64)
    flexible: list[tuple[int, int, int]] = []
    for source, expert in np.argwhere(counts_RE > 0).tolist():
        slots, rows = slots_of[expert], int(counts_RE[source, expert])
        assert slots, "tokens for an expert without a copy"
        if len(slots) > 1:
            flexible.append((-rows, expert, source))
        else:
            out_RP[source, slots[0]] = rows
            load_R[rank_P[slots[0]]] += rows
    for negative, expert, source in sorted(flexible):
        best = min(
            slots_of[expert],
            key=lambda slot: ((load_R[rank_P[slot]] - negative) / speed_R[rank_P[slot]], rank_P[slot] != source, slot),
        )
        out_RP[source, best] = -negative
        load_R[rank_P[best]] -= negative
    return out_RP


def _safe_speeds(speeds: Sequence[float] | None, num_ranks: int) -> list[float]:
    """Positive speeds, the fastest is 1."""
    if speeds is None:
        return [1.0] * num_ranks
    fastest = max(max(speeds), 1e-12)
    return [max(speed / fastest, 1e-6) for speed in speeds]
