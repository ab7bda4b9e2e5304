# pyright: reportArgumentType=false, reportReturnType=false
"""The flow behind the token split, as compiled loops over flat arrays.

Only experts with several copies take part ("flexible" ones). Arc a is one copy: expert `arc_k[a]` on rank `arc_r[a]`; arcs lie
expert by expert (`first_k`), and `by_rank`, `first_r` list them rank by rank. `quota[a]` is the arc's tokens.

Shapes: K flexible experts, A arcs, R ranks, G groups (one expert's copies in one node).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.compiled import compiled

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_SMALL = 1e-9  # tokens: what rounding may cost a product of a time and a speed


@compiled
def arcs_by_rank(arc_r: Ints, num_ranks: int) -> tuple[Ints, Ints]:
    """Arcs in order of their rank, int64[A], and where each rank's begin, int64[R + 1]."""
    first_r = np.zeros(num_ranks + 1, np.int64)
    for rank in arc_r:
        first_r[rank + 1] += 1
    for rank in range(num_ranks):
        first_r[rank + 1] += first_r[rank]
    by_rank = np.empty(len(arc_r), np.int64)
    place = first_r.copy()
    for arc in range(len(arc_r)):
        by_rank[place[arc_r[arc]]] = arc
        place[arc_r[arc]] += 1
    return by_rank, first_r


@compiled
def _lift(z: float, speeds: Floats, cap: Ints, room: Ints) -> None:
    """Raise every rank's cap to what it does in time z."""
    for rank in range(len(cap)):
        raised = np.int64(z * speeds[rank] + _SMALL) - cap[rank]
        if raised > 0:
            cap[rank] += raised
            room[rank] += raised


@compiled
def _raise_caps(needed: int, inside: NDArray[np.bool_], speeds: Floats, cap: Ints, room: Ints) -> None:
    """Raise z to what a cut needs: `needed` tokens fit on no other ranks than those inside."""
    speed, have = 0.0, np.int64(0)
    for rank in range(len(cap)):
        if inside[rank]:
            speed += speeds[rank]
    _lift(needed / speed, speeds, cap, room)
    for rank in range(len(cap)):
        if inside[rank]:
            have += cap[rank]
    z = 0.0
    while have < needed:  # rounding down left less than one token per rank: the cheapest increments, exactly
        best, best_z = -1, np.inf
        for rank in range(len(cap)):
            if inside[rank] and (cap[rank] + 1) / speeds[rank] < best_z:
                best, best_z = rank, (cap[rank] + 1) / speeds[rank]
        cap[best] += 1
        room[best] += 1
        have += 1
        z = max(z, best_z)
    if z > 0:
        _lift(z, speeds, cap, room)


@compiled
def balance_quota(
    quota: Ints,
    left_K: Ints,
    total_K: Ints,
    fixed_R: Ints,
    speeds: Floats,
    arc_k: Ints,
    arc_r: Ints,
    first_k: Ints,
    by_rank: Ints,
    first_r: Ints,
    cap: Ints,
    room: Ints,
    near_G: Ints,
    group_A: Ints,
) -> None:
    """Place what is left of every expert so that the slowest rank is optimal; changes quota, left_K, cap and room.

    Breadth first from an expert with tokens left to a rank with room; the path's experts move tokens on. When there is no such
    rank, the ranks reached are a minimum cut, and z rises to what they need. Paths that push only tokens from other nodes aside
    are tried first, which leaves less for `shorten_ways`.
    """
    num_experts, num_ranks = len(total_K), len(fixed_R)
    far_G = -near_G  # tokens from other nodes, where positive
    for arc in range(len(quota)):
        far_G[group_A[arc]] += quota[arc]
    seen_K = np.empty(num_experts, np.bool_)
    seen_R = np.empty(num_ranks, np.bool_)
    into_R = np.empty(num_ranks, np.int64)  # the arc by which a rank was reached
    out_K = np.empty(num_experts, np.int64)  # the arc on which an expert gives way; -1 at the start
    queue = np.empty(num_experts, np.int64)
    for start in range(num_experts):
        gentle = True
        while left_K[start] > 0:
            seen_K[:] = False
            seen_R[:] = False
            seen_K[start], out_K[start], queue[0] = True, -1, start
            head, tail, goal = 0, 1, -1
            while head < tail and goal < 0:
                k = queue[head]
                head += 1
                for arc in range(first_k[k], first_k[k + 1]):
                    rank = arc_r[arc]
                    if seen_R[rank]:
                        continue
                    seen_R[rank], into_R[rank] = True, arc
                    if room[rank] > 0:
                        goal = rank
                        break
                    for index in range(first_r[rank], first_r[rank + 1]):
                        other = by_rank[index]
                        if quota[other] == 0 or seen_K[arc_k[other]] or (gentle and far_G[group_A[other]] <= 0):
                            continue
                        seen_K[arc_k[other]], out_K[arc_k[other]] = True, other
                        queue[tail] = arc_k[other]
                        tail += 1
            if goal < 0:
                if gentle:
                    gentle = False
                    continue
                needed = np.int64(0)
                for k in range(num_experts):
                    if seen_K[k]:
                        needed += total_K[k]
                for rank in range(num_ranks):
                    if seen_R[rank]:
                        needed += fixed_R[rank]
                _raise_caps(needed, seen_R, speeds, cap, room)
                gentle = True
                continue
            amount = min(left_K[start], room[goal])
            rank = goal
            while True:
                gives = out_K[arc_k[into_R[rank]]]
                if gives < 0:
                    break
                amount = min(amount, quota[gives])
                if gentle:
                    amount = min(amount, far_G[group_A[gives]])
                rank = arc_r[gives]
            room[goal] -= amount
            left_K[start] -= amount
            rank = goal
            while True:
                into = into_R[rank]
                quota[into] += amount
                far_G[group_A[into]] += amount
                gives = out_K[arc_k[into]]
                if gives < 0:
                    break
                quota[gives] -= amount
                far_G[group_A[gives]] -= amount
                rank = arc_r[gives]


@compiled
def first_caps(total: int, fixed_R: Ints, speeds: Floats, reach_R: NDArray[np.bool_], cap: Ints, room: Ints) -> None:
    """Caps and room at a lower bound of the optimal time: the fullest rank's fixed load, or the mean over ranks with copies."""
    z, speed = 0.0, 0.0
    for rank in range(len(fixed_R)):
        z = max(z, fixed_R[rank] / speeds[rank])
        if reach_R[rank]:
            total += fixed_R[rank]
            speed += speeds[rank]
    if speed > 0:
        z = max(z, total / speed)
    for rank in range(len(fixed_R)):
        cap[rank] = max(np.int64(z * speeds[rank] + _SMALL), fixed_R[rank])
        room[rank] = cap[rank] - fixed_R[rank]


@compiled
def near_first(
    quota: Ints, left_K: Ints, room: Ints, own_A: Ints, near_G: Ints, arc_r: Ints, first_k: Ints, group_A: Ints
) -> None:
    """A good start: tokens stay on their rank, then in their node, then go where most room is, as far as there is room.

    Experts with the least choice first: the fewest copies, then the fewest tokens. With two copies each that leaves half as much to `shorten_ways`.
    """
    order = np.argsort((first_k[1:] - first_k[:-1]) * (np.int64(1) << 40) + left_K, kind="mergesort")
    taken_G = np.zeros(len(near_G), np.int64)
    for k in order:
        for arc in range(first_k[k], first_k[k + 1]):
            amount = min(own_A[arc], room[arc_r[arc]], left_K[k])
            quota[arc] += amount
            left_K[k] -= amount
            room[arc_r[arc]] -= amount
            taken_G[group_A[arc]] += amount
    for k in order:
        for arc in range(first_k[k], first_k[k + 1]):
            amount = min(near_G[group_A[arc]] - taken_G[group_A[arc]], room[arc_r[arc]], left_K[k])
            quota[arc] += amount
            left_K[k] -= amount
            room[arc_r[arc]] -= amount
            taken_G[group_A[arc]] += amount
    for k in order:
        while left_K[k] > 0:
            best = -1
            for arc in range(first_k[k], first_k[k + 1]):
                if room[arc_r[arc]] > 0 and (best < 0 or room[arc_r[arc]] > room[arc_r[best]]):
                    best = arc
            if best < 0:
                break
            amount = min(left_K[k], room[arc_r[best]])
            quota[best] += amount
            left_K[k] -= amount
            room[arc_r[best]] -= amount


@compiled
def shorten_ways(
    quota: Ints,
    room: Ints,
    own_A: Ints,
    near_G: Ints,
    arc_r: Ints,
    group_A: Ints,
    expert_G: Ints,
    num_ranks: int,
    num_experts: int,
) -> int:
    """Among the splits within the caps, one with the fewest tokens between nodes, then the fewest between ranks.

    Minimum-cost flow by cancelling negative cycles (Klein 1967). Expert k gives tokens to its groups g, those to ranks r, those
    to one sink t that holds each rank's room. A token costs nothing beyond its price: -FAR while the group has less than its own
    node sends (`near_G`), -1 while the rank has less than it sends itself (`own_A`). Both are concave in the quota, so parallel
    arcs with these prices are exact. Returns the number of cycles cancelled.
    """
    far = np.int64(1 << 20)
    num_arcs, num_groups = len(quota), len(near_G)
    rank0, expert0, sink = num_groups, num_groups + num_ranks, num_groups + num_ranks + num_experts
    size = sink + 1
    total_G = np.zeros(num_groups, np.int64)
    used_R = np.zeros(num_ranks, np.int64)
    for arc in range(num_arcs):
        total_G[group_A[arc]] += quota[arc]
        used_R[arc_r[arc]] += quota[arc]
    dist = np.zeros(size, np.int64)
    parent = np.full(size, -1, np.int64)
    via = np.full(
        size, -1, np.int64
    )  # 4 * index + (0 group->rank, 1 rank->group, 2 expert->group, 3 group->expert); -1: sink
    mark = np.zeros(size, np.int64)
    cancelled = 0
    while True:
        changed = False
        for arc in range(num_arcs):
            g, r = group_A[arc], rank0 + arc_r[arc]
            price = -1 if quota[arc] < own_A[arc] else 0
            if dist[g] + price < dist[r]:
                dist[r], parent[r], via[r], changed = dist[g] + price, g, 4 * arc, True
            if quota[arc] > 0:
                price = 1 if quota[arc] <= own_A[arc] else 0
                if dist[r] + price < dist[g]:
                    dist[g], parent[g], via[g], changed = dist[r] + price, r, 4 * arc + 1, True
        for g in range(num_groups):
            k = expert0 + expert_G[g]
            price = -far if total_G[g] < near_G[g] else 0
            if dist[k] + price < dist[g]:
                dist[g], parent[g], via[g], changed = dist[k] + price, k, 4 * g + 2, True
            if total_G[g] > 0:
                price = far if total_G[g] <= near_G[g] else 0
                if dist[g] + price < dist[k]:
                    dist[k], parent[k], via[k], changed = dist[g] + price, g, 4 * g + 3, True
        for rank in range(num_ranks):
            r = rank0 + rank
            if room[rank] > 0 and dist[r] < dist[sink]:
                dist[sink], parent[sink], via[sink], changed = dist[r], r, -1, True
            if used_R[rank] > 0 and dist[sink] < dist[r]:
                dist[r], parent[r], via[r], changed = dist[sink], sink, -1, True
        if not changed:
            return cancelled
        # cycles in the graph of parents are negative; they have no vertex in common
        mark[:] = 0
        for begin in range(size):
            v = begin
            while v >= 0 and mark[v] == 0:
                mark[v] = begin + 1
                v = parent[v]
            if v < 0 or mark[v] != begin + 1:
                continue
            cancelled += 1
            _cancel(v, parent, via, quota, total_G, room, used_R, own_A, near_G, rank0, num_ranks, group_A)
            while v >= 0:  # its arcs have changed; any distances will do to go on from
                u = parent[v]
                parent[v] = -1
                v = u


@compiled
def _cancel(
    start: int,
    parent: Ints,
    via: Ints,
    quota: Ints,
    total_G: Ints,
    room: Ints,
    used_R: Ints,
    own_A: Ints,
    near_G: Ints,
    rank0: int,
    num_ranks: int,
    group_A: Ints,
) -> None:
    """Send as much as keeps every price around the cycle of parents through `start`."""
    amount = np.int64(1) << 62
    for turn in range(2):
        v = start
        while True:
            u, how = parent[v], via[v]
            if how < 0:
                into_sink = rank0 <= u < rank0 + num_ranks
                rank = (u if into_sink else v) - rank0
                if turn == 0:
                    amount = min(amount, room[rank] if into_sink else used_R[rank])
                else:
                    room[rank] -= amount if into_sink else -amount
                    used_R[rank] += amount if into_sink else -amount
            else:
                index, kind = how >> 2, how & 3
                if kind < 2:
                    now, kink = quota[index], own_A[index]
                else:
                    now, kink = total_G[index], near_G[index]
                if turn == 0:
                    if kind == 0 or kind == 2:
                        if now < kink:
                            amount = min(amount, kink - now)
                    else:
                        amount = min(amount, now if now <= kink else now - kink)
                elif kind == 0:
                    quota[index] += amount
                elif kind == 1:
                    quota[index] -= amount
                elif kind == 2:
                    total_G[index] += amount
                else:
                    total_G[index] -= amount
            v = u
            if v == start:
                break
