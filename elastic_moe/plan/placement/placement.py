"""Placement: which expert sits in which slot of which rank, per MoE layer.

The *home* of an expert is the rank that keeps its optimizer state. Homes are sticky, because moving one costs a
transfer of that state. The other copies are *replicas*. They may change freely, because their weights are sent again
after every update.

Copies are chosen for the optimal token split of `split.py`. Two ranks that hold the same expert are *linked*: tokens
of that expert can be moved between them. The plan links all ranks with as few copies as possible, so the split can
pass load on, whatever it becomes later. Then a local search changes the copies that do not fit the present load. P >=
E + R - 1 slots are enough for a perfect split of any load.

Legend: L MoE layers, E experts, R ranks, P slots of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from elastic_moe.errors import UserError
from elastic_moe.plan.placement.in_nodes import plan_in_nodes
from elastic_moe.plan.placement.layer import plan_layer
from elastic_moe.plan.placement.replicas import EMPTY, sort_slots
from elastic_moe.plan.placement.threads import for_each
from elastic_moe.plan.values import LOST, Placement, Topology
from elastic_moe.types import View

_MIN_SPEED = 1e-3  # of the fastest rank's speed; slower ranks are planned for with this speed


def default_slots(
    num_experts: int, view: View, spare: int, limit: int, copies: int = 1, in_nodes: bool = False
) -> list[int]:
    """Expert slots per rank and layer: an even number for so many copies and `spare` more, within the limits of the run
    and of each member.

    If some members hold less than the even number, the others take more. A draining rank gets none.

    Args:
        num_experts: routed experts per layer.
        view: the membership.
        spare: slots beyond the even number.
        limit: the run's limit per rank; 0 for none.
        copies: of each expert.
        in_nodes: so many on each node, and not in all.

    Raises:
        UserError: the ranks cannot hold all experts.
    """
    if in_nodes:
        slots = [0] * view.world_size
        for node in {view.members[rank].node for rank in view.active_ranks}:
            ranks = [rank for rank in view.active_ranks if view.members[rank].node == node]
            own = View(view.generation, tuple(view.members[rank] for rank in ranks))
            for rank, number in zip(ranks, default_slots(num_experts, own, spare, limit, copies), strict=True):
                slots[rank] = number
        return slots
    active = view.active_ranks
    max_slots = {
        rank: min(limit or num_experts, view.members[rank].slots or num_experts, num_experts) for rank in active
    }
    if sum(max_slots.values()) < num_experts:
        raise UserError(
            f"elastic.slots_per_worker: {len(active)} workers hold at most {sum(max_slots.values())} of {num_experts}"
            " experts per layer; raise it or add workers"
        )
    even = min(num_experts, math.ceil(num_experts * copies / len(active)) + spare)
    while sum(min(even, most) for most in max_slots.values()) < num_experts:
        even += 1
    return [min(even, max_slots[rank]) if rank in max_slots else 0 for rank in range(view.world_size)]


def plan_placement(
    load: NDArray[np.floating] | NDArray[np.integer],
    topology: Topology,
    slots: Sequence[int],
    previous: Placement | None = None,
    home_moves: int | None = None,
) -> Placement:
    """Choose the copies and homes of all layers. Pure and deterministic, also across processors.

    Args:
        load: [L, E], tokens per expert in any unit.
        topology: nodes and speeds of the ranks, and whether each node is to have a copy of every expert.
        slots: slots of each rank, the same for all layers; 0 for a rank that computes nothing.
        previous: the placement before, in ranks of this topology (`Placement.remap_ranks`). Its homes and copies are
            kept where possible.
        home_moves: homes per layer that may move to balance the load; None for no limit, 0 for none. Homes whose rank
            has left, or has too many for its new slots, move in any case.

    Raises:
        UserError: there are fewer slots than experts.
    """
    load_LE = np.asarray(load, dtype=np.float64)
    moves = load_LE.shape[1] if home_moves is None else home_moves
    plan = partial(_plan_all, load_LE, home_moves=moves)
    if topology.in_nodes:
        return plan_in_nodes(load_LE.shape, topology, slots, previous, plan)
    return plan(topology, slots, previous)


def _plan_all(
    load_LE: NDArray[np.float64],
    topology: Topology,
    slots: Sequence[int],
    previous: Placement | None,
    home_moves: int,
) -> Placement:
    """Choose the copies and homes of all layers, where rows may travel to every rank; see `plan_placement`."""
    num_layers, num_experts = load_LE.shape
    start_R = np.concatenate([[0], np.cumsum(slots)]).astype(np.int64)
    rank_P = np.repeat(np.arange(len(slots), dtype=np.int64), np.asarray(slots, dtype=np.int64))
    if len(rank_P) < num_experts:
        raise UserError(f"elastic.slots_per_worker: {len(rank_P)} slots cannot hold {num_experts} experts per layer")
    slots_R = np.minimum(np.asarray(slots, dtype=np.int64), num_experts)
    share_R = _speed_shares(topology.speeds, slots_R)
    node_R = np.unique(np.asarray(topology.nodes), return_inverse=True)[1].astype(np.int64)
    round_robin_R = _round_robin(node_R)
    expert_LP = np.full((num_layers, len(rank_P)), EMPTY, dtype=np.int64)
    home_LE, time_L = np.full((num_layers, num_experts), LOST, dtype=np.int64), np.empty(num_layers)

    def plan(layer: int) -> None:
        load_E = _integer_loads(load_LE[layer])
        resident_ER = np.zeros((num_experts, len(slots)), dtype=np.bool_)
        if previous is not None:
            _read_previous(previous, layer, resident_ER, home_LE[layer])
        time_L[layer] = plan_layer(
            load_E,
            share_R * float(load_E.sum()),
            start_R,
            rank_P,
            node_R,
            round_robin_R,
            np.minimum(slots_R, -(-num_experts * slots_R // slots_R.sum())),  # homes at most
            resident_ER,
            expert_LP[layer],
            home_LE[layer],
            previous is not None and not np.array_equal(previous.rank_of_slot, rank_P),
            home_moves,
        )

    for_each(num_layers, plan, num_layers * len(rank_P))
    if all(number in (0, num_experts) for number in slots_R.tolist()):
        _place_everywhere(expert_LP, time_L, start_R[:-1][slots_R > 0], num_experts)
    sort_slots(expert_LP, home_LE, start_R)
    return Placement(
        expert_LP.astype(np.int32), rank_P.astype(np.int32), home_LE.astype(np.int32), node_R.astype(np.int32), time_L
    )


def _place_everywhere(
    expert_LP: NDArray[np.int64], time_L: NDArray[np.float64], first_slots: NDArray[np.int64], num_experts: int
) -> None:
    """Put a copy of each expert on each rank whose first slot is given: there is nothing to choose but the homes."""
    expert_LP[:], time_L[:] = EMPTY, 1.0
    for first in first_slots.tolist():
        expert_LP[:, first : first + num_experts] = np.arange(num_experts)


def _speed_shares(speeds: Sequence[float], slots_R: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of the load that each rank's speed makes its own, float64[R], sum 1; 0 for a rank without slots."""
    fastest = max(1e-9, *speeds)
    speed_R = np.where(slots_R > 0, np.maximum(np.asarray(speeds) / fastest, _MIN_SPEED), 0.0)
    return speed_R / _sum(speed_R)


def _read_previous(previous: Placement, layer: int, resident_ER: NDArray[np.bool_], home_E: NDArray[np.int64]) -> None:
    """Write the copies and homes that a layer of the previous placement has on present ranks."""
    num_ranks = resident_ER.shape[1]
    before_E = previous.home[layer].astype(np.int64)
    home_E[:] = np.where((before_E >= 0) & (before_E < num_ranks), before_E, LOST)
    expert_P, rank_P = previous.expert_of_slot[layer], previous.rank_of_slot
    present_P = (expert_P >= 0) & (rank_P >= 0) & (rank_P < num_ranks)
    resident_ER[expert_P[present_P], rank_P[present_P]] = True


def _sum(values: NDArray[np.float64]) -> float:
    """Exact sum, which is the same on all processors."""
    return math.fsum(values.tolist())


def _integer_loads(load_E: NDArray[np.float64]) -> NDArray[np.int64]:
    """Loads as integers that sum to about 2**40. None is 0, so that experts without load are spread too."""
    total = _sum(load_E)
    if total <= 0:
        return np.full(len(load_E), 2**40 // len(load_E), dtype=np.int64)
    return np.rint(load_E / total * 2.0**40).astype(np.int64) + max(1, 2**20 // len(load_E))


def _round_robin(node_R: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ranks in round robin over the nodes: the first rank of each node, then the second of each, and so on."""
    seen: dict[int, int] = {}
    nth_R = np.empty(len(node_R), dtype=np.int64)
    for rank, node in enumerate(node_R.tolist()):
        nth_R[rank] = seen[node] = seen.get(node, -1) + 1
    return np.lexsort((node_R, nth_R)).astype(np.int64)
