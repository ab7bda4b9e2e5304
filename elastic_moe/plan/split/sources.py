# pyright: reportArgumentType=false, reportReturnType=false
"""Which rank sends which tokens of an expert to which of its copies, once the tokens of each copy are known.

Legend: E experts, R ranks, P slots, S slots of one rank, N nodes.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.plan.compiled import Ints, compiled
from elastic_moe.plan.split.max_flow import sort_arcs_by_rank


@compiled
def assign_sources(  # noqa: PLR0913 - compiled code sees plain arrays
    counts_ER: Ints,
    total_E: Ints,
    rank_P: Ints,
    node_R: Ints,
    tokens_P: Ints,
    first_E: Ints,
    slots_E: Ints,
    only_rank: int,
    out_RP: Ints,
    here_RS: Ints,
) -> int:
    """Assign source ranks to slots: the own rank first, then the same node, then the rest, each in order.

    Args:
        counts_ER: tokens of each source rank for each expert.
        total_E: their sums.
        rank_P, node_R: the rank of each slot, the node of each rank.
        tokens_P: the tokens of each slot.
        first_E, slots_E: the slots of expert e are `slots_E[first_E[e] : first_E[e + 1]]`.
        only_rank, out_RP, here_RS: as for `split._split`.

    Returns the tokens that leave their node.
    """
    num_experts, num_ranks = counts_ER.shape
    first_slot = 0
    if only_rank >= 0:
        first_slot = np.searchsorted(rank_P, only_rank)
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
            target = rank_P[slot]
            for source in range(num_ranks):
                if node_R[source] != node_R[target]:
                    cross_node_tokens += supply[source]
                if only_rank < 0:
                    out_RP[source, slot] = supply[source]
                elif target == only_rank:
                    here_RS[source, slot - first_slot] = supply[source]
            if 0 <= only_rank < num_ranks:
                out_RP[0, slot] = supply[only_rank]
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
                    sender = source
                    if stage < 2:
                        sender = target if stage == 0 else ranks_N[source]
                    amount = min(want[index], supply[sender])
                    supply[sender] -= amount
                    want[index] -= amount
                    if stage == 2:
                        cross_node_tokens += amount
                        if supply[sender] == 0:
                            start = source + 1
                    if only_rank < 0:
                        out_RP[sender, slot] += amount
                    else:
                        if sender == only_rank:
                            out_RP[0, slot] += amount
                        if target == only_rank:
                            here_RS[sender, slot - first_slot] += amount
                    source += 1
    return cross_node_tokens
