# pyright: reportArgumentType=false, reportReturnType=false
"""Too few slots to link all ranks: ranks in groups that are linked within, and the experts divided over the groups.

Two ranks that share an expert belong to one group. m ranks with s slots in all need m - 1 of these to be linked, so they hold s - m + 1
experts; and those they can divide exactly (`pieces.py`). With P slots there is room for P - E such links, so the best placement is the
best division of the ranks into R - (P - E) groups, and of the experts over these, each with a limit to their number: number partitioning
with limited cardinality. It begins with every rank for itself. What is too full exchanges experts with the other groups, and what no
exchange can help is merged with the emptiest; when no links are left, ranks change groups.

Shapes: E experts, the heaviest first; R ranks; G = R groups, each goes by the number of one of its ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.compiled import compiled
from elastic_moe.plan.placement.bin_packing import cut_pieces
from elastic_moe.plan.placement.replicas import Layer, index_copies
from elastic_moe.plan.split.max_flow import Floats, Ints

_TRIALS = 256  # changes of ranks looked at before the division is left as it is
_STEP = 1e-6  # of the mean: what a change must bring


class _Division(NamedTuple):
    """The groups of ranks and experts; target, load, slots and numbers of each group, `live_G` where there is one."""

    load_E: Ints
    target_R: Floats
    slots_R: Ints
    group_E: Ints
    group_R: Ints
    live_G: NDArray[np.bool_]
    target_G: Floats
    most_G: Ints
    experts_G: Ints
    load_G: Ints


@compiled
def _copied(now: _Division) -> _Division:
    return _Division(
        now.load_E,
        now.target_R,
        now.slots_R,
        now.group_E.copy(),
        now.group_R.copy(),
        now.live_G.copy(),
        now.target_G.copy(),
        now.most_G.copy(),
        now.experts_G.copy(),
        now.load_G.copy(),
    )


@compiled
def _fullest(now: _Division) -> tuple[int, float]:
    group, z = -1, -1.0
    for other in range(len(now.load_G)):
        if now.live_G[other] and now.load_G[other] / now.target_G[other] > z:
            group, z = other, now.load_G[other] / now.target_G[other]
    return group, z


@compiled
def _give(now: _Division, expert: int, group: int) -> None:
    """An expert goes to another group."""
    before = now.group_E[expert]
    now.experts_G[before] -= 1
    now.load_G[before] -= now.load_E[expert]
    now.group_E[expert] = group
    now.experts_G[group] += 1
    now.load_G[group] += now.load_E[expert]


@compiled
def _give_rank(now: _Division, rank: int, group: int) -> None:
    """A rank goes to another group; the number of links stays."""
    before = now.group_R[rank]
    now.target_G[before] -= now.target_R[rank]
    now.most_G[before] -= now.slots_R[rank] - 1
    now.group_R[rank] = group
    now.target_G[group] += now.target_R[rank]
    now.most_G[group] += now.slots_R[rank] - 1


@compiled
def _begin(load_E: Ints, target_R: Floats, slots_R: Ints) -> _Division:
    """Every rank for itself: each expert, the heaviest first, to the rank that is done first and has a slot."""
    num_ranks = len(slots_R)
    now = _Division(
        load_E,
        target_R,
        slots_R,
        np.full(len(load_E), -1),
        np.arange(num_ranks),
        slots_R > 0,
        target_R.copy(),
        slots_R.copy(),
        np.zeros(num_ranks, np.int64),
        np.zeros(num_ranks, np.int64),
    )
    for expert in range(len(load_E)):
        best, best_z = -1, np.inf
        for rank in range(num_ranks):
            if now.experts_G[rank] < slots_R[rank]:
                z = (now.load_G[rank] + load_E[expert]) / target_R[rank]
                if z < best_z:
                    best, best_z = rank, z
        now.group_E[expert] = best
        now.experts_G[best] += 1
        now.load_G[best] += load_E[expert]
    return now


@compiled
def _after(now: _Division, group: int, load: int, other: int) -> float:
    """The slower one's time once a group has given so much load to another."""
    return max((now.load_G[group] - load) / now.target_G[group], (now.load_G[other] + load) / now.target_G[other])


@compiled
def _exchange_experts(now: _Division) -> float:
    """While it helps, the fullest group gives an expert away or for a lighter one. Returns the fullest group's time."""
    num_experts, num_groups = len(now.load_E), len(now.load_G)
    while True:
        group, z = _fullest(now)
        gives, takes, goal, best_z = -1, -1, -1, z - _STEP
        for expert in range(num_experts):
            if now.group_E[expert] != group:
                continue
            for other in range(num_groups):
                if now.live_G[other] and other != group and now.experts_G[other] < now.most_G[other]:
                    worse = _after(now, group, now.load_E[expert], other)
                    if worse < best_z:
                        gives, takes, goal, best_z = expert, -1, other, worse
            for lighter in range(num_experts - 1, expert, -1):
                less = now.load_E[expert] - now.load_E[lighter]
                if (now.load_G[group] - less) / now.target_G[group] >= best_z:
                    break  # the next ones are heavier
                other = now.group_E[lighter]
                if other != group:
                    worse = _after(now, group, less, other)
                    if worse < best_z:
                        gives, takes, goal, best_z = expert, lighter, other, worse
        if gives < 0:
            return z
        _give(now, gives, goal)
        if takes >= 0:
            _give(now, takes, group)


@compiled
def _make_room(now: _Division, group: int) -> None:
    """Experts beyond what the group's slots can hold go where that is best."""
    while now.experts_G[group] > now.most_G[group]:
        gives, goal, best_z = -1, -1, np.inf
        for other in range(len(now.load_G)):
            if now.live_G[other] and other != group and now.experts_G[other] < now.most_G[other]:
                for expert in range(len(now.load_E)):
                    if now.group_E[expert] == group:
                        worse = _after(now, group, now.load_E[expert], other)
                        if worse < best_z:
                            gives, goal, best_z = expert, other, worse
        _give(now, gives, goal)


@compiled
def _merge(now: _Division, group: int) -> bool:
    """Link a group with the one that leaves both fastest. Whether there was one."""
    best, best_z = -1, np.inf
    for other in range(len(now.load_G)):
        if now.live_G[other] and other != group:
            z = (now.load_G[group] + now.load_G[other]) / (now.target_G[group] + now.target_G[other])
            if z < best_z:
                best, best_z = other, z
    if best < 0:
        return False
    for rank in range(len(now.group_R)):
        if now.group_R[rank] == best:
            _give_rank(now, rank, group)
    for expert in range(len(now.load_E)):
        if now.group_E[expert] == best:
            _give(now, expert, group)
    now.live_G[best] = False
    _make_room(now, group)
    return True


@compiled
def _alike(now: _Division, rank: int, other: int) -> bool:
    return now.slots_R[other] == now.slots_R[rank] and now.target_R[other] == now.target_R[rank]


@compiled
def _stands_for_others(now: _Division, rank: int) -> bool:
    """Whether no earlier rank of its group is like it."""
    first = 0
    while now.group_R[first] != now.group_R[rank] or not _alike(now, rank, first):
        first += 1
    return first == rank


@compiled
def _other_ranks(now: _Division, trials: int) -> tuple[_Division, int]:
    """The first change that helps: the fullest group gets a rank from another group, or a larger one for a smaller. And the trials left."""
    num_ranks = len(now.group_R)
    group, z = _fullest(now)
    ranks_G = np.zeros(num_ranks, np.int64)
    for rank in range(num_ranks):
        ranks_G[now.group_R[rank]] += 1
    order = np.argsort(np.where(now.live_G, now.load_G / np.maximum(now.target_G, 1e-9), np.inf), kind="mergesort")
    for other in order:
        if not now.live_G[other] or other == group:
            continue
        for rank in range(num_ranks):
            if now.group_R[rank] != other or not _stands_for_others(now, rank):
                continue
            for back in range(-1, num_ranks):  # -1: none
                if back < 0 and ranks_G[other] < 2:
                    continue
                if back >= 0 and (now.group_R[back] != group or not _stands_for_others(now, back)):
                    continue
                if back >= 0 and _alike(now, rank, back):
                    continue
                if trials == 0:
                    return now, 0
                trials -= 1
                trial = _copied(now)
                _give_rank(trial, rank, group)
                if back >= 0:
                    _give_rank(trial, back, other)
                _make_room(trial, other)
                _make_room(trial, group)
                if _exchange_experts(trial) < z - _STEP:
                    return trial, trials
    return now, 0


@compiled
def _sums_from_lightest(load_E: Ints) -> Ints:
    """Load of the n lightest experts, [E + 1], of loads with the heaviest first."""
    light = np.zeros(len(load_E) + 1, np.int64)
    light[1:] = np.cumsum(load_E[::-1])
    return light


@compiled
def guess_least(load_E: Ints, target_R: Floats, slots_R: Ints) -> float:
    """A guess of the shortest time, 1 is the mean: what the hot experts must share their ranks with.

    With u of the spare slots an expert's group has at most u + 1 ranks, and u fewer experts than slots. Experts that take longer than the time
    on one rank are counted as if each had a group of its own; two others that need a slot to spare may share it.

    Args:
        load_E: the heaviest first.
    """
    light = _sums_from_lightest(load_E)
    num_experts, slots, target, links = len(load_E), slots_R.max(), target_R.max(), slots_R.sum() - len(load_E)
    for rank in range(len(slots_R)):
        if slots_R[rank] > 0:
            slots = min(slots, slots_R[rank])
    low, high = 1.0, 1.0 + load_E[0] / target
    for _ in range(16):
        z = (low + high) / 2
        left, halves = links, 0
        for expert in range(num_experts):
            used, fits = -1, False
            while not fits and used < left:
                used += 1
                for ranks in range(1, used + 2):
                    others = min(max(ranks * slots - used - 1, 0), num_experts - 1)
                    fits |= load_E[expert] + light[others] <= ranks * z * target
            if not fits:
                left = -1
            elif load_E[expert] > z * target:
                left -= used
            else:
                halves += min(used, 1)
            if used == 0 or left < 0:
                break
        low, high = (z, high) if left < (halves + 1) // 2 else (low, z)
    return high


@compiled
def divide(load_E: Ints, target_R: Floats, slots_R: Ints, goal: float) -> _Division:
    """Ranks and experts in groups, so that the fullest group takes as little time as possible, or `goal`; 1 is the mean.

    Args:
        load_E: the heaviest first.
        target_R: the share of the load that each rank's speed makes its own.
        slots_R: slots; none for a rank that computes nothing.
    """
    now = _begin(load_E, target_R, slots_R)
    links = slots_R.sum() - len(load_E)
    light = _sums_from_lightest(load_E)
    while True:
        group, z = _fullest(now)
        if z <= goal:
            break
        hot = 0
        while now.group_E[hot] != group:
            hot += 1
        others = max(min(now.most_G[group] - links, now.experts_G[group]) - 1, 0)
        if links == 0 or load_E[hot] + light[others] <= goal * now.target_G[group]:  # else no exchange can do
            if _exchange_experts(now) <= goal or links == 0:
                break
            group, z = _fullest(now)
        if not _merge(now, group):
            break
        links -= 1
    trials = _TRIALS
    while trials > 0 and _fullest(now)[1] > goal:
        now, trials = _other_ranks(now, trials)
    return now


@compiled
def group_copies(layer: Layer, expert_P: Ints, goal: float) -> float:
    """Fill empty slots by groups. Returns the fullest group's time, 1 is the mean, if each divides its load exactly.

    Ranks that are alike are alike to the division: each group takes them in turns over the nodes (`turn_R`).
    """
    load_E, target_R, start_R, _, _, turn_R, where, copies_E = layer
    num_ranks = len(target_R)
    order = np.argsort(-load_E, kind="mergesort")
    slots_R = start_R[1:] - start_R[:-1]
    groups = divide(load_E[order], target_R, slots_R, goal)
    taken_R = np.zeros(num_ranks, np.bool_)
    for group in range(num_ranks):
        if not groups.live_G[group]:
            continue
        ranks, size = np.empty(num_ranks, np.int64), 0
        for like in range(num_ranks):
            if groups.group_R[like] != group:
                continue
            for rank in turn_R:
                if not taken_R[rank] and _alike(groups, rank, like):
                    taken_R[rank] = True
                    ranks[size] = rank
                    size += 1
                    break
        few_first = np.argsort(slots_R[ranks[:size]], kind="mergesort")  # ranks with few slots need the heavy pieces
        ranks = ranks[few_first]
        experts = order[groups.group_E == group]
        start = np.zeros(size + 1, np.int64)
        start[1:] = np.cumsum(slots_R[ranks])
        target = target_R[ranks] * (groups.load_G[group] / groups.target_G[group])
        inside_P = np.full(start[size], -1)
        inside = np.empty((len(experts), size), np.int64)
        cut_pieces(
            load_E[experts],
            target,
            start,
            np.arange(size),
            np.zeros((len(experts), size), np.bool_),
            inside_P,
            inside,
            np.zeros(len(experts), np.int64),
        )
        for index in range(size):
            for slot in range(start[index], start[index + 1]):
                if inside_P[slot] >= 0:
                    expert_P[start_R[ranks[index]] + slot - start[index]] = experts[inside_P[slot]]
    index_copies(expert_P, where, copies_E)
    return _fullest(groups)[1]
