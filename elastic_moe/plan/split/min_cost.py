# pyright: reportArgumentType=false, reportReturnType=false
"""Minimum-cost flow behind the token split: of all optimal splits, one that moves the fewest tokens between nodes,
then between ranks.

The network and the legend are those of `max_flow.py`. Here an expert gives its tokens to its pairs, a pair to its
ranks, and each rank to one sink that also holds the ranks' slack.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.plan.compiled import Ints, compiled

_CROSS_NODE_PRICE = 1 << 20
_NEVER = 1 << 60
_WORK = 1 << 17  # edges looked at: a millisecond, in which 256 ranks come to the least cost


@compiled
def _set_prices(edge: int, flow_X: Ints, local_X: Ints, price: int, up_X: Ints, down_X: Ints) -> None:
    """Set the prices of one token more and of one less on an edge; there is none less than no token."""
    up_X[edge] = -price if flow_X[edge] < local_X[edge] else 0
    down_X[edge] = price if flow_X[edge] <= local_X[edge] else 0
    if flow_X[edge] == 0:
        down_X[edge] = _NEVER


@compiled
def cancel_cycles(  # noqa: PLR0913 - compiled code sees plain arrays
    flow_A: Ints,
    slack_R: Ints,
    own_A: Ints,
    local_Q: Ints,
    rank_A: Ints,
    pair_A: Ints,
    expert_of_Q: Ints,
    num_ranks: int,
    num_experts: int,
) -> int:
    """Change an optimal flow, within the same capacities, to one with the least cost, or less than before if the ranks
    are many. Returns the number of cycles cancelled.

    Minimum-cost flow by cancelling negative cycles (Klein 1967), found by Bellman-Ford. Each token has a price. It is
    -_CROSS_NODE_PRICE while the pair gets fewer tokens than its own node sends (`local_Q`), and -1 while the rank gets
    fewer than it sends itself (`own_A`); beyond that it is 0. Both totals are concave in the flow, so parallel arcs
    with these prices are exact. The search ends after `_WORK` edges, with what it has found.
    """
    num_arcs, num_pairs = len(flow_A), len(local_Q)
    rank0, expert0, sink = num_pairs, num_pairs + num_ranks, num_pairs + num_ranks + num_experts
    size = sink + 1
    total_Q = np.zeros(num_pairs, np.int64)
    used_R = np.zeros(num_ranks, np.int64)
    for arc in range(num_arcs):
        total_Q[pair_A[arc]] += flow_A[arc]
        used_R[rank_A[arc]] += flow_A[arc]
    # prices of one token more and of one less on each arc and on each pair
    up_A, down_A = np.empty(num_arcs, np.int64), np.empty(num_arcs, np.int64)
    up_Q, down_Q = np.empty(num_pairs, np.int64), np.empty(num_pairs, np.int64)
    for arc in range(num_arcs):
        _set_prices(arc, flow_A, own_A, 1, up_A, down_A)
    for pair in range(num_pairs):
        _set_prices(pair, total_Q, local_Q, _CROSS_NODE_PRICE, up_Q, down_Q)
    dist = np.zeros(size, np.int64)
    parent = np.full(size, -1, np.int64)
    # edge to the parent: 4 * index + (0 pair->rank, 1 rank->pair, 2 expert->pair, 3 pair->expert); -1: of the sink
    via = np.full(size, -1, np.int64)
    mark = np.zeros(size, np.int64)
    cancelled = 0
    for _ in range(max(1, _WORK // (num_arcs + num_pairs + num_ranks))):
        changed = False
        for arc in range(num_arcs):
            pair_v, r = pair_A[arc], rank0 + rank_A[arc]
            if dist[pair_v] + up_A[arc] < dist[r]:
                dist[r], parent[r], via[r], changed = dist[pair_v] + up_A[arc], pair_v, 4 * arc, True
            if dist[r] + down_A[arc] < dist[pair_v]:
                dist[pair_v], parent[pair_v], via[pair_v], changed = dist[r] + down_A[arc], r, 4 * arc + 1, True
        for pair_v in range(num_pairs):
            k = expert0 + expert_of_Q[pair_v]
            if dist[k] + up_Q[pair_v] < dist[pair_v]:
                dist[pair_v], parent[pair_v], via[pair_v], changed = dist[k] + up_Q[pair_v], k, 4 * pair_v + 2, True
            if dist[pair_v] + down_Q[pair_v] < dist[k]:
                dist[k], parent[k], via[k], changed = dist[pair_v] + down_Q[pair_v], pair_v, 4 * pair_v + 3, True
        for rank in range(num_ranks):
            r = rank0 + rank
            if slack_R[rank] > 0 and dist[r] < dist[sink]:
                dist[sink], parent[sink], via[sink], changed = dist[r], r, -1, True
            if used_R[rank] > 0 and dist[sink] < dist[r]:
                dist[r], parent[r], via[r], changed = dist[sink], sink, -1, True
        if not changed:
            break
        # cycles in the graph of parents are negative, and no two of them share a vertex
        mark[:] = 0
        for begin in range(size):
            v = begin
            while v >= 0 and mark[v] == 0:
                mark[v] = begin + 1
                v = parent[v]
            if v < 0 or mark[v] != begin + 1:
                continue
            cancelled += 1
            _cancel(v, parent, via, flow_A, total_Q, slack_R, used_R, own_A, local_Q, rank0, num_ranks, pair_A)
            while v >= 0:  # its edges have changed; the search can go on from any distances
                u, edge = parent[v], via[v]
                if u >= 0 and edge >= 0 and edge & 3 < 2:
                    _set_prices(edge >> 2, flow_A, own_A, 1, up_A, down_A)
                elif u >= 0 and edge >= 0:
                    _set_prices(edge >> 2, total_Q, local_Q, _CROSS_NODE_PRICE, up_Q, down_Q)
                parent[v] = -1
                v = u
    return cancelled


@compiled
def _cancel(  # noqa: PLR0913 - compiled code sees plain arrays
    start: int,
    parent: Ints,
    via: Ints,
    flow_A: Ints,
    total_Q: Ints,
    slack_R: Ints,
    used_R: Ints,
    own_A: Ints,
    local_Q: Ints,
    rank0: int,
    num_ranks: int,
    pair_A: Ints,
) -> None:
    """Send the largest amount that changes no price around the cycle of parents through `start`."""
    amount = np.int64(1) << 62
    for turn in range(2):
        v = start
        while True:
            u, edge = parent[v], via[v]
            if edge < 0:
                into_sink = rank0 <= u < rank0 + num_ranks
                rank = (u if into_sink else v) - rank0
                if turn == 0:
                    amount = min(amount, slack_R[rank] if into_sink else used_R[rank])
                else:
                    slack_R[rank] -= amount if into_sink else -amount
                    used_R[rank] += amount if into_sink else -amount
            else:
                index, kind = edge >> 2, edge & 3
                if kind < 2:
                    now, price_limit = flow_A[index], own_A[index]
                else:
                    now, price_limit = total_Q[index], local_Q[index]
                if turn == 0:
                    if kind == 0 or kind == 2:
                        if now < price_limit:
                            amount = min(amount, price_limit - now)
                    else:
                        amount = min(amount, now if now <= price_limit else now - price_limit)
                elif kind == 0:
                    flow_A[index] += amount
                elif kind == 1:
                    flow_A[index] -= amount
                elif kind == 2:
                    total_Q[index] += amount
                else:
                    total_Q[index] -= amount
            v = u
            if v == start:
                break
