"""Which expert sits in which slot of which rank, per MoE layer.

An expert's *home* is where its optimizer state lives; homes are sticky, because moving one costs a transfer of that state.
The slots that homes leave free get replicas, which may change freely: their weights are re-sent after every update anyway.
Replicas are chosen for the optimal token split of `split.py`: pieces of load go from overfull to underfull ranks, the largest
piece that fits first (in the manner of MoonEP; P >= E + R - 1 slots are enough for a perfect split of any load). Free slots that
no piece needs go to the experts with the highest load per copy, against drift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastic_moe.errors import UserError
from elastic_moe.types import View

EMPTY = -1  # in expert_of_slot
LOST = -1  # in a previous placement's home

# How much larger a piece on the home's own node must be to win over one on another node.
_SAME_NODE_PENALTY = 0.8


@dataclass(frozen=True, slots=True)
class Topology:
    """Node (fault domain) and relative speed of every rank."""

    nodes: tuple[str, ...]
    speeds: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Attributes:
    expert_of_slot: int32[L, P], EMPTY for a slot without expert; within a rank homes come first, then replicas.
    rank_of_slot: int32[P], non-decreasing.
    home: int32[L, E], rank.
    """

    expert_of_slot: NDArray[np.int32]
    rank_of_slot: NDArray[np.int32]
    home: NDArray[np.int32]

    def slots_of(self, rank: int) -> slice:
        """Slots of one rank."""
        start, stop = np.searchsorted(self.rank_of_slot, [rank, rank + 1])
        return slice(int(start), int(stop))


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
) -> Placement:
    """Pure and deterministic.

    Args:
        load: [L, E], tokens per expert in any unit.
        topology: nodes and speeds of the ranks.
        slots: slots of each rank, the same for all layers; 0 for a rank that computes nothing.
        previous: its homes, already in ranks of this topology (LOST where the home is gone), are kept where possible.
    """
    load_LE = np.asarray(load, dtype=np.float64)
    num_layers, num_experts = load_LE.shape
    slots_R = np.asarray(slots, dtype=np.int64)
    if int(slots_R.sum()) < num_experts:
        raise UserError(
            f"elastic.slots_per_worker: {int(slots_R.sum())} slots cannot hold {num_experts} experts per layer"
        )
    speed_R = np.where(slots_R > 0, np.maximum(np.asarray(topology.speeds, dtype=np.float64), 1e-9), 0.0)
    node_R = np.unique(np.asarray(topology.nodes), return_inverse=True)[1]
    rank_of_slot = np.repeat(np.arange(len(slots_R), dtype=np.int32), slots_R)
    expert_of_slot = np.full((num_layers, len(rank_of_slot)), EMPTY, dtype=np.int32)
    home_LE = np.empty((num_layers, num_experts), dtype=np.int32)
    start_R = np.cumsum(slots_R) - slots_R
    for layer in range(num_layers):
        load_E = load_LE[layer]
        load_E = load_E + max(1e-6 * float(load_E.mean()), 1e-12)  # no expert weighs nothing: ties stay spread out
        before_E = np.full(num_experts, LOST) if previous is None else np.asarray(previous.home[layer], dtype=np.int64)
        home_E = _plan_homes(load_E, speed_R, slots_R, before_E)
        has_ER = _plan_replicas(load_E, speed_R, slots_R, node_R, home_E)
        home_LE[layer] = home_E
        for rank in np.flatnonzero(slots_R).tolist():
            experts = np.flatnonzero(has_ER[:, rank])
            experts = experts[np.argsort(home_E[experts] != rank, kind="stable")]
            expert_of_slot[layer, start_R[rank] : start_R[rank] + len(experts)] = experts
    return Placement(expert_of_slot, rank_of_slot, home_LE)


def _plan_homes(
    load_E: NDArray[np.float64], speed_R: NDArray[np.float64], slots_R: NDArray[np.int64], before_E: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Keep homes up to an even share of each rank's slots; place the others heaviest first on the least loaded rank."""
    num_experts, num_ranks = len(load_E), len(slots_R)
    cap_R = np.minimum(slots_R, -(-num_experts * slots_R // slots_R.sum()))
    home_E = np.where((before_E >= 0) & (before_E < num_ranks), before_E, LOST)
    target_R = load_E.sum() * speed_R / speed_R.sum()
    for rank in range(num_ranks):
        mine = np.flatnonzero(home_E == rank)
        for excess in range(len(mine) - int(cap_R[rank]), 0, -1):
            surplus = load_E[mine].sum() - target_R[rank]
            gone = int(np.abs(load_E[mine] - surplus / excess).argmin())
            home_E[mine[gone]] = LOST
            mine = np.delete(mine, gone)
    count_R = np.bincount(home_E[home_E >= 0], minlength=num_ranks)
    sum_R = np.bincount(home_E[home_E >= 0], weights=load_E[home_E >= 0], minlength=num_ranks)
    open_E = np.flatnonzero(home_E == LOST)
    safe_speed_R = np.where(speed_R > 0, speed_R, 1.0)
    for expert in open_E[np.argsort(-load_E[open_E], kind="stable")].tolist():
        cost_R = np.where(count_R < cap_R, (sum_R + load_E[expert]) / safe_speed_R, np.inf)
        rank = int(cost_R.argmin())
        home_E[expert] = rank
        count_R[rank] += 1
        sum_R[rank] += load_E[expert]
    return home_E


def _plan_replicas(
    load_E: NDArray[np.float64],
    speed_R: NDArray[np.float64],
    slots_R: NDArray[np.int64],
    node_R: NDArray[np.int64],
    home_E: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Which rank holds a copy of which expert, bool[E, R]; homes included."""
    num_experts, num_ranks = len(load_E), len(slots_R)
    has_ER = np.zeros((num_experts, num_ranks), dtype=bool)
    has_ER[np.arange(num_experts), home_E] = True
    free_R = slots_R - has_ER.sum(axis=0)
    favour_ER = np.where(node_R[home_E][:, None] != node_R[None, :], 1.0, _SAME_NODE_PENALTY)
    rest_E = load_E.copy()  # what is left at the home
    target_R = load_E.sum() * speed_R / speed_R.sum()
    surplus_R = np.bincount(home_E, weights=load_E, minlength=num_ranks) - target_R
    negligible = 1e-6 * load_E.sum()
    while free_R.any() and surplus_R.max() > negligible:
        src = int(surplus_R.argmax())
        mine = np.flatnonzero(home_E == src)
        room_R = np.where(free_R > 0, np.maximum(-surplus_R, 0.0), 0.0)
        piece_MR = np.minimum(np.minimum(rest_E[mine], surplus_R[src])[:, None], room_R) * ~has_ER[mine]
        index, dst = np.unravel_index(int((piece_MR * favour_ER[mine]).argmax()), piece_MR.shape)
        piece = float(piece_MR[index, dst])
        if piece <= negligible:
            break
        expert = int(mine[index])
        has_ER[expert, dst] = True
        free_R[dst] -= 1
        rest_E[expert] -= piece
        surplus_R[src] -= piece
        surplus_R[dst] += piece
    _fill_free(has_ER, free_R, load_E, surplus_R, favour_ER)
    return has_ER


def _fill_free(
    has_ER: NDArray[np.bool_],
    free_R: NDArray[np.int64],
    load_E: NDArray[np.float64],
    surplus_R: NDArray[np.float64],
    favour_ER: NDArray[np.float64],
) -> None:
    """Copies of the experts with the highest load per copy into what is free, another node first, then the emptiest rank."""
    copies_E = has_ER.sum(axis=1)
    while (free_R > 0).any():
        can_ER = ~has_ER & (free_R > 0)
        per_copy_E = np.where(can_ER.any(axis=1), load_E / copies_E, -1.0)
        expert = int(per_copy_E.argmax())
        if per_copy_E[expert] < 0:
            return
        ranks = np.flatnonzero(can_ER[expert])
        dst = int(ranks[np.lexsort((ranks, surplus_R[ranks], -free_R[ranks], -favour_ER[expert, ranks]))[0]])
        has_ER[expert, dst] = True
        copies_E[expert] += 1
        free_R[dst] -= 1
