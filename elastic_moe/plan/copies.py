"""Which copies of a layer's experts go on which ranks, as compiled loops; `placement.py` says what for.

Three parts. *Construct*: copies by load, each new one linking ranks that no chain of shared experts links yet. Linked ranks can pass
load on, whatever tomorrow's load is, and R - 1 links make one component of all ranks; that is what P >= E + R - 1 slots are good for.
*Mend*: the flow of `flow.py` on today's load; where it meets a cut, one copy is added across it, in the place of one that does
little. *Homes*: one copy of each expert.

Loads are integers, so that the order of sums does not matter. Shapes: E experts, R ranks, P slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.compiled import compiled
from elastic_moe.plan.flow import Floats, Ints

EMPTY = -1
TOLERANCE = 1 / 512  # a plan this close to the bound is not changed any more
ENOUGH = 1 / 0.98  # with free choice of homes: a plan worse than this is made anew
_FIXED_WEIGHT = 0.7  # how much a rank's shares of replicated experts count when the others are placed
_NODE_WORTH = 0.1  # of a rank's mean load: what a copy in another node may cost


@compiled
def appetite(load_E: Ints) -> Floats:
    """w ** (7/8), by operations that round alike everywhere: hot experts get a little less than their share of copies."""
    out = np.empty(len(load_E), np.float64)
    for expert in range(len(load_E)):
        load = np.float64(load_E[expert])
        out[expert] = load / np.sqrt(np.sqrt(np.sqrt(load)))
    return out


@compiled
def _find(link: Ints, vertex: int) -> int:
    while link[vertex] != vertex:
        link[vertex] = link[link[vertex]]
        vertex = link[vertex]
    return vertex


@compiled
def _put(expert: int, rank: int, slot: int, expert_P: Ints, where: Ints, copies_E: Ints, free_R: Ints, link: Ints) -> None:
    expert_P[slot] = expert
    where[expert, copies_E[expert]] = slot
    copies_E[expert] += 1
    free_R[rank] -= 1
    link[_find(link, len(free_R) + expert)] = _find(link, rank)


@compiled
def _free_slot(rank: int, start_R: Ints, expert_P: Ints) -> int:
    for slot in range(start_R[rank], start_R[rank + 1]):
        if expert_P[slot] < 0:
            return slot
    return -1


@compiled
def _choose_rank(
    expert: int,
    share: float,
    linking: bool,
    expert_P: Ints,
    rank_P: Ints,
    where: Ints,
    copies_E: Ints,
    free_R: Ints,
    link: Ints,
    node_R: Ints,
    target_R: Floats,
    load_R: Floats,
    has_R: NDArray[np.bool_],
    has_N: NDArray[np.bool_],
) -> int:
    """The rank with the least load for its speed that a copy would link anew, else any; another node if that costs little; -1: none."""
    num_ranks = len(free_R)
    has_R[:] = False
    has_N[:] = False
    for index in range(copies_E[expert]):
        rank = rank_P[where[expert, index]]
        has_R[rank] = True
        has_N[node_R[rank]] = True
    mine = _find(link, num_ranks + expert)
    best, best_cost = -1, np.inf
    for turn in range(2):
        if turn == 1 and best >= 0:
            break
        for rank in range(num_ranks):
            if free_R[rank] <= 0 or has_R[rank]:
                continue
            if turn == 0 and linking and _find(link, rank) == mine:
                continue
            cost = (load_R[rank] + share) / target_R[rank]
            if has_N[node_R[rank]]:
                cost += _NODE_WORTH
            if cost < best_cost:
                best, best_cost = rank, cost
        if not linking:
            break
    return best


@compiled
def construct(
    load_E: Ints,
    target_R: Floats,
    start_R: Ints,
    rank_P: Ints,
    node_R: Ints,
    expert_P: Ints,
    where: Ints,
    copies_E: Ints,
) -> None:
    """Fill the empty slots of `expert_P`; `where` [E, R] and `copies_E` say what is there already, and are kept up to date."""
    num_experts, num_ranks = len(load_E), len(target_R)
    hunger_E = appetite(load_E)
    free_R = np.zeros(num_ranks, np.int64)
    link = np.arange(num_ranks + num_experts)
    has_R, has_N = np.zeros(num_ranks, np.bool_), np.zeros(num_ranks, np.bool_)
    empty = 0
    for slot in range(len(expert_P)):
        if expert_P[slot] < 0:
            free_R[rank_P[slot]] += 1
            empty += 1
        else:
            link[_find(link, num_ranks + expert_P[slot])] = _find(link, rank_P[slot])
    # how many copies each expert is to have
    wanted_E = copies_E.copy()
    for expert in range(num_experts):
        if wanted_E[expert] == 0:
            wanted_E[expert] = 1
            empty -= 1
    able_R = 0
    for rank in range(num_ranks):
        able_R += start_R[rank + 1] > start_R[rank]
    most = target_R.max()
    for expert in np.argsort(-load_E, kind="mergesort"):  # first what the load needs at least
        while empty > 0 and wanted_E[expert] < able_R and load_E[expert] > most * wanted_E[expert]:
            wanted_E[expert] += 1
            empty -= 1
    # a heap would do; a scan per copy is as fast for a few hundred experts
    while empty > 0:
        best, best_worth = -1, -1.0
        for expert in range(num_experts):
            worth = hunger_E[expert] / wanted_E[expert]
            if worth > best_worth and wanted_E[expert] < able_R:
                best, best_worth = expert, worth
        if best < 0:
            break
        wanted_E[best] += 1
        empty -= 1
    # what the ranks carry already
    load_R = np.zeros(num_ranks, np.float64)
    for slot in range(len(expert_P)):
        if expert_P[slot] >= 0:
            load_R[rank_P[slot]] += load_E[expert_P[slot]] / wanted_E[expert_P[slot]]
    share_E = load_E / wanted_E
    for expert in np.argsort(-share_E, kind="mergesort"):
        if wanted_E[expert] == 1:
            continue
        while copies_E[expert] < wanted_E[expert]:
            rank = _choose_rank(
                expert, share_E[expert], True, expert_P, rank_P, where, copies_E, free_R, link, node_R, target_R, load_R, has_R, has_N
            )
            if rank < 0:
                break
            _put(expert, rank, _free_slot(rank, start_R, expert_P), expert_P, where, copies_E, free_R, link)
            load_R[rank] += share_E[expert]
    load_R *= _FIXED_WEIGHT
    for expert in np.argsort(-load_E, kind="mergesort"):
        if copies_E[expert] == 0:
            rank = _choose_rank(
                expert, share_E[expert], False, expert_P, rank_P, where, copies_E, free_R, link, node_R, target_R, load_R, has_R, has_N
            )
            _put(expert, rank, _free_slot(rank, start_R, expert_P), expert_P, where, copies_E, free_R, link)
            load_R[rank] += load_E[expert]
    # an expert may have found no further rank: others take what is left
    for expert in np.argsort(-share_E, kind="mergesort"):
        while True:
            rank = _choose_rank(
                expert, 0.0, True, expert_P, rank_P, where, copies_E, free_R, link, node_R, target_R, load_R, has_R, has_N
            )
            if rank < 0:
                break
            _put(expert, rank, _free_slot(rank, start_R, expert_P), expert_P, where, copies_E, free_R, link)


@compiled
def _drop(slot: int, expert_P: Ints, where: Ints, copies_E: Ints) -> None:
    expert = expert_P[slot]
    last = copies_E[expert] - 1
    for index in range(last):
        if where[expert, index] == slot:
            for later in range(index, last):
                where[expert, later] = where[expert, later + 1]
            break
    copies_E[expert] = last
    expert_P[slot] = EMPTY


@compiled
def _add(expert: int, slot: int, expert_P: Ints, where: Ints, copies_E: Ints) -> None:
    expert_P[slot] = expert
    where[expert, copies_E[expert]] = slot
    copies_E[expert] += 1


@compiled
def mend(
    load_E: Ints,
    target_R: Floats,
    start_R: Ints,
    rank_P: Ints,
    expert_P: Ints,
    where: Ints,
    copies_E: Ints,
    home_E: Ints,
    changes: int,
    home_moves: int,
) -> float:
    """Change copies until today's load fits, or no change helps, or `changes` are used up. Returns the time reached, 1 is the mean.

    `home_E` pins copies (-1: not pinned); at most `home_moves` pinned ones may change places with another.
    """
    num_experts, num_ranks, num_slots = len(load_E), len(target_R), len(expert_P)
    z = 1.0 + TOLERANCE
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
    into_R, out_E, flow_E = np.empty(num_ranks, np.int64), np.empty(num_experts, np.int64), np.empty(num_experts, np.int64)
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
        head, tail, goal = 0, 1, -1
        while head < tail and goal < 0:
            expert = queue[head]
            head += 1
            for index in range(copies_E[expert]):
                slot = where[expert, index]
                rank = rank_P[slot]
                if seen_R[rank]:
                    continue
                seen_R[rank], into_R[rank] = True, slot
                if room_R[rank] > 0:
                    goal = rank
                    break
                for other in range(start_R[rank], start_R[rank + 1]):
                    found = expert_P[other]
                    if found >= 0 and quota[other] > 0 and not seen_E[found]:
                        seen_E[found], out_E[found], queue[tail] = True, other, found
                        flow_E[found] = min(flow_E[expert], quota[other])
                        tail += 1
        if goal >= 0:
            _augment(start, goal, into_R, out_E, quota, left_E, room_R, expert_P, rank_P)
            continue
        if changes > 0:
            done = _cross(
                load_E, start_R, rank_P, expert_P, where, copies_E, home_E, quota, left_E, room_R, seen_E, seen_R, flow_E, crumb
            )
            if not done:
                moved = _exchange(
                    load_E, start_R, rank_P, expert_P, where, copies_E, home_E, quota, left_E, room_R, seen_E, seen_R, crumb, home_moves
                )
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


@compiled
def _augment(
    start: int,
    goal: int,
    into_R: Ints,
    out_E: Ints,
    quota: Ints,
    left_E: Ints,
    room_R: Ints,
    expert_P: Ints,
    rank_P: Ints,
) -> None:
    amount = min(left_E[start], room_R[goal])
    rank = goal
    while True:
        gives = out_E[expert_P[into_R[rank]]]
        if gives < 0:
            break
        amount = min(amount, quota[gives])
        rank = rank_P[gives]
    room_R[goal] -= amount
    left_E[start] -= amount
    rank = goal
    while True:
        quota[into_R[rank]] += amount
        gives = out_E[expert_P[into_R[rank]]]
        if gives < 0:
            break
        quota[gives] -= amount
        rank = rank_P[gives]


@compiled
def _cross(
    load_E: Ints,
    start_R: Ints,
    rank_P: Ints,
    expert_P: Ints,
    where: Ints,
    copies_E: Ints,
    home_E: Ints,
    quota: Ints,
    left_E: Ints,
    room_R: Ints,
    seen_E: NDArray[np.bool_],
    seen_R: NDArray[np.bool_],
    flow_E: Ints,
    crumb: int,
) -> bool:
    """Add one copy across the cut: of an expert inside (seen), on a rank outside, where least is lost. Whether that helped."""
    best_slot, best_gain = -1, np.int64(crumb)
    most = np.int64(0)
    for expert in range(len(load_E)):
        if seen_E[expert]:
            most = max(most, flow_E[expert])
    for rank in range(len(room_R)):
        if seen_R[rank] or room_R[rank] <= crumb:
            continue
        for slot in range(start_R[rank], start_R[rank + 1]):
            expert = expert_P[slot]
            lost = np.int64(0)
            if expert >= 0:
                if copies_E[expert] == 1 or home_E[expert] == rank:
                    continue
                lost = quota[slot]
            gain = min(most, room_R[rank] + lost) - lost
            if gain > best_gain:
                best_slot, best_gain = slot, gain
    if best_slot < 0:
        return False
    rank = rank_P[best_slot]
    dropped = expert_P[best_slot]
    space = room_R[rank] + quota[best_slot]
    best, best_flow = -1, np.int64(0)
    for expert in range(len(load_E)):
        if seen_E[expert] and expert != dropped:
            flow = min(flow_E[expert], space)
            if flow > best_flow or (flow == best_flow and best >= 0 and load_E[expert] > load_E[best]):
                best, best_flow = expert, flow
    if best < 0 or best_flow <= crumb:
        return False
    if dropped >= 0:
        left_E[dropped] += quota[best_slot]
        room_R[rank] += quota[best_slot]
        quota[best_slot] = 0
        _drop(best_slot, expert_P, where, copies_E)
    _add(best, best_slot, expert_P, where, copies_E)
    return True


@compiled
def _exchange(
    load_E: Ints,
    start_R: Ints,
    rank_P: Ints,
    expert_P: Ints,
    where: Ints,
    copies_E: Ints,
    home_E: Ints,
    quota: Ints,
    left_E: Ints,
    room_R: Ints,
    seen_E: NDArray[np.bool_],
    seen_R: NDArray[np.bool_],
    crumb: int,
    home_moves: int,
) -> int:
    """Let a copy inside the cut change places with a cold expert outside that has no other. Returns home moves made; -1: no pair."""
    best_in, best_out, best_gain = -1, -1, np.int64(crumb)
    for outside in range(len(expert_P)):
        rank, cold = rank_P[outside], expert_P[outside]
        if seen_R[rank] or room_R[rank] <= crumb or cold < 0 or copies_E[cold] != 1:
            continue
        pinned = 1 if home_E[cold] >= 0 else 0
        if pinned > home_moves:
            continue
        space = room_R[rank] + load_E[cold]
        if space - load_E[cold] <= best_gain:
            continue
        for inside in range(len(expert_P)):
            hot = expert_P[inside]
            if hot < 0 or not seen_R[rank_P[inside]] or not seen_E[hot]:
                continue
            if pinned + (1 if home_E[hot] == rank_P[inside] else 0) > home_moves:
                continue
            gain = load_E[hot] - load_E[cold]
            if gain > room_R[rank]:
                gain = room_R[rank] if copies_E[hot] > 1 else 2 * room_R[rank] - gain  # alone, it brings too much
            if gain > best_gain or (best_in >= 0 and gain == best_gain and load_E[hot] > load_E[expert_P[best_in]]):
                best_in, best_out, best_gain = inside, outside, gain
    if best_in < 0:
        return -1
    hot, cold = expert_P[best_in], expert_P[best_out]
    moved = 0
    for slot in (best_in, best_out):
        expert, rank = expert_P[slot], rank_P[slot]
        if home_E[expert] == rank:
            home_E[expert] = rank_P[best_out] if slot == best_in else rank_P[best_in]
            moved += 1
        left_E[expert] += quota[slot]
        room_R[rank] += quota[slot]
        quota[slot] = 0
    expert_P[best_in], expert_P[best_out] = cold, hot
    where[cold, 0] = best_in
    for index in range(copies_E[hot]):
        if where[hot, index] == best_in:
            where[hot, index] = best_out
    return moved


@compiled
def cut_pieces(
    load_E: Ints, target_R: Floats, start_R: Ints, rank_order: Ints, expert_P: Ints, where: Ints, copies_E: Ints
) -> None:
    """Fill all slots so that every rank can be filled exactly: possible for any load with equal ranks and P >= E + R - 1.

    The experts are a pool of pieces in order of size. Each rank takes the first window of as many consecutive pieces as it has slots
    whose sum reaches its target, and cuts the last one; what it leaves of that goes back to the pool. All but the last piece fit whole,
    because the window before did not reach the target; so each rank but the last adds one piece at most (splittable bin packing with
    cardinality constraints). With unequal ranks, or fewer slots, it is a heuristic.
    """
    num_experts = len(load_E)
    pool = np.argsort(load_E, kind="mergesort")  # experts, lightest piece first
    rest_E = load_E.copy()
    size, later = num_experts, start_R[-1]
    for turn in range(len(rank_order)):
        rank = rank_order[turn]
        slots = start_R[rank + 1] - start_R[rank]
        later -= slots
        if slots == 0 or size == 0:
            continue
        target = np.int64(target_R[rank])
        width = min(slots, size)
        total = np.int64(0)
        for index in range(width):
            total += rest_E[pool[index]]
        begin = 0
        while total < target and begin + width < size:
            total += rest_E[pool[begin + width]] - rest_E[pool[begin]]
            begin += 1
        taken, have = 0, np.int64(0)
        while taken < width and (have < target or size - taken > later):
            expert = pool[begin + taken]
            taken += 1
            slot = start_R[rank] + taken - 1
            _add(expert, slot, expert_P, where, copies_E)
            have += rest_E[expert]
        last = pool[begin + taken - 1]
        for index in range(begin, size - taken):
            pool[index] = pool[index + taken]
        size -= taken
        back = have - target
        if back > 0 and size < later:  # in its place by size
            rest_E[last] = back
            place = size
            while place > 0 and rest_E[pool[place - 1]] > back:
                pool[place] = pool[place - 1]
                place -= 1
            pool[place] = last
            size += 1


@compiled
def choose_homes(cap_R: Ints, rank_P: Ints, where: Ints, copies_E: Ints, home_E: Ints) -> None:
    """A home among its copies for every expert that has none, at most `cap_R` per rank where that is possible.

    Augmenting paths: a full rank passes one of the homes chosen here on to another copy of that expert.
    """
    num_experts, num_ranks = len(home_E), len(cap_R)
    room_R = cap_R.copy()
    open_E = home_E < 0
    for expert in range(num_experts):
        if home_E[expert] >= 0:
            room_R[home_E[expert]] -= 1
    seen_R = np.empty(num_ranks, np.bool_)
    from_R = np.empty(num_ranks, np.int64)  # the expert that would come to a rank
    queue = np.empty(num_ranks, np.int64)
    for copies in range(1, num_ranks + 1):  # those with little choice first
        for expert in range(num_experts):
            if home_E[expert] >= 0 or copies_E[expert] != copies:
                continue
            seen_R[:] = False
            head, tail, goal, emptiest = 0, 0, -1, -1
            for index in range(copies):
                rank = rank_P[where[expert, index]]
                seen_R[rank], from_R[rank], queue[tail] = True, expert, rank
                tail += 1
                if emptiest < 0 or room_R[rank] > room_R[emptiest]:
                    emptiest = rank
            if room_R[emptiest] > 0:
                goal = emptiest
            while head < tail and goal < 0:
                full = queue[head]
                head += 1
                for other in range(num_experts):
                    if home_E[other] != full or not open_E[other] or goal >= 0:
                        continue
                    for index in range(copies_E[other]):
                        rank = rank_P[where[other, index]]
                        if seen_R[rank]:
                            continue
                        seen_R[rank], from_R[rank], queue[tail] = True, other, rank
                        tail += 1
                        if room_R[rank] > 0:
                            goal = rank
                            break
            if goal < 0:
                goal = emptiest  # more than its cap: no other copies could take one
            room_R[goal] -= 1
            while True:
                comes = from_R[goal]
                before = home_E[comes]
                home_E[comes] = goal
                if comes == expert:
                    break
                goal = before


@compiled
def settle_homes(
    load_E: Ints, target_R: Floats, cap_R: Ints, slots_R: Ints, has_ER: NDArray[np.bool_], home_E: Ints, crowded: bool
) -> None:
    """Homes of a changed membership: those that may stay, and new ones for the others; `home_E` has -1 for a lost one.

    With `crowded`, ranks give up what exceeds their cap, the experts that bring them nearest to their target. A new home is the
    least loaded rank under its cap that has a copy already, else the least loaded one.
    """
    num_experts, num_ranks = len(load_E), len(target_R)
    count_R, load_R = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
    for expert in range(num_experts):
        if home_E[expert] >= 0:
            count_R[home_E[expert]] += 1
            load_R[home_E[expert]] += load_E[expert]
    for rank in range(num_ranks):
        most = cap_R[rank] if crowded else slots_R[rank]
        while count_R[rank] > most:
            wish = (load_R[rank] - target_R[rank]) / (count_R[rank] - most)
            gone, miss = -1, np.inf
            for expert in range(num_experts):
                if home_E[expert] == rank and abs(load_E[expert] - wish) < miss:
                    gone, miss = expert, abs(load_E[expert] - wish)
            home_E[gone] = -1
            count_R[rank] -= 1
            load_R[rank] -= load_E[gone]
    for expert in np.argsort(-load_E, kind="mergesort"):
        if home_E[expert] >= 0:
            continue
        best, best_cost = -1, np.inf
        for turn in range(3):
            if best >= 0:
                break
            for rank in range(num_ranks):
                if count_R[rank] >= (cap_R[rank] if turn < 2 else slots_R[rank]) or (turn == 0 and not has_ER[expert, rank]):
                    continue
                cost = (load_R[rank] + load_E[expert]) / target_R[rank]
                if cost < best_cost:
                    best, best_cost = rank, cost
        home_E[expert] = best
        count_R[best] += 1
        load_R[best] += load_E[expert]


@compiled
def keep_copies(
    has_ER: NDArray[np.bool_], load_E: Ints, home_E: Ints, start_R: Ints, expert_P: Ints
) -> None:
    """Homes, then as many of the copies that are there already as fit, hot ones first, into the slots."""
    order = np.argsort(-load_E, kind="mergesort")
    for rank in range(len(start_R) - 1):
        slot = start_R[rank]
        for expert in range(len(home_E)):
            if home_E[expert] == rank:
                expert_P[slot] = expert
                slot += 1
        for expert in order:
            if has_ER[expert, rank] and home_E[expert] != rank and slot < start_R[rank + 1]:
                expert_P[slot] = expert
                slot += 1


@compiled
def _index_copies(expert_P: Ints, where: Ints, copies_E: Ints) -> None:
    copies_E[:] = 0
    for slot in range(len(expert_P)):
        if expert_P[slot] >= 0:
            where[expert_P[slot], copies_E[expert_P[slot]]] = slot
            copies_E[expert_P[slot]] += 1


@compiled
def _fresh(
    load_E: Ints,
    target_R: Floats,
    start_R: Ints,
    rank_P: Ints,
    node_R: Ints,
    turn_R: Ints,
    expert_P: Ints,
    where: Ints,
    copies_E: Ints,
) -> float:
    """Copies without regard to the past: construct and mend; where that falls short, cut pieces instead."""
    num_slots = len(expert_P)
    changes, free = 2 * len(target_R) + 16, 1 << 30
    nowhere = np.full(len(load_E), -1)
    _index_copies(expert_P, where, copies_E)
    construct(load_E, target_R, start_R, rank_P, node_R, expert_P, where, copies_E)
    z = mend(load_E, target_R, start_R, rank_P, expert_P, where, copies_E, nowhere, changes, free)
    if z > 1.0 + 1.5 * TOLERANCE:
        other_P = np.full(num_slots, EMPTY)
        copies_E[:] = 0
        cut_pieces(load_E, target_R, start_R, turn_R, other_P, where, copies_E)
        construct(load_E, target_R, start_R, rank_P, node_R, other_P, where, copies_E)
        other_z = mend(load_E, target_R, start_R, rank_P, other_P, where, copies_E, nowhere, changes, free)
        if other_z < z:
            z = other_z
            expert_P[:] = other_P
        _index_copies(expert_P, where, copies_E)
    return z


@compiled
def _relabel(
    has_ER: NDArray[np.bool_], target_R: Floats, start_R: Ints, node_R: Ints, expert_P: Ints
) -> None:
    """Give each rank's contents to the equal rank that holds most of them already, greedily."""
    num_ranks = len(target_R)
    common = np.zeros((num_ranks, num_ranks), np.int64)
    for source in range(num_ranks):
        for slot in range(start_R[source], start_R[source + 1]):
            if expert_P[slot] >= 0:
                for rank in range(num_ranks):
                    common[source, rank] += has_ER[expert_P[slot], rank]
    old_P = expert_P.copy()
    given, taken = np.zeros(num_ranks, np.bool_), np.zeros(num_ranks, np.bool_)
    for _ in range(num_ranks):
        best_s, best_r, most = -1, -1, -1
        for source in range(num_ranks):
            if given[source]:
                continue
            slots = start_R[source + 1] - start_R[source]
            for rank in range(num_ranks):
                if taken[rank] or common[source, rank] <= most:
                    continue
                if start_R[rank + 1] - start_R[rank] == slots and target_R[rank] == target_R[source]:
                    best_s, best_r, most = source, rank, common[source, rank]
        given[best_s], taken[best_r] = True, True
        for offset in range(start_R[best_s + 1] - start_R[best_s]):
            expert_P[start_R[best_r] + offset] = old_P[start_R[best_s] + offset]


@compiled
def plan_layer(
    load_E: Ints,
    target_R: Floats,
    start_R: Ints,
    rank_P: Ints,
    node_R: Ints,
    turn_R: Ints,
    cap_R: Ints,
    has_ER: NDArray[np.bool_],
    expert_P: Ints,
    home_E: Ints,
    crowded: bool,
    home_moves: int,
) -> float:
    """One layer. Returns the time of the slowest rank on this load; 1 is the mean.

    Args:
        load_E: loads, none of them zero.
        target_R: the share of the load that each rank's speed makes its own.
        start_R: [R + 1], where each rank's slots begin.
        rank_P: rank of each slot.
        node_R: node of each rank.
        turn_R: the ranks in an order that alternates between nodes.
        cap_R: homes that a rank should have at most.
        has_ER: copies that are there already.
        expert_P: the result, expert of each slot.
        home_E: homes that are to stay, -1 for none; completed.
        crowded: ranks give up homes beyond their cap.
        home_moves: homes that may move for the load's sake.
    """
    num_experts, num_ranks = len(load_E), len(target_R)
    where = np.empty((num_experts, num_ranks), np.int64)
    copies_E = np.empty(num_experts, np.int64)
    expert_P[:] = EMPTY
    if not (home_E >= 0).any():
        z = _fresh(load_E, target_R, start_R, rank_P, node_R, turn_R, expert_P, where, copies_E)
        if has_ER.any():
            _relabel(has_ER, target_R, start_R, node_R, expert_P)
            _index_copies(expert_P, where, copies_E)
        choose_homes(cap_R, rank_P, where, copies_E, home_E)
        return z
    settle_homes(load_E, target_R, cap_R, start_R[1:] - start_R[:-1], has_ER, home_E, crowded)
    keep_copies(has_ER, load_E, home_E, start_R, expert_P)
    _index_copies(expert_P, where, copies_E)
    construct(load_E, target_R, start_R, rank_P, node_R, expert_P, where, copies_E)
    changes = 2 * num_ranks + 16
    first_P = expert_P.copy()
    z = mend(load_E, target_R, start_R, rank_P, expert_P, where, copies_E, home_E, changes, 0)
    if z <= 1.0 + 1.5 * TOLERANCE or home_moves == 0:
        return z
    other_home = home_E.copy()
    _index_copies(first_P, where, copies_E)
    other_z = mend(load_E, target_R, start_R, rank_P, first_P, where, copies_E, other_home, changes, home_moves)
    if other_z < z:
        z = other_z
        expert_P[:] = first_P
        home_E[:] = other_home
    if z > ENOUGH and home_moves >= num_experts:
        first_P[:] = EMPTY
        other_z = _fresh(load_E, target_R, start_R, rank_P, node_R, turn_R, first_P, where, copies_E)
        if other_z < z:
            z = other_z
            _relabel(has_ER, target_R, start_R, node_R, first_P)
            expert_P[:] = first_P
            _index_copies(expert_P, where, copies_E)
            for expert in range(num_experts):
                kept = False
                for index in range(copies_E[expert]):
                    kept |= rank_P[where[expert, index]] == home_E[expert]
                if not kept:
                    home_E[expert] = -1
            choose_homes(cap_R, rank_P, where, copies_E, home_E)
    return z


@compiled
def sort_slots(expert_LP: Ints, home_LE: Ints, start_R: Ints) -> None:
    """Within each rank: homes first, then replicas, each by expert; empty slots last."""
    num_experts = home_LE.shape[1]
    for layer in range(len(expert_LP)):
        for rank in range(len(start_R) - 1):
            begin, end = start_R[rank], start_R[rank + 1]
            key = np.empty(end - begin, np.int64)
            for index in range(end - begin):
                expert = expert_LP[layer, begin + index]
                key[index] = expert + num_experts if expert >= 0 and home_LE[layer, expert] != rank else expert
                if expert < 0:
                    key[index] = 2 * num_experts
            key.sort()
            for index in range(end - begin):
                expert_LP[layer, begin + index] = EMPTY if key[index] == 2 * num_experts else key[index] % num_experts
