# pyright: reportArgumentType=false, reportReturnType=false
"""Change copies where today's load does not fit: the flow of the split, and at each of its cuts one copy across it.

Shapes: E experts, R ranks, P slots.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.compiled import compiled
from elastic_moe.plan.placement.replicas import Layer, add_copy, drop_copy
from elastic_moe.plan.split.max_flow import Ints

TOLERANCE = 1 / 512  # a plan this close to the bound is not changed any more


class _Flow(NamedTuple):
    """Copies, and how the load flows through them: what each slot takes, what experts have left, what room ranks have."""

    load_E: Ints
    start_R: Ints
    rank_P: Ints
    expert_P: Ints
    where: Ints
    copies_E: Ints
    home_E: Ints
    quota: Ints
    left_E: Ints
    room_R: Ints
    seen_E: NDArray[np.bool_]  # the search for a way: inside the cut
    seen_R: NDArray[np.bool_]
    into_R: Ints  # slot by which a rank was reached
    out_E: Ints  # slot from which an expert was reached
    flow_E: Ints


@compiled
def _augment(now: _Flow, start: int, goal: int) -> None:
    amount = min(now.left_E[start], now.room_R[goal])
    rank = goal
    while True:
        gives = now.out_E[now.expert_P[now.into_R[rank]]]
        if gives < 0:
            break
        amount = min(amount, now.quota[gives])
        rank = now.rank_P[gives]
    now.room_R[goal] -= amount
    now.left_E[start] -= amount
    rank = goal
    while True:
        now.quota[now.into_R[rank]] += amount
        gives = now.out_E[now.expert_P[now.into_R[rank]]]
        if gives < 0:
            break
        now.quota[gives] -= amount
        rank = now.rank_P[gives]


@compiled
def _cross(now: _Flow, crumb: int) -> bool:
    """Add one copy across the cut: of an expert inside (seen), on a rank outside, where least is lost. Whether that helped."""
    best_slot, best_gain = -1, np.int64(crumb)
    most = np.int64(0)
    for expert in range(len(now.load_E)):
        if now.seen_E[expert]:
            most = max(most, now.flow_E[expert])
    for rank in range(len(now.room_R)):
        if now.seen_R[rank] or now.room_R[rank] <= crumb:
            continue
        for slot in range(now.start_R[rank], now.start_R[rank + 1]):
            expert = now.expert_P[slot]
            lost = np.int64(0)
            if expert >= 0:
                if now.copies_E[expert] == 1 or now.home_E[expert] == rank:
                    continue
                lost = now.quota[slot]
            gain = min(most, now.room_R[rank] + lost) - lost
            if gain > best_gain:
                best_slot, best_gain = slot, gain
    if best_slot < 0:
        return False
    rank = now.rank_P[best_slot]
    dropped = now.expert_P[best_slot]
    space = now.room_R[rank] + now.quota[best_slot]
    best, best_flow = -1, np.int64(0)
    for expert in range(len(now.load_E)):
        if now.seen_E[expert] and expert != dropped:
            flow = min(now.flow_E[expert], space)
            if flow > best_flow or (flow == best_flow and best >= 0 and now.load_E[expert] > now.load_E[best]):
                best, best_flow = expert, flow
    if best < 0 or best_flow <= crumb:
        return False
    if dropped >= 0:
        now.left_E[dropped] += now.quota[best_slot]
        now.room_R[rank] += now.quota[best_slot]
        now.quota[best_slot] = 0
        drop_copy(best_slot, now.expert_P, now.where, now.copies_E)
    add_copy(best, best_slot, now.expert_P, now.where, now.copies_E)
    return True


@compiled
def _exchange(now: _Flow, crumb: int, home_moves: int) -> int:
    """Let a copy inside the cut change places with a cold expert outside that has no other. Returns home moves made; -1: no pair."""
    best_in, best_out, best_gain = -1, -1, np.int64(crumb)
    for outside in range(len(now.expert_P)):
        rank, cold = now.rank_P[outside], now.expert_P[outside]
        if now.seen_R[rank] or now.room_R[rank] <= best_gain or cold < 0 or now.copies_E[cold] != 1:
            continue
        pinned = 1 if now.home_E[cold] >= 0 else 0
        if pinned > home_moves:
            continue
        for inside in range(len(now.expert_P)):
            hot = now.expert_P[inside]
            if hot < 0 or not now.seen_R[now.rank_P[inside]] or not now.seen_E[hot]:
                continue
            if pinned + (1 if now.home_E[hot] == now.rank_P[inside] else 0) > home_moves:
                continue
            gain = now.load_E[hot] - now.load_E[cold]
            if gain > now.room_R[rank]:
                gain = (
                    now.room_R[rank] if now.copies_E[hot] > 1 else 2 * now.room_R[rank] - gain
                )  # alone, it brings too much
            if gain > best_gain or (
                best_in >= 0 and gain == best_gain and now.load_E[hot] > now.load_E[now.expert_P[best_in]]
            ):
                best_in, best_out, best_gain = inside, outside, gain
    if best_in < 0:
        return -1
    hot, cold = now.expert_P[best_in], now.expert_P[best_out]
    moved = 0
    for slot in (best_in, best_out):
        expert, rank = now.expert_P[slot], now.rank_P[slot]
        if now.home_E[expert] == rank:
            now.home_E[expert] = now.rank_P[best_out] if slot == best_in else now.rank_P[best_in]
            moved += 1
        now.left_E[expert] += now.quota[slot]
        now.room_R[rank] += now.quota[slot]
        now.quota[slot] = 0
    now.expert_P[best_in], now.expert_P[best_out] = cold, hot
    now.where[cold, 0] = best_in
    for index in range(now.copies_E[hot]):
        if now.where[hot, index] == best_in:
            now.where[hot, index] = best_out
    return moved


@compiled
def mend(layer: Layer, expert_P: Ints, home_E: Ints, changes: int, home_moves: int, goal: float) -> float:
    """Change copies until today's load fits into a time of `goal`, or no change helps, or `changes` are used up.

    Returns the time reached, 1 is the mean. `home_E` pins copies (-1: not pinned); at most `home_moves` pinned ones may change places.
    """
    load_E, target_R, start_R, rank_P, _, _, where, copies_E = layer
    num_experts, num_ranks, num_slots = len(load_E), len(target_R), len(expert_P)
    z = goal
    quota = np.zeros(num_slots, np.int64)
    left_E = load_E.copy()
    room_R = np.empty(num_ranks, np.int64)
    for rank in range(num_ranks):
        room_R[rank] = np.int64(target_R[rank] * z)
    for limit in (1, 2, 3, num_ranks):
        for expert in range(num_experts):
            if copies_E[expert] > limit:
                continue
            while left_E[expert] > 0:
                best = -1
                for index in range(copies_E[expert]):
                    slot = where[expert, index]
                    if room_R[rank_P[slot]] > 0 and (best < 0 or room_R[rank_P[slot]] > room_R[rank_P[best]]):
                        best = slot
                if best < 0:
                    break
                amount = min(left_E[expert], room_R[rank_P[best]])
                quota[best] += amount
                left_E[expert] -= amount
                room_R[rank_P[best]] -= amount
    seen_E, seen_R = np.empty(num_experts, np.bool_), np.empty(num_ranks, np.bool_)
    into_R, out_E, flow_E = (
        np.empty(num_ranks, np.int64),
        np.empty(num_experts, np.int64),
        np.empty(num_experts, np.int64),
    )
    now = _Flow(
        load_E,
        start_R,
        rank_P,
        expert_P,
        where,
        copies_E,
        home_E,
        quota,
        left_E,
        room_R,
        seen_E,
        seen_R,
        into_R,
        out_E,
        flow_E,
    )
    queue = np.empty(num_experts, np.int64)
    crumb = np.int64(target_R.max() / 8192)
    start, idle = 0, 0
    while idle < num_experts:  # copies dropped on the way may leave something again
        if left_E[start] <= 0:
            start, idle = (start + 1) % num_experts, idle + 1
            continue
        idle = 0
        seen_E[:] = False
        seen_R[:] = False
        seen_E[start], out_E[start], flow_E[start], queue[0] = True, -1, left_E[start], start
        head, tail, end = 0, 1, -1
        while head < tail and end < 0:
            expert = queue[head]
            head += 1
            for index in range(copies_E[expert]):
                slot = where[expert, index]
                rank = rank_P[slot]
                if seen_R[rank]:
                    continue
                seen_R[rank], into_R[rank] = True, slot
                if room_R[rank] > 0:
                    end = rank
                    break
                for other in range(start_R[rank], start_R[rank + 1]):
                    found = expert_P[other]
                    if found >= 0 and quota[other] > 0 and not seen_E[found]:
                        seen_E[found], out_E[found], queue[tail] = True, other, found
                        flow_E[found] = min(flow_E[expert], quota[other])
                        tail += 1
        if end >= 0:
            _augment(now, start, end)
            continue
        if changes > 0:
            done = _cross(now, crumb)
            if not done:
                moved = _exchange(now, crumb, home_moves)
                if moved >= 0:
                    done = True
                    home_moves -= moved
            if done:
                changes -= 1
                continue
        need, speed = np.int64(0), 0.0
        for expert in range(num_experts):
            if seen_E[expert]:
                need += left_E[expert]
        for rank in range(num_ranks):
            if seen_R[rank]:
                speed += target_R[rank]
        rise = need / speed + 1e-9
        z += rise
        for rank in range(num_ranks):
            room_R[rank] += np.int64(target_R[rank] * rise) + (1 if target_R[rank] > 1.0 else 0)
    return z
