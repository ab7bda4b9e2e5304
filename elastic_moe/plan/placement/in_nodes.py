"""Placement with a copy of every expert on each node: rows stay in their node, whatever the load.

Each node is planned by itself, for the load of all tokens: a node's tokens are a share of the batch like any other. So
a rank's rows, and the counts of them, never wait for another node. The homes, where the state is, are spread over all
ranks. Of experts at home elsewhere a node has a *main copy*, which stays in its place as a home does.

Legend: L MoE layers, E experts, R ranks, P slots of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.placement.replicas import EMPTY, sort_slots
from elastic_moe.plan.placement.threads import for_each
from elastic_moe.plan.values import LOST, Placement, Topology

PlanNode = Callable[[Topology, Sequence[int], Placement | None], Placement]


class _Task(NamedTuple):
    """A node to be planned. Two are equal if they have the same previous placement, or both none."""

    topology: Topology
    slots: tuple[int, ...]
    previous: Placement | None


def plan_in_nodes(
    shape: tuple[int, int],
    topology: Topology,
    slots: Sequence[int],
    previous: Placement | None,
    plan_node: PlanNode,
) -> Placement:
    """Choose the copies and homes of all layers.

    Args:
        shape: [L, E].
        topology: nodes and speeds of the ranks.
        slots: slots of each rank; the ranks of a node have at least one per expert together, or none.
        previous: the placement before, in ranks of this topology. Its homes and copies are kept where possible.
        plan_node: plans the ranks of one node, from their topology, slots and previous placement.
    """
    node_R = np.unique(np.asarray(topology.nodes), return_inverse=True)[1].astype(np.int32)
    start_R = np.concatenate([[0], np.cumsum(slots)]).astype(np.int64)
    rank_P = np.repeat(np.arange(len(slots), dtype=np.int32), np.asarray(slots, dtype=np.int64))
    expert_LP = np.full((shape[0], len(rank_P)), EMPTY, dtype=np.int64)
    home_LE, time_L = np.full(shape, LOST, dtype=np.int64), np.zeros(shape[0])
    before_LE = _homes_before(previous, len(slots), shape)
    tasks, task_of = dict[_Task, _Task](), dict[int, _Task]()  # nodes that have nothing yet are planned alike
    for node in range(int(node_R.max()) + 1):
        ranks = np.flatnonzero(node_R == node)
        own_slots = tuple(slots[rank] for rank in ranks.tolist())
        if sum(own_slots):
            own = Topology(("",) * len(ranks), tuple(topology.speeds[rank] for rank in ranks.tolist()))
            task = _Task(own, own_slots, None if previous is None else _part(previous, ranks, len(slots)))
            task_of[node] = tasks.setdefault(task, task)
    todo, plans = list(tasks), dict[_Task, Placement]()

    def plan(number: int) -> None:
        plans[todo[number]] = plan_node(*todo[number])

    for_each(len(todo), plan, shape[0] * len(rank_P))
    for node, task in task_of.items():
        ranks, planned = np.flatnonzero(node_R == node), plans[task]
        expert_LP[:, np.isin(rank_P, ranks)] = planned.expert_of_slot
        stays_LE = np.isin(before_LE, ranks)
        home_LE[stays_LE] = ranks[planned.home[stays_LE]]
        assert planned.time_L is not None
        time_L = np.maximum(time_L, planned.time_L)
    changed = previous is not None and not np.array_equal(previous.rank_of_slot, rank_P)
    most = -(-shape[1] // max(1, sum(number > 0 for number in slots)))
    total_R = np.zeros(len(slots), dtype=np.int64)
    for layer in range(shape[0]):
        _spread_homes(expert_LP[layer], rank_P, home_LE[layer], total_R, most, changed)
    sort_slots(expert_LP, home_LE, start_R)
    return Placement(expert_LP.astype(np.int32), rank_P, home_LE.astype(np.int32), node_R, time_L, in_nodes=True)


def _homes_before(previous: Placement | None, num_ranks: int, shape: tuple[int, int]) -> NDArray[np.int64]:
    """The rank of each home that is still there, else LOST."""
    if previous is None:
        return np.full(shape, LOST, dtype=np.int64)
    home_LE = previous.home.astype(np.int64)
    return np.where((home_LE >= 0) & (home_LE < num_ranks), home_LE, LOST)


def _part(previous: Placement, ranks: NDArray[np.int64], num_ranks: int) -> Placement | None:
    """What a node has of the previous placement; None for nothing.

    The first copy of an expert at home elsewhere is its main one.
    """
    local_R = np.full(num_ranks + 1, LOST, dtype=np.int32)  # the last one is for ranks that have left
    local_R[ranks] = np.arange(len(ranks))
    home_LE = local_R[_homes_before(previous, num_ranks, previous.home.shape)]
    here_P = np.isin(previous.rank_of_slot, ranks)
    expert_LP, rank_P = previous.expert_of_slot[:, here_P], local_R[previous.rank_of_slot[here_P]]
    main_LE = np.full_like(home_LE, LOST)
    slot_S, layer_S = np.nonzero(expert_LP.T[::-1] != EMPTY)  # from the last slot to the first, which counts
    main_LE[layer_S, expert_LP[layer_S, -1 - slot_S]] = rank_P[-1 - slot_S]
    home_LE = np.where(home_LE == LOST, main_LE, home_LE)
    return Placement(expert_LP, rank_P, home_LE) if rank_P.size or (home_LE != LOST).any() else None


def _spread_homes(
    expert_P: NDArray[np.int64],
    rank_P: NDArray[np.int32],
    home_E: NDArray[np.int64],
    total_R: NDArray[np.int64],
    most: int,
    changed: bool,
) -> None:
    """Give every expert of a layer a home on a rank that has a copy of it, the one with the fewest homes.

    Args:
        expert_P, rank_P: the experts of the slots, and their ranks.
        home_E: homes that stay, else LOST; filled in.
        total_R: homes of the layers before; those of this one are added.
        most: homes that a rank should have at most.
        changed: the ranks have changed, so homes beyond `most` move.
    """
    count_R = np.bincount(home_E[home_E >= 0], minlength=len(total_R))
    for expert, home in enumerate(home_E.tolist()):
        if home >= 0 and not (changed and count_R[home] > most):
            continue
        holders = rank_P[expert_P == expert].tolist()
        best = min(holders, key=lambda rank: (count_R[rank], total_R[rank], rank))
        if home >= 0:
            if count_R[best] >= most:
                continue
            count_R[home] -= 1
        count_R[best] += 1
        home_E[expert] = best
    total_R += count_R
