"""Ownership of units: the rank that owns each unit (primary), and the ranks that keep an identical second copy of it
(mirrors).

This is ZeRO-1 by whole units: the primary holds the fp32 master weights and the optimizer moments. The plan is a pure
function of the units, the view and the state held now. It moves as little as it can.

Mirrors follow *copysets* (Cidon et al., USENIX ATC 2013): all units of a rank mirror to the same one or two partners,
paired mutually if possible. Two random deaths then lose state only if they hit one of about R/2 pairs. With scattered
mirrors, any two deaths would lose some state.

Legend: U units, R ranks, A active ranks, K mirrors per unit, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.state.mirrors import choose_partners
from elastic_moe.types import Unit, View

NONE, MIRROR, PRIMARY = 0, 1, 2

# Dense units move for balance only if a rank has more than this times the mean number of elements.
_BALANCE_TOLERANCE = 1.1


@dataclass(frozen=True, slots=True, eq=False)
class Ownership:
    """The primary and the mirrors of each unit.

    Attributes:
        primary: int32[U], rank.
        mirrors: int32[U, redundancy], ranks; -1 for none.
    """

    primary: NDArray[np.int32]
    mirrors: NDArray[np.int32]

    def role(self, rank: int) -> NDArray[np.uint8]:
        """Role of `rank` for each unit, uint8[U]: NONE, MIRROR or PRIMARY."""
        role_U = np.full(len(self.primary), NONE, dtype=np.uint8)
        role_U[(self.mirrors == rank).any(axis=1)] = MIRROR
        role_U[self.primary == rank] = PRIMARY
        return role_U

    def owned(self, rank: int) -> NDArray[np.int64]:
        """Units whose primary is `rank`, ascending."""
        return np.flatnonzero(self.primary == rank)

    def held(self, rank: int) -> NDArray[np.int64]:
        """Units that `rank` holds as primary or mirror, ascending."""
        return np.flatnonzero(self.role(rank) != NONE)


def plan_ownership(
    units: Sequence[Unit],
    view: View,
    held_RU: NDArray[np.uint8],
    redundancy: int,
    homes_LE: NDArray[np.int32] | None,
) -> Ownership:
    """Choose primary and mirrors of each unit among the active ranks. Deterministic: equal arguments give equal plans.

    Args:
        units: all units.
        view: the membership to plan for.
        held_RU: uint8[R, U], the role in which each rank of this view holds each unit now.
        redundancy: mirrors per unit; fewer if there are not enough ranks.
        homes_LE: int32[L, E], home rank of each expert, which is the primary of its unit. None: experts are placed like
            dense units.
    """
    held_RU = np.asarray(held_RU)
    active = np.asarray(view.active_ranks, dtype=np.int64)
    assert active.size > 0, "a view needs an active member"
    assert held_RU.shape == (view.world_size, len(units))
    numel_U = np.array([unit.numel for unit in units], dtype=np.int64)
    primary_U = np.full(len(units), -1, dtype=np.int32)
    movable_U = np.ones(len(units), dtype=bool)
    if homes_LE is not None:
        for index, unit in enumerate(units):
            if unit.expert is not None:
                primary_U[index] = homes_LE[unit.moe_layer, unit.expert]
                movable_U[index] = False
        assert np.isin(primary_U[~movable_U], active).all(), "an expert's home must be an active rank"
    _place_dense(primary_U, movable_U, numel_U, held_RU, active)
    _balance_dense(primary_U, movable_U, numel_U, held_RU, active)
    partners_RK = _partners(primary_U, numel_U, held_RU, view, redundancy)
    return Ownership(primary_U, partners_RK[primary_U].reshape(len(units), redundancy))


def homes_from_roles(
    units: Sequence[Unit], roles_RU: NDArray[np.uint8], active: Sequence[int], shape: tuple[int, int]
) -> NDArray[np.int32]:
    """Ranks that have the experts' state now, as present homes for the next placement.

    Args:
        units: all units.
        roles_RU: uint8[R, U], the role in which each rank holds each unit.
        active: ranks that may own.
        shape: (MoE layers, experts).

    Returns:
        int32[L, E]: the active rank with the strongest role (primary before mirror, then the lowest rank), -1 if no
        active rank holds the expert's unit.
    """
    homes_LE = np.full(shape, -1, dtype=np.int32)
    for u, unit in enumerate(units):
        if unit.expert is not None:
            best = max(active, key=lambda r: (int(roles_RU[r, u]), -r))
            if roles_RU[best, u]:
                homes_LE[unit.moe_layer, unit.expert] = best
    return homes_LE


def _loads(primary_U: NDArray[np.int32], numel_U: NDArray[np.int64], num_ranks: int) -> NDArray[np.int64]:
    """Number of elements that each rank owns, int64[R]."""
    placed_U = primary_U >= 0
    return np.bincount(primary_U[placed_U], weights=numel_U[placed_U], minlength=num_ranks).astype(np.int64)


def _place_dense(
    primary_U: NDArray[np.int32],
    movable_U: NDArray[np.bool_],
    numel_U: NDArray[np.int64],
    held_RU: NDArray[np.uint8],
    active: NDArray[np.int64],
) -> None:
    """Keep a living primary; else promote the mirror with the fewest elements; else take the rank with the fewest
    elements.
    """
    held_AU = held_RU[active]
    keeps_U = movable_U & (held_AU == PRIMARY).any(axis=0)
    primary_U[keeps_U] = active[(held_AU == PRIMARY).argmax(axis=0)[keeps_U]]
    load_R = _loads(primary_U, numel_U, len(held_RU))
    open_U = np.flatnonzero(movable_U & ~keeps_U)
    for unit in open_U[np.lexsort((open_U, -numel_U[open_U]))].tolist():
        holders = active[held_AU[:, unit] != NONE]
        candidates = holders if holders.size else active
        rank = candidates[load_R[candidates].argmin()]
        primary_U[unit] = rank
        load_R[rank] += numel_U[unit]


def _balance_dense(
    primary_U: NDArray[np.int32],
    movable_U: NDArray[np.bool_],
    numel_U: NDArray[np.int64],
    held_RU: NDArray[np.uint8],
    active: NDArray[np.int64],
) -> None:
    """Move dense units from the fullest to the emptiest rank until all are within tolerance, or no move helps.

    Units that the receiver mirrors already come first; of these, the unit whose size is nearest to half the difference.
    """
    load_R = _loads(primary_U, numel_U, len(held_RU))
    limit = _BALANCE_TOLERANCE * load_R.sum() / len(active)
    while True:
        dst = int(active[load_R[active].argmin()])
        over = [rank for rank in active.tolist() if load_R[rank] > limit]
        move = None
        for src in sorted(over, key=lambda rank: (-load_R[rank], rank)):
            gap = int(load_R[src] - load_R[dst])
            units = np.flatnonzero(movable_U & (primary_U == src) & (numel_U > 0) & (numel_U < gap))
            if units.size:
                miss = np.abs(numel_U[units] - min(gap / 2, load_R[src] - limit))
                move = src, int(units[np.lexsort((units, miss, held_RU[dst, units] == NONE))[0]])
                break
        if move is None:
            return
        src, unit = move
        primary_U[unit] = dst
        load_R[src] -= numel_U[unit]
        load_R[dst] += numel_U[unit]


def _partners(
    primary_U: NDArray[np.int32],
    numel_U: NDArray[np.int64],
    held_RU: NDArray[np.uint8],
    view: View,
    redundancy: int,
) -> NDArray[np.int32]:
    """Mirror ranks of each rank, int32[R, redundancy]; -1 for none."""
    num_ranks = view.world_size
    overlap_RR = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    for rank in view.active_ranks:
        mine = primary_U == rank
        overlap_RR[rank] = (held_RU[:, mine] != NONE) @ numel_U[mine]
        overlap_RR[rank, rank] = numel_U[mine].sum()
    nodes = [member.node for member in view.members]
    partners = choose_partners(view.active_ranks, nodes, overlap_RR.tolist(), redundancy)
    partners_RK = np.full((num_ranks, redundancy), -1, dtype=np.int32)
    for rank, chosen in partners.items():
        partners_RK[rank, : len(chosen)] = chosen
    return partners_RK
