"""Which expert sits in which slot of which rank, per MoE layer.

An expert's *home* is where its optimizer state lives; homes are sticky, because moving one costs a transfer of that state. The other
copies are replicas, which may change freely: their weights are re-sent after every update anyway.

Copies are chosen for the optimal token split of `split.py`. Two ranks that share an expert are linked: tokens of that expert can be
moved between them. The plan links all ranks with as few copies as that takes, so whatever the load does the next moment, the split can
pass it on; then it mends what today's load still finds too narrow. P >= E + R - 1 slots are enough for a perfect split of any load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from elastic_moe.errors import UserError
from elastic_moe.plan.placement.layer import plan_layer
from elastic_moe.plan.placement.replicas import EMPTY, sort_slots
from elastic_moe.plan.values import LOST, Placement, Topology
from elastic_moe.types import View

_SLOWEST = 1e-3  # of the fastest rank's speed: slower ones are planned for as if they did this much


def default_slots(num_experts: int, view: View, spare: int, limit: int) -> list[int]:
    """Expert slots per rank and layer: an even share and `spare` more, within what the run and each member allow.

    Where some members hold less than an even share the others take more. A draining rank gets none.

    Args:
        num_experts: routed experts per layer.
        view: the membership.
        spare: slots beyond the even share.
        limit: the run's limit per rank; 0 for none.
    """
    active = view.active_ranks
    caps = {rank: min(limit or num_experts, view.members[rank].slots or num_experts, num_experts) for rank in active}
    if sum(caps.values()) < num_experts:
        raise UserError(
            f"elastic.slots_per_worker: {len(active)} workers hold at most {sum(caps.values())} of {num_experts} experts"
            " per layer; raise it or add workers"
        )
    share = min(num_experts, math.ceil(num_experts / len(active)) + spare)
    while sum(min(share, cap) for cap in caps.values()) < num_experts:
        share += 1
    return [min(share, caps[rank]) if rank in caps else 0 for rank in range(view.world_size)]


def plan_placement(
    load: NDArray[np.floating] | NDArray[np.integer],
    topology: Topology,
    slots: Sequence[int],
    previous: Placement | None = None,
    home_moves: int | None = None,
) -> Placement:
    """Pure and deterministic, also across processors.

    Args:
        load: [L, E], tokens per expert in any unit.
        topology: nodes and speeds of the ranks.
        slots: slots of each rank, the same for all layers; 0 for a rank that computes nothing.
        previous: in ranks of this topology (`Placement.remap_ranks`). Its homes and copies are kept where possible.
        home_moves: homes per layer that may move for the sake of the load; None for as many as it takes, 0 for none. Those whose
            rank is gone, or has too many for its new slots, move in any case.

    Raises:
        UserError: there are fewer slots than experts.
    """
    load_LE = np.asarray(load, dtype=np.float64)
    num_layers, num_experts = load_LE.shape
    slots_R = np.asarray(slots, dtype=np.int64)
    num_ranks, num_slots = len(slots_R), int(slots_R.sum())
    if num_slots < num_experts:
        raise UserError(f"elastic.slots_per_worker: {num_slots} slots cannot hold {num_experts} experts per layer")
    slots_R = np.minimum(slots_R, num_experts)
    fastest = max(1e-9, *topology.speeds)
    speed_R = np.where(slots_R > 0, np.maximum(np.asarray(topology.speeds) / fastest, _SLOWEST), 0.0)
    share_R = speed_R / _sum(speed_R)
    node_R = np.unique(np.asarray(topology.nodes), return_inverse=True)[1].astype(np.int64)
    start_R = np.concatenate([[0], np.cumsum(slots)]).astype(np.int64)
    rank_P = np.repeat(np.arange(num_ranks, dtype=np.int64), np.asarray(slots, dtype=np.int64))
    cap_R = np.minimum(slots_R, -(-num_experts * slots_R // slots_R.sum()))
    turn_R = _alternating(node_R)
    expert_LP = np.full((num_layers, num_slots), EMPTY, dtype=np.int64)
    home_LE = np.full((num_layers, num_experts), LOST, dtype=np.int64)
    time_L = np.empty(num_layers)
    moves = num_experts if home_moves is None else home_moves
    crowded = previous is not None and not np.array_equal(previous.rank_of_slot, rank_P)
    for layer in range(num_layers):
        load_E = _whole(load_LE[layer])
        has_ER = np.zeros((num_experts, num_ranks), dtype=np.bool_)
        if previous is not None:
            before_E = previous.home[layer].astype(np.int64)
            home_LE[layer] = np.where((before_E >= 0) & (before_E < num_ranks), before_E, LOST)
            expert, rank = previous.expert_of_slot[layer], previous.rank_of_slot
            there = (expert >= 0) & (rank >= 0) & (rank < num_ranks)
            has_ER[expert[there], rank[there]] = True
        time_L[layer] = plan_layer(
            load_E,
            share_R * float(load_E.sum()),
            start_R,
            rank_P,
            node_R,
            turn_R,
            cap_R,
            has_ER,
            expert_LP[layer],
            home_LE[layer],
            crowded,
            moves,
        )
    sort_slots(expert_LP, home_LE, start_R)
    return Placement(
        expert_LP.astype(np.int32), rank_P.astype(np.int32), home_LE.astype(np.int32), node_R.astype(np.int32), time_L
    )


def _sum(values: NDArray[np.float64]) -> float:
    """In order, whatever the processor."""
    return math.fsum(values.tolist())


def _whole(load_E: NDArray[np.float64]) -> NDArray[np.int64]:
    """Loads as integers that sum to about 2**40; none is zero, so that ties stay spread out."""
    total = _sum(load_E)
    if total <= 0:
        return np.full(len(load_E), 2**40 // len(load_E), dtype=np.int64)
    return np.rint(load_E / total * 2.0**40).astype(np.int64) + max(1, 2**20 // len(load_E))


def _alternating(node_R: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ranks, first one of each node, then the second of each, and so on."""
    seen: dict[int, int] = {}
    nth_R = np.empty(len(node_R), dtype=np.int64)
    for rank, node in enumerate(node_R.tolist()):
        nth_R[rank] = seen[node] = seen.get(node, -1) + 1
    return np.lexsort((node_R, nth_R)).astype(np.int64)
