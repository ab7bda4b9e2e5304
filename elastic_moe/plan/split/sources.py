# pyright: reportArgumentType=false, reportReturnType=false
"""Which rank sends which tokens of an expert to which of its copies, once the tokens of each copy are known.

The sources of a copy are its own rank, then the ranks of its node, then all others, node by node. The tokens that ranks
send to an expert in one of these stages form a line, and its copies take them from the front. So a rank's part is where
its piece of the line meets that of a copy, and needs sums over nodes only (`assign_sources_of_rank`).

Legend: E experts, R ranks, P slots, S slots of one rank, N nodes.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.plan.compiled import Ints, compiled
from elastic_moe.plan.split.max_flow import sort_arcs_by_rank


@compiled
def assign_sources(
    counts_ER: Ints,
    total_E: Ints,
    rank_P: Ints,
    node_R: Ints,
    tokens_P: Ints,
    first_E: Ints,
    slots_E: Ints,
    out_RP: Ints,
) -> int:
    """Assign source ranks to all slots. Returns the tokens that leave their node.

    Args:
        counts_ER: tokens of each source rank for each expert.
        total_E: their sums.
        rank_P, node_R: the rank of each slot, the node of each rank.
        tokens_P: the tokens of each slot.
        first_E, slots_E: the slots of expert e are `slots_E[first_E[e] : first_E[e + 1]]`.
        out_RP: filled with the tokens from each rank to each slot.
    """
    num_experts, num_ranks = counts_ER.shape
    ranks_N, first_N = sort_arcs_by_rank(node_R, node_R.max() + 1)  # the ranks of each node, in order
    supply = np.empty(num_ranks, np.int64)
    cross_node_tokens = np.int64(0)
    for expert in range(num_experts):
        if total_E[expert] == 0:
            continue
        begin, end = first_E[expert], first_E[expert + 1]
        supply[:] = counts_ER[expert]
        if end - begin == 1:
            slot = slots_E[begin]
            for source in range(num_ranks):
                if node_R[source] != node_R[rank_P[slot]]:
                    cross_node_tokens += supply[source]
                out_RP[source, slot] = supply[source]
            continue
        want = tokens_P[slots_E[begin:end]]
        for stage in range(3):
            start = 0  # all sources before this one are used up; true in the last stage only
            for index in range(end - begin):
                slot = slots_E[begin + index]
                target = rank_P[slot]
                source, until = start, num_ranks
                if stage < 2:
                    source, until = 0, 1
                    if stage == 1:
                        source, until = first_N[node_R[target]], first_N[node_R[target] + 1]
                while want[index] > 0 and source < until:
                    sender = target if stage == 0 else ranks_N[source]
                    amount = min(want[index], supply[sender])
                    supply[sender] -= amount
                    want[index] -= amount
                    if stage == 2:
                        cross_node_tokens += amount
                        if supply[sender] == 0:
                            start = source + 1
                    out_RP[sender, slot] += amount
                    source += 1
    return cross_node_tokens


@compiled
def _overlap(begin: int, end: int, other_begin: int, other_end: int) -> int:
    """Length of the common part of two intervals."""
    return max(np.int64(0), min(end, other_end) - max(begin, other_begin))


@compiled
def assign_sources_of_rank(  # noqa: PLR0913 - compiled code sees plain arrays
    counts_RE: Ints,
    counts_NE: Ints,
    total_E: Ints,
    rank_P: Ints,
    node_R: Ints,
    tokens_P: Ints,
    first_E: Ints,
    slots_E: Ints,
    rank: int,
    sent_P: Ints,
    here_RS: Ints,
) -> int:
    """One rank's part of `assign_sources`. Returns the tokens of all ranks that leave their node.

    Args:
        counts_RE: tokens of each source rank for each expert.
        counts_NE: their sums over the ranks of each node.
        total_E: their sums.
        rank_P, node_R, tokens_P, first_E, slots_E: as for `assign_sources`.
        rank: the rank.
        sent_P: filled with its tokens for each slot.
        here_RS: filled with the tokens of each rank for its slots.
    """
    num_ranks, num_experts = counts_RE.shape
    num_nodes = len(counts_NE)
    ranks_N, first_N = sort_arcs_by_rank(node_R, num_nodes)
    first_slot, my_node = np.searchsorted(rank_P, rank), node_R[rank]
    taken_R = np.zeros(num_ranks, np.int64)  # of this expert's tokens, by copies on the rank itself
    supply_N, used_N = (
        np.empty(num_nodes, np.int64),
        np.empty(num_nodes, np.int64),
    )  # of a node's line; used from the front
    cross_node_tokens = np.int64(0)
    for expert in range(num_experts):
        if total_E[expert] == 0:
            continue
        begin, end = first_E[expert], first_E[expert + 1]
        if end - begin == 1:
            slot = slots_E[begin]
            sent_P[slot] = counts_RE[rank, expert]
            cross_node_tokens += total_E[expert] - counts_NE[node_R[rank_P[slot]], expert]
            if rank_P[slot] == rank:
                here_RS[:, slot - first_slot] = counts_RE[:, expert]
            continue
        want = tokens_P[slots_E[begin:end]]
        supply_N[:] = counts_NE[:, expert]
        used_N[:] = 0
        for index in range(end - begin):
            slot = slots_E[begin + index]
            target = rank_P[slot]
            amount = min(want[index], counts_RE[target, expert] - taken_R[target])
            taken_R[target] += amount
            supply_N[node_R[target]] -= amount
            want[index] -= amount
            if target == rank:
                sent_P[slot] += amount
                here_RS[rank, slot - first_slot] += amount
        mine_begin = np.int64(0)  # this rank's piece of its node's line
        for place in range(first_N[my_node], first_N[my_node + 1]):
            if ranks_N[place] == rank:
                break
            mine_begin += counts_RE[ranks_N[place], expert] - taken_R[ranks_N[place]]
        mine_end = mine_begin + counts_RE[rank, expert] - taken_R[rank]
        for index in range(end - begin):
            slot = slots_E[begin + index]
            node = node_R[rank_P[slot]]
            amount = min(want[index], supply_N[node] - used_N[node])
            if node == my_node:
                sent_P[slot] += _overlap(mine_begin, mine_end, used_N[node], used_N[node] + amount)
                if rank_P[slot] == rank:
                    at = np.int64(0)
                    for place in range(first_N[node], first_N[node + 1]):
                        sender = ranks_N[place]
                        piece = counts_RE[sender, expert] - taken_R[sender]
                        here_RS[sender, slot - first_slot] += _overlap(
                            at, at + piece, used_N[node], used_N[node] + amount
                        )
                        at += piece
            used_N[node] += amount
            want[index] -= amount
        before = np.int64(0)  # what is left of the lines of earlier nodes
        for node in range(my_node):
            before += supply_N[node] - used_N[node]
        mine_begin = before + max(mine_begin, used_N[my_node]) - used_N[my_node]
        mine_end = before + max(mine_end, used_N[my_node]) - used_N[my_node]
        at = np.int64(0)
        for index in range(end - begin):
            slot = slots_E[begin + index]
            sent_P[slot] += _overlap(mine_begin, mine_end, at, at + want[index])
            if rank_P[slot] == rank and want[index] > 0:
                here = np.int64(0)
                for node in range(num_nodes):
                    used = used_N[node]
                    for place in range(first_N[node], first_N[node + 1]):
                        sender = ranks_N[place]
                        piece = counts_RE[sender, expert] - taken_R[sender]
                        left = max(np.int64(0), piece - used)
                        used = max(np.int64(0), used - piece)
                        here_RS[sender, slot - first_slot] += _overlap(here, here + left, at, at + want[index])
                        here += left
            at += want[index]
            cross_node_tokens += want[index]
        for index in range(begin, end):
            taken_R[rank_P[slots_E[index]]] = 0
    return cross_node_tokens
