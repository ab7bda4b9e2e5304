# pyright: reportArgumentType=false, reportReturnType=false
"""Maximum flow behind the token split: the smallest possible time of the slowest rank, as compiled loops over flat
arrays.

The network. An expert with several copies is *flexible*; only these take part. Each of its copies is an arc from the
expert to a rank. Arc a leads from expert `expert_A[a]` to rank `rank_A[a]` and carries `flow_A[a]` tokens. Arcs lie
expert by expert (expert k has `first_arc_K[k]` to `first_arc_K[k + 1]`). `arcs_by_rank` lists them rank by rank, with
`first_arc_R` in the same way. A rank has a capacity: the tokens that it computes within the makespan. `slack_R` is the
part of it that is free.

Legend: K flexible experts, A arcs, R ranks. Q pairs of a flexible expert and a node that holds copies of it: `pair_A`
is the pair of each arc, and `local_Q` the tokens that the pair's node itself sends to the pair's expert. `own_A` are
the tokens that an arc's rank itself sends to the arc's expert.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.plan.compiled import Bools, Floats, Ints, compiled

_SMALL = 1e-9  # tokens: more than the rounding error of a time multiplied by a speed


@compiled
def sort_arcs_by_rank(rank_A: Ints, num_ranks: int) -> tuple[Ints, Ints]:
    """The arcs in order of their rank, int64[A], and the first of each rank in that order, int64[R + 1]."""
    first_arc_R = np.zeros(num_ranks + 1, np.int64)
    for rank in rank_A:
        first_arc_R[rank + 1] += 1
    for rank in range(num_ranks):
        first_arc_R[rank + 1] += first_arc_R[rank]
    arcs_by_rank = np.empty(len(rank_A), np.int64)
    place = first_arc_R.copy()
    for arc in range(len(rank_A)):
        arcs_by_rank[place[rank_A[arc]]] = arc
        place[rank_A[arc]] += 1
    return arcs_by_rank, first_arc_R


@compiled
def _raise_capacities(makespan: float, speed_R: Floats, capacity_R: Ints, slack_R: Ints) -> None:
    """Raise each rank's capacity to the whole tokens that it computes within the makespan."""
    for rank in range(len(capacity_R)):
        raised = np.int64(makespan * speed_R[rank] + _SMALL) - capacity_R[rank]
        if raised > 0:
            capacity_R[rank] += raised
            slack_R[rank] += raised


@compiled
def _raise_to_cut(needed: int, inside: Bools, speed_R: Floats, capacity_R: Ints, slack_R: Ints) -> None:
    """Raise the makespan until the ranks inside a cut have a capacity of `needed` tokens, which can go to no other
    rank.
    """
    speed, have = 0.0, np.int64(0)
    for rank in range(len(capacity_R)):
        if inside[rank]:
            speed += speed_R[rank]
    _raise_capacities(needed / speed, speed_R, capacity_R, slack_R)
    for rank in range(len(capacity_R)):
        if inside[rank]:
            have += capacity_R[rank]
    makespan = 0.0
    # rounding down lost less than one token per rank; add single tokens where they cost least time
    while have < needed:
        best, best_makespan = -1, np.inf
        for rank in range(len(capacity_R)):
            if inside[rank] and (capacity_R[rank] + 1) / speed_R[rank] < best_makespan:
                best, best_makespan = rank, (capacity_R[rank] + 1) / speed_R[rank]
        capacity_R[best] += 1
        slack_R[best] += 1
        have += 1
        makespan = max(makespan, best_makespan)
    if makespan > 0:
        _raise_capacities(makespan, speed_R, capacity_R, slack_R)


@compiled
def augment_flow(  # noqa: PLR0913 - compiled code sees plain arrays
    flow_A: Ints,
    unplaced_K: Ints,
    total_K: Ints,
    fixed_R: Ints,
    speed_R: Floats,
    expert_A: Ints,
    rank_A: Ints,
    first_arc_K: Ints,
    arcs_by_rank: Ints,
    first_arc_R: Ints,
    capacity_R: Ints,
    slack_R: Ints,
    local_Q: Ints,
    pair_A: Ints,
) -> None:
    """Place the remaining tokens of all experts with the smallest possible makespan.

    Discrete Newton method (Dinkelbach 1967) around blocking flows (Dinitz 1970). A search goes breadth first from an
    expert with unplaced tokens to the nearest ranks with slack; along a path, each expert passes tokens on to its next
    rank. `_push` then uses all shortest paths. If there is none, the ranks reached are a minimum cut, and the makespan
    rises to the need of the cut. The flow found so far stays valid, so few rises suffice. Two things leave less work
    for `cancel_cycles`: paths that displace only tokens from other nodes ("gentle") are tried first, and each expert
    is placed before the next (with paths from all experts at once, three times as many cycles are left). Changes
    `flow_A`, `unplaced_K`, `capacity_R` and `slack_R`.

    Args:
        total_K: tokens of each flexible expert.
        fixed_R: tokens of experts with one copy, per rank.
        speed_R: relative speed of each rank, above 0.

    The other arguments are those of the legend at the top of this file.
    """
    num_experts, num_ranks = len(total_K), len(fixed_R)
    remote_Q = -local_Q  # where positive: tokens that come from other nodes
    for arc in range(len(flow_A)):
        remote_Q[pair_A[arc]] += flow_A[arc]
    level_K = np.empty(num_experts, np.int64)  # experts before this one on a shortest path; -1: not reached
    level_R = np.empty(num_ranks, np.int64)  # level of the expert from which the rank is reached; -1: not reached
    queue = np.empty(num_experts, np.int64)
    start, gentle = 0, True
    while start < num_experts:
        if unplaced_K[start] == 0:
            start, gentle = start + 1, True
            continue
        level_K[:] = -1
        level_R[:] = -1
        level_K[start], queue[0] = 0, start
        head, tail, goal_level = 0, 1, np.int64(-1)
        while head < tail and (goal_level < 0 or level_K[queue[head]] <= goal_level):
            k = queue[head]
            head += 1
            for arc in range(first_arc_K[k], first_arc_K[k + 1]):
                rank = rank_A[arc]
                if level_R[rank] >= 0:
                    continue
                level_R[rank] = level_K[k]
                if slack_R[rank] > 0:
                    goal_level = level_K[k]
                if goal_level >= 0:
                    continue
                for index in range(first_arc_R[rank], first_arc_R[rank + 1]):
                    other = arcs_by_rank[index]
                    if (
                        flow_A[other] > 0
                        and level_K[expert_A[other]] < 0
                        and not (gentle and remote_Q[pair_A[other]] <= 0)
                    ):
                        level_K[expert_A[other]] = level_K[k] + 1
                        queue[tail] = expert_A[other]
                        tail += 1
        if goal_level >= 0:
            _push(
                start, flow_A, unplaced_K, expert_A, rank_A, first_arc_K, arcs_by_rank, first_arc_R, slack_R, remote_Q,
                pair_A, level_K, level_R, goal_level, gentle,
            )  # fmt: skip
        elif gentle:
            gentle = False
        else:
            needed = np.int64(0)
            for k in range(num_experts):
                if level_K[k] >= 0:
                    needed += total_K[k]
            for rank in range(num_ranks):
                if level_R[rank] >= 0:
                    needed += fixed_R[rank]
            _raise_to_cut(needed, level_R >= 0, speed_R, capacity_R, slack_R)
            gentle = True


@compiled
def _push(  # noqa: PLR0913 - compiled code sees plain arrays
    start: int,
    flow_A: Ints,
    unplaced_K: Ints,
    expert_A: Ints,
    rank_A: Ints,
    first_arc_K: Ints,
    arcs_by_rank: Ints,
    first_arc_R: Ints,
    slack_R: Ints,
    remote_Q: Ints,
    pair_A: Ints,
    level_K: Ints,
    level_R: Ints,
    goal_level: int,
    gentle: bool,
) -> None:
    """Send the tokens of `start` along shortest paths until each of these has a full place. Depth first.

    No arc is tried twice.
    """
    next_K, next_R = first_arc_K.copy(), first_arc_R.copy()
    into = np.empty(goal_level + 1, np.int64)  # the arcs of a path on which experts get tokens
    gives = np.empty(goal_level + 1, np.int64)  # and those on which the next experts give them up
    depth, k = 0, start
    while unplaced_K[start] > 0 and depth >= 0:
        found, deeper = False, False
        while next_K[k] < first_arc_K[k + 1]:
            arc = next_K[k]
            rank = rank_A[arc]
            if level_R[rank] == depth:
                into[depth] = arc
                found = slack_R[rank] > 0
                while not found and depth < goal_level and next_R[rank] < first_arc_R[rank + 1]:
                    other = arcs_by_rank[next_R[rank]]
                    may_give = flow_A[other] > 0 and not (gentle and remote_Q[pair_A[other]] <= 0)
                    if may_give and level_K[expert_A[other]] == depth + 1:
                        gives[depth], deeper = other, True
                        break
                    next_R[rank] += 1
                if found or deeper:
                    break
            next_K[k] += 1
        if deeper:
            k = expert_A[gives[depth]]
            depth += 1
            continue
        if not found:  # a dead end: the expert before goes on with its next arc
            depth -= 1
            if depth >= 0:
                next_R[rank_A[into[depth]]] += 1
                k = expert_A[into[depth]]
            continue
        goal = rank_A[into[depth]]
        amount = min(unplaced_K[start], slack_R[goal])
        for step in range(depth):
            amount = min(amount, flow_A[gives[step]])
            if gentle:
                amount = min(amount, remote_Q[pair_A[gives[step]]])
        slack_R[goal] -= amount
        unplaced_K[start] -= amount
        for step in range(depth + 1):
            flow_A[into[step]] += amount
            remote_Q[pair_A[into[step]]] += amount
            if step < depth:
                flow_A[gives[step]] -= amount
                remote_Q[pair_A[gives[step]]] -= amount
        depth, k = 0, start


@compiled
def initial_capacities(
    total: int, fixed_R: Ints, speed_R: Floats, reach_R: Bools, capacity_R: Ints, slack_R: Ints
) -> None:
    """Set capacities and slack to a lower bound of the makespan.

    The bound is the larger of the slowest rank's fixed load and the mean over the ranks that hold flexible experts.

    Args:
        total: tokens of all flexible experts.
        fixed_R: tokens of experts with one copy, per rank.
        reach_R: the rank holds a flexible expert.
    """
    makespan, speed = 0.0, 0.0
    for rank in range(len(fixed_R)):
        makespan = max(makespan, fixed_R[rank] / speed_R[rank])
        if reach_R[rank]:
            total += fixed_R[rank]
            speed += speed_R[rank]
    if speed > 0:
        makespan = max(makespan, total / speed)
    for rank in range(len(fixed_R)):
        capacity_R[rank] = max(np.int64(makespan * speed_R[rank] + _SMALL), fixed_R[rank])
        slack_R[rank] = capacity_R[rank] - fixed_R[rank]


@compiled
def greedy_flow(
    flow_A: Ints,
    unplaced_K: Ints,
    slack_R: Ints,
    own_A: Ints,
    local_Q: Ints,
    rank_A: Ints,
    first_arc_K: Ints,
    pair_A: Ints,
) -> None:
    """A first flow within the slack: tokens stay on their rank, then in their node, then go to the rank with most
    slack.

    Experts with the least choice come first: those with the fewest copies, then those with the fewest tokens. With two
    copies of each expert, this order leaves half as much work for `cancel_cycles`. Tokens that find no slack stay in
    `unplaced_K`.
    """
    order = np.argsort((first_arc_K[1:] - first_arc_K[:-1]) * (np.int64(1) << 40) + unplaced_K, kind="mergesort")
    taken_Q = np.zeros(len(local_Q), np.int64)
    for k in order:
        for arc in range(first_arc_K[k], first_arc_K[k + 1]):
            amount = min(own_A[arc], slack_R[rank_A[arc]], unplaced_K[k])
            flow_A[arc] += amount
            unplaced_K[k] -= amount
            slack_R[rank_A[arc]] -= amount
            taken_Q[pair_A[arc]] += amount
    for k in order:
        for arc in range(first_arc_K[k], first_arc_K[k + 1]):
            amount = min(local_Q[pair_A[arc]] - taken_Q[pair_A[arc]], slack_R[rank_A[arc]], unplaced_K[k])
            flow_A[arc] += amount
            unplaced_K[k] -= amount
            slack_R[rank_A[arc]] -= amount
            taken_Q[pair_A[arc]] += amount
    for k in order:
        if unplaced_K[k] == 0:
            continue
        begin = first_arc_K[k]
        for index in np.argsort(-slack_R[rank_A[begin : first_arc_K[k + 1]]], kind="mergesort"):
            arc = begin + index
            amount = min(unplaced_K[k], slack_R[rank_A[arc]])
            flow_A[arc] += amount
            unplaced_K[k] -= amount
            slack_R[rank_A[arc]] -= amount
