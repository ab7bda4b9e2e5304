"""Exact token split of one MoE layer over the copies of its experts: the smallest possible time of the slowest rank.

min z  such that  sum over ranks x[e, r] = w[e],  sum over experts x[e, r] <= z * speed[r]   (integers, x only where r has e).

For a fixed z this is a maximum flow. z starts at a lower bound; tokens go to their own rank where they fit, the rest along
augmenting paths; when none exists, the ranks reached from the stuck expert are a minimum cut, and z rises to what that set of
ranks needs (discrete Newton: few rises, and the flow found so far stays valid). See section 3 of the balance reference and
Dinkelbach (1967). Only experts with several copies take part, about one per spare slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.placement import Placement


def split_tokens(
    counts: NDArray[np.integer], placement: Placement, layer: int, speeds: Sequence[float] | None = None
) -> NDArray[np.int64]:
    """Tokens from source rank r to slot p, int64[R, P]. Every rank computes the same from the same counts.

    Args:
        counts: [R, E], tokens of each source rank routed to each expert.
        placement: where the copies are.
        layer: index among the MoE layers.
        speeds: relative speed per rank; None for equal ones. A rank of speed 0 gets only what no other can take.
    """
    counts_RE = np.asarray(counts, dtype=np.int64)
    num_ranks, num_experts = counts_RE.shape
    expert_P = placement.expert_of_slot[layer]
    used_P = np.flatnonzero(expert_P >= 0)
    expert_U, rank_U = expert_P[used_P], placement.rank_of_slot[used_P]
    copies_E = np.bincount(expert_U, minlength=num_experts)
    total_E = counts_RE.sum(axis=0)
    assert not (total_E * (copies_E == 0)).any(), "tokens for an expert without a copy"
    single_U = copies_E[expert_U] == 1
    out_RP = np.zeros((num_ranks, len(expert_P)), dtype=np.int64)
    out_RP[:, used_P[single_U]] = counts_RE[:, expert_U[single_U]]
    flexible = np.flatnonzero((copies_E > 1) & (total_E > 0))
    if not flexible.size:
        return out_RP
    fixed_R = np.zeros(num_ranks, dtype=np.int64)
    np.add.at(fixed_R, rank_U[single_U], total_E[expert_U[single_U]])
    row_E = np.full(num_experts, -1, dtype=np.int64)
    row_E[flexible] = np.arange(flexible.size)
    multi_U = np.flatnonzero(row_E[expert_U] >= 0)
    slot_KR = np.full((flexible.size, num_ranks), -1, dtype=np.int64)
    slot_KR[row_E[expert_U[multi_U]], rank_U[multi_U]] = used_P[multi_U]
    demand_KR = np.ascontiguousarray(counts_RE[:, flexible].T)
    quota_KR = _optimal_quota(demand_KR, slot_KR >= 0, fixed_R, _safe_speeds(speeds, num_ranks))
    sent_KRR = _match_sources(demand_KR, quota_KR)
    rows, ranks = np.nonzero(slot_KR >= 0)
    out_RP[:, slot_KR[rows, ranks]] = sent_KRR[rows, :, ranks].T
    return out_RP


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


def _optimal_quota(
    demand_KR: NDArray[np.int64], has_KR: NDArray[np.bool_], fixed_R: NDArray[np.int64], speeds: list[float]
) -> NDArray[np.int64]:
    """Tokens of each flexible expert on each rank, int64[K, R]; row sums are the demand's; the slowest rank is optimal."""
    num_ranks = len(speeds)
    weight: list[int] = demand_KR.sum(axis=1).tolist()
    fixed: list[int] = fixed_R.tolist()
    ranks_of: list[list[int]] = [np.flatnonzero(row).tolist() for row in has_KR]
    reachable = sorted({rank for ranks in ranks_of for rank in ranks})
    floor = max(load / speed for load, speed in zip(fixed, speeds, strict=True))
    mean = (sum(weight) + sum(fixed[r] for r in reachable)) / sum(speeds[r] for r in reachable)
    z = max(floor, mean)
    cap = [max(int(z * speed + 1e-9), load) for load, speed in zip(fixed, speeds, strict=True)]
    room = [cap[rank] - fixed[rank] for rank in range(num_ranks)]
    quota = [[0] * num_ranks for _ in weight]
    left = list(weight)
    local: list[list[int]] = demand_KR.tolist()
    for k, ranks in enumerate(ranks_of):  # own rank first
        for rank in ranks:
            _give(k, rank, min(local[k][rank], room[rank]), quota, left, room)
    for k, ranks in enumerate(ranks_of):  # then whoever has most room
        for rank in sorted(ranks, key=lambda rank: (-room[rank], rank)):
            _give(k, rank, min(left[k], room[rank]), quota, left, room)
    for k in range(len(weight)):
        while left[k]:
            reached, experts, last, parent = _search(k, ranks_of, quota, room)
            if last >= 0:
                _augment(k, last, parent, quota, left, room)
            else:
                _raise_caps(reached, experts, weight, fixed, speeds, cap, room)
    return np.array(quota, dtype=np.int64)


def _give(k: int, rank: int, tokens: int, quota: list[list[int]], left: list[int], room: list[int]) -> None:
    if tokens > 0:
        quota[k][rank] += tokens
        left[k] -= tokens
        room[rank] -= tokens


def _search(
    start: int, ranks_of: list[list[int]], quota: list[list[int]], room: list[int]
) -> tuple[list[int], list[int], int, dict[int, tuple[int, int]]]:
    """Breadth first from an expert with tokens left to a rank with room.

    Returns the ranks and experts reached, the rank with room (-1: none, so these ranks are a cut), and for each rank the
    expert that reaches it with the rank that the expert leaves (-1 at the start).
    """
    parent: dict[int, tuple[int, int]] = {}
    reached: list[int] = []
    experts = [start]
    open_experts = set(range(len(ranks_of))) - {start}
    frontier = [(start, -1)]
    while frontier:
        following: list[tuple[int, int]] = []
        for k, via in frontier:
            for rank in ranks_of[k]:
                if rank in parent:
                    continue
                parent[rank] = (k, via)
                reached.append(rank)
                if room[rank] > 0:
                    return reached, experts, rank, parent
                for other in sorted(open_experts):
                    if quota[other][rank] > 0:
                        open_experts.discard(other)
                        experts.append(other)
                        following.append((other, rank))
        frontier = following
    return reached, experts, -1, parent


def _augment(
    start: int,
    last: int,
    parent: dict[int, tuple[int, int]],
    quota: list[list[int]],
    left: list[int],
    room: list[int],
) -> None:
    """Push as much as fits along one path: each expert on it moves tokens on to the next rank."""
    path: list[tuple[int, int, int]] = []  # (expert, from rank or -1, to rank)
    rank = last
    while rank >= 0:
        k, via = parent[rank]
        path.append((k, via, rank))
        rank = via
    amount = min([left[start], room[last]] + [quota[k][via] for k, via, _ in path if via >= 0])
    for k, via, rank in path:
        quota[k][rank] += amount
        if via >= 0:
            quota[k][via] -= amount
    left[start] -= amount
    room[last] -= amount


def _raise_caps(
    ranks: list[int],
    experts: list[int],
    weight: list[int],
    fixed: list[int],
    speeds: list[float],
    cap: list[int],
    room: list[int],
) -> None:
    """Raise z to what a cut needs: these experts fit on no other ranks than these."""
    needed = sum(weight[k] for k in experts) + sum(fixed[rank] for rank in ranks)
    z = needed / sum(speeds[rank] for rank in ranks)
    _lift(range(len(cap)), z, speeds, cap, room)
    short = needed - sum(cap[rank] for rank in ranks)
    if short > 0:  # rounding down left less than one token per rank: the cheapest increments, exactly
        for _ in range(short):
            rank = min(ranks, key=lambda rank: ((cap[rank] + 1) / speeds[rank], rank))
            cap[rank] += 1
            room[rank] += 1
        _lift(range(len(cap)), max(cap[rank] / speeds[rank] for rank in ranks), speeds, cap, room)


def _lift(ranks: range, z: float, speeds: list[float], cap: list[int], room: list[int]) -> None:
    for rank in ranks:
        raised = int(z * speeds[rank] + 1e-9) - cap[rank]
        if raised > 0:
            cap[rank] += raised
            room[rank] += raised


def _match_sources(demand_KR: NDArray[np.int64], quota_KR: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of expert k from source rank s to rank r, int64[K, R, R]: own rank first, the rest in rank order."""
    own_KR = np.minimum(demand_KR, quota_KR)
    supply_end_KR = np.cumsum(demand_KR - own_KR, axis=1)
    quota_end_KR = np.cumsum(quota_KR - own_KR, axis=1)
    supply_start_KR = supply_end_KR - (demand_KR - own_KR)
    quota_start_KR = quota_end_KR - (quota_KR - own_KR)
    stop_KRR = np.minimum(supply_end_KR[:, :, None], quota_end_KR[:, None, :])
    start_KRR = np.maximum(supply_start_KR[:, :, None], quota_start_KR[:, None, :])
    sent_KRR = np.maximum(stop_KRR - start_KRR, 0)
    diagonal: NDArray[np.int64] = np.arange(demand_KR.shape[1], dtype=np.int64)
    sent_KRR[:, diagonal, diagonal] += own_KR
    return sent_KRR
