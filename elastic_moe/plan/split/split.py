# pyright: reportArgumentType=false, reportReturnType=false
"""Exact token split of one MoE layer over the copies of its experts: the smallest possible time of the slowest rank.

Minimise the makespan z  such that  sum over ranks x[e, r] = w[e]  and  sum over experts x[e, r] <= z * speed[r].
x[e, r] are whole tokens of expert e on rank r, zero where r holds no copy of e; w[e] are all tokens of expert e.

For a fixed z this is a maximum flow. `max_flow.py` raises z from a lower bound to the least value with a full flow. Of
the optimal splits, `min_cost.py` picks one that sends the fewest tokens to other nodes, then the fewest to other
ranks. Only experts with several copies take part, about one per spare slot. Source: discrete Newton method,
Dinkelbach, "On nonlinear fractional programming", Management Science 13 (1967).

Legend: E experts, R ranks, P slots, S slots of one rank; K flexible experts (with several copies), A arcs (their
copies), Q pairs of a flexible expert and a node (see `max_flow.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.compiled import Floats, Ints, compiled
from elastic_moe.plan.split.max_flow import augment_flow, greedy_flow, initial_capacities, sort_arcs_by_rank
from elastic_moe.plan.split.min_cost import cancel_cycles
from elastic_moe.plan.split.sources import assign_sources, assign_sources_of_rank
from elastic_moe.plan.values import Placement

_BLOCK = 16  # elements on a side of a block that is transposed


@dataclass(frozen=True, slots=True, eq=False)
class RankSplit:
    """The part of a layer's split that one rank needs. No array is as large as ranks times slots.

    Attributes:
        sent_P: int64[P], tokens from this rank to each slot.
        here_RS: int64[R, S], tokens from each rank to this rank's slots.
        tokens_P: int64[P], tokens of each slot.
        cross_node_tokens: tokens of all ranks that leave their node.
        rows_RR: int64[R, R], tokens from each rank to each other rank; None if only this rank's part is known.
    """

    sent_P: NDArray[np.int64]
    here_RS: NDArray[np.int64]
    tokens_P: NDArray[np.int64]
    cross_node_tokens: int
    rows_RR: NDArray[np.int64] | None = None


def split_tokens(
    counts: NDArray[np.integer], placement: Placement, layer: int, speeds: Sequence[float] | None = None
) -> NDArray[np.int64]:
    """Tokens from each source rank to each slot, int64[R, P]. Every rank computes the same from the same counts.

    Args:
        counts: [R, E], tokens of each source rank routed to each expert.
        placement: the copies and the ranks' nodes.
        layer: index among the MoE layers.
        speeds: relative speed per rank; None for equal speeds. A rank of speed 0 gets only the tokens that no other
            can take.
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
    """One rank's part of `split_tokens`, computed without the matrix of all ranks and slots.

    Args as for `split_tokens`.
    """
    counts_RE = np.ascontiguousarray(counts, dtype=np.int64)
    span = placement.slots_of(rank)
    sent_1P = np.zeros((1, len(placement.rank_of_slot)), dtype=np.int64)
    here_RS = np.zeros((len(counts_RE), span.stop - span.start), dtype=np.int64)
    tokens_P, cross_node_tokens = _solve(counts_RE, placement, layer, speeds, rank, sent_1P, here_RS)
    return RankSplit(sent_1P[0], here_RS, tokens_P, cross_node_tokens)


def of_rank(split_RP: NDArray[np.int64], placement: Placement, rank: int) -> RankSplit:
    """One rank's part of a given split, int64[R, P], with the tokens between all ranks."""
    bounds = np.searchsorted(placement.rank_of_slot, np.arange(len(split_RP) + 1))
    until = np.concatenate([np.zeros((len(split_RP), 1), dtype=np.int64), np.cumsum(split_RP, axis=1)], axis=1)
    rows_RR = np.diff(until[:, bounds], axis=1)
    node_R = placement.node_of_rank
    cross_node_tokens = 0 if node_R is None else int(rows_RR[node_R[:, None] != node_R[None, :]].sum())
    here_RS = split_RP[:, placement.slots_of(rank)]
    return RankSplit(split_RP[rank], here_RS, split_RP.sum(axis=0), cross_node_tokens, rows_RR)


def _solve(
    counts_RE: NDArray[np.int64],
    placement: Placement,
    layer: int,
    speeds: Sequence[float] | None,
    rank: int,
    out_RP: NDArray[np.int64],
    here_RS: NDArray[np.int64],
) -> tuple[NDArray[np.int64], int]:
    """Prepare the arrays, and run `_split` on them. Returns tokens_P and the tokens that leave their node."""
    num_ranks = len(counts_RE)
    expert_P = np.ascontiguousarray(placement.expert_of_slot[layer], dtype=np.int64)
    rank_P = np.ascontiguousarray(placement.rank_of_slot, dtype=np.int64)
    node_R = np.zeros(num_ranks, dtype=np.int64)
    if placement.node_of_rank is not None:
        node_R[:] = placement.node_of_rank
    tokens_P = np.zeros(len(rank_P), dtype=np.int64)
    speed_R = np.array(positive_speeds(speeds, num_ranks))
    cross_node_tokens = _split(counts_RE, expert_P, rank_P, node_R, speed_R, rank, out_RP, here_RS, tokens_P)
    assert cross_node_tokens >= 0, "tokens for an expert without a copy"
    return tokens_P, cross_node_tokens


@compiled
def _transposed(array_XY: Ints) -> Ints:
    """int64[Y, X], copied block by block: a column of a large array costs a cache miss per element."""
    size_x, size_y = array_XY.shape
    out_YX = np.empty((size_y, size_x), np.int64)
    for x0 in range(0, size_x, _BLOCK):
        for y0 in range(0, size_y, _BLOCK):
            for y in range(y0, min(y0 + _BLOCK, size_y)):
                for x in range(x0, min(x0 + _BLOCK, size_x)):
                    out_YX[y, x] = array_XY[x, y]
    return out_YX


@compiled
def _split(  # noqa: PLR0913 - compiled code sees plain arrays
    counts_RE: Ints,
    expert_P: Ints,
    rank_P: Ints,
    node_R: Ints,
    speed_R: Floats,
    only_rank: int,
    out_RP: Ints,
    here_RS: Ints,
    tokens_P: Ints,
) -> int:
    """Solve one layer. Returns the tokens that leave their node; -1 if an expert has tokens and no copy.

    Args:
        only_rank: the rank for which to write the split; negative for all ranks. With the number of ranks, only
            `tokens_P` is filled: the slowest rank's time is the least, the traffic is any.
        out_RP: filled with tokens from each source to each slot; with `only_rank` one row, that rank's.
        here_RS: filled with tokens from each source to the slots of `only_rank`; unused without one.
        tokens_P: filled with the tokens of each slot.
    """
    num_ranks, num_experts = counts_RE.shape
    num_slots = len(expert_P)
    counts_NE = np.zeros((node_R.max() + 1, num_experts), np.int64)
    for rank in range(num_ranks):
        for expert in range(num_experts):
            counts_NE[node_R[rank], expert] += counts_RE[rank, expert]
    total_E = np.zeros(num_experts, np.int64)
    for node in range(len(counts_NE)):
        for expert in range(num_experts):
            total_E[expert] += counts_NE[node, expert]
    # the slots of each expert, in order: slots_E[first_E[e] : first_E[e + 1]]
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
    # experts with one copy are fixed; the others are flexible, and their copies are arcs
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
    first_arc_K = np.zeros(num_flexible + 1, np.int64)
    expert_A, rank_A, slot_A = np.empty(num_arcs, np.int64), np.empty(num_arcs, np.int64), np.empty(num_arcs, np.int64)
    own_A, pair_A = np.empty(num_arcs, np.int64), np.empty(num_arcs, np.int64)
    local_Q, expert_of_Q = np.empty(num_arcs, np.int64), np.empty(num_arcs, np.int64)
    pair_of_node = np.full(len(counts_NE), -1, np.int64)
    reach_R = np.zeros(num_ranks, np.bool_)
    arc, num_pairs, total = 0, 0, np.int64(0)
    for k in range(num_flexible):
        expert = flexible[k]
        total_K[k] = total_E[expert]
        total += total_E[expert]
        begin = num_pairs
        for index in range(first_E[expert], first_E[expert + 1]):
            slot = slots_E[index]
            rank = rank_P[slot]
            expert_A[arc], rank_A[arc], slot_A[arc] = k, rank, slot
            own_A[arc] = counts_RE[rank, expert]
            reach_R[rank] = True
            if pair_of_node[node_R[rank]] < begin:
                pair_of_node[node_R[rank]] = num_pairs
                expert_of_Q[num_pairs] = k
                local_Q[num_pairs] = counts_NE[node_R[rank], expert]
                num_pairs += 1
            pair_A[arc] = pair_of_node[node_R[rank]]
            arc += 1
        first_arc_K[k + 1] = arc
    flow_A = np.zeros(num_arcs, np.int64)
    if num_flexible > 0:
        unplaced_K = total_K.copy()
        capacity_R, slack_R = np.empty(num_ranks, np.int64), np.empty(num_ranks, np.int64)
        arcs_by_rank, first_arc_R = sort_arcs_by_rank(rank_A, num_ranks)
        initial_capacities(total, fixed_R, speed_R, reach_R, capacity_R, slack_R)
        local_Q = local_Q[:num_pairs]
        greedy_flow(flow_A, unplaced_K, slack_R, own_A, local_Q, rank_A, first_arc_K, pair_A)
        augment_flow(
            flow_A,
            unplaced_K,
            total_K,
            fixed_R,
            speed_R,
            expert_A,
            rank_A,
            first_arc_K,
            arcs_by_rank,
            first_arc_R,
            capacity_R,
            slack_R,
            local_Q,
            pair_A,
        )
        if only_rank < num_ranks:
            cancel_cycles(
                flow_A, slack_R, own_A, local_Q, rank_A, pair_A, expert_of_Q[:num_pairs], num_ranks, num_flexible
            )
        for arc in range(num_arcs):
            tokens_P[slot_A[arc]] = flow_A[arc]
    if only_rank >= num_ranks:
        return 0
    if only_rank >= 0:
        return assign_sources_of_rank(
            counts_RE, counts_NE, total_E, rank_P, node_R, tokens_P, first_E, slots_E, only_rank, out_RP[0], here_RS
        )
    counts_ER = _transposed(counts_RE)
    return assign_sources(counts_ER, total_E, rank_P, node_R, tokens_P, first_E, slots_E, out_RP)


def slowest_times(
    load: NDArray[np.floating], placement: Placement, speeds: Sequence[float] | None = None
) -> NDArray[np.float64]:
    """Makespan of each layer on a load with an optimal split, float64[L]; 1 is the mean over the ranks that have slots.

    Args:
        load: [L, E], tokens per expert in any unit.
        placement: the copies.
        speeds: relative speed per rank; None for equal speeds.
    """
    load_LE = np.asarray(load, dtype=np.float64)
    if placement.in_nodes:
        return _slowest_in_nodes(load_LE, placement, speeds)
    num_ranks = len(speeds) if speeds is not None else int(placement.rank_of_slot.max()) + 1
    speed_R = np.array(positive_speeds(speeds, num_ranks))
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


def _slowest_in_nodes(
    load_LE: NDArray[np.float64], placement: Placement, speeds: Sequence[float] | None
) -> NDArray[np.float64]:
    """The same where rows stay in their node, each of which has tokens in proportion to its speed."""
    assert placement.node_of_rank is not None
    time_L = np.ones(len(load_LE))
    for first in np.unique(placement.node_of_rank, return_index=True)[1].tolist():
        ranks, part = placement.reach(first)
        if len(part.rank_of_slot):
            own = None if speeds is None else [speeds[rank] for rank in ranks]
            time_L = np.maximum(time_L, slowest_times(load_LE, part, own))
    return time_L


def positive_speeds(speeds: Sequence[float] | None, num_ranks: int) -> list[float]:
    """Speeds relative to the fastest, which is 1; at least 1e-6, so that a time can be divided by them."""
    if speeds is None:
        return [1.0] * num_ranks
    fastest = max(max(speeds), 1e-12)
    return [max(speed / fastest, 1e-6) for speed in speeds]
