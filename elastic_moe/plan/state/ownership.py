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

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.state.mirrors import choose_partners
from elastic_moe.plan.state.units import Units
from elastic_moe.types import Unit, View

NONE, MIRROR, PRIMARY = 0, 1, 2

# Dense units move for balance only if a rank has more than this times the mean load.
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

    def roles(self, num_ranks: int) -> NDArray[np.uint8]:
        """Roles of all ranks, uint8[R, U]; row r is `role(r)`."""
        roles_RU = np.full((num_ranks, len(self.primary)), NONE, dtype=np.uint8)
        unit_M, column_M = np.nonzero(self.mirrors >= 0)
        roles_RU[self.mirrors[unit_M, column_M], unit_M] = MIRROR
        roles_RU[self.primary, np.arange(len(self.primary))] = PRIMARY
        return roles_RU

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
    units, held_RU = Units.of(units), np.asarray(held_RU)
    active = np.asarray(view.active_ranks, dtype=np.int64)
    assert active.size > 0, "a view needs an active member"
    assert held_RU.shape == (view.world_size, len(units))
    primary_U = np.full(len(units), -1, dtype=np.int32)
    movable_U = np.ones(len(units), dtype=bool)
    if homes_LE is not None:
        movable_U = units.expert_U < 0
        homed_U = np.flatnonzero(~movable_U)
        primary_U[homed_U] = homes_LE[units.layer_U[homed_U], units.expert_U[homed_U]]
        assert np.isin(primary_U[homed_U], active).all(), "an expert's home must be an active rank"
    # Units whose updates take products are shared out by that work; then the others, by what memory is left.
    for placed_U, size_U in ((units.iterated_U, units.work_U), (~units.iterated_U, units.numel_U)):
        _place_dense(primary_U, movable_U & placed_U, size_U, held_RU, active)
        _balance_dense(primary_U, movable_U & placed_U, size_U, held_RU, active)
    partners_RK = _partners(primary_U, units.numel_U, held_RU, view, redundancy)
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
    units = Units.of(units)
    homes_LE = np.full(shape, -1, dtype=np.int32)
    rank_H, unit_H, role_H = _holders(roles_RU, np.asarray(active, dtype=np.int64))
    strength_U = np.zeros(len(units), dtype=np.int64)  # 0: no active rank holds it
    np.maximum.at(strength_U, unit_H, role_H * len(roles_RU) + (len(roles_RU) - 1 - rank_H))
    best_U = np.where(strength_U > 0, len(roles_RU) - 1 - strength_U % len(roles_RU), -1)
    expert_units = np.flatnonzero(units.expert_U >= 0)
    homes_LE[units.layer_U[expert_units], units.expert_U[expert_units]] = best_U[expert_units]
    return homes_LE


def copies_from_roles(
    units: Sequence[Unit], roles_RU: NDArray[np.uint8], active: Sequence[int], shape: tuple[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Experts whose state the ranks have now, as present copies for the next placement. Arguments as above.

    Returns:
        Expert of each slot, int32[L, P], -1 for none, and rank of each slot, int32[P]. A rank has as many slots as it
        has experts of one layer; those that it owns come first.
    """
    units, num_layers = Units.of(units), shape[0]
    rank_H, unit_H, role_H = _holders(roles_RU, np.asarray(active, dtype=np.int64))
    of_expert_H = units.expert_U[unit_H] >= 0
    rank_H, unit_H, role_H = rank_H[of_expert_H], unit_H[of_expert_H], role_H[of_expert_H]
    order_H = np.lexsort((unit_H, -role_H, units.layer_U[unit_H], rank_H))
    rank_H, unit_H = rank_H[order_H], unit_H[order_H]
    place_H = rank_H * num_layers + units.layer_U[unit_H]
    nth_H = np.arange(len(place_H)) - np.searchsorted(place_H, place_H)
    slots_R = np.zeros(len(roles_RU), dtype=np.int64)
    np.maximum.at(slots_R, rank_H, nth_H + 1)
    first_R = np.concatenate([[0], np.cumsum(slots_R)])
    expert_LP = np.full((num_layers, int(first_R[-1])), -1, dtype=np.int32)
    expert_LP[units.layer_U[unit_H], first_R[rank_H] + nth_H] = units.expert_U[unit_H]
    return expert_LP, np.repeat(np.arange(len(slots_R), dtype=np.int32), slots_R)


def _holders(
    held_RU: NDArray[np.uint8], active: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Rank, unit and role of all copies that active ranks hold, by rank. They are few beside ranks times units."""
    rank_H, unit_H = np.divmod(np.flatnonzero(held_RU != NONE), held_RU.shape[1])
    is_active_R = np.zeros(len(held_RU), dtype=np.bool_)
    is_active_R[active] = True
    rank_H, unit_H = rank_H[is_active_R[rank_H]], unit_H[is_active_R[rank_H]]
    return rank_H, unit_H, held_RU[rank_H, unit_H].astype(np.int64)


def _loads(primary_U: NDArray[np.int32], size_U: NDArray[np.int64], num_ranks: int) -> NDArray[np.int64]:
    """Sizes of the units that each rank owns, int64[R]."""
    placed_U = primary_U >= 0
    return np.bincount(primary_U[placed_U], weights=size_U[placed_U], minlength=num_ranks).astype(np.int64)


def _place_dense(
    primary_U: NDArray[np.int32],
    movable_U: NDArray[np.bool_],
    size_U: NDArray[np.int64],
    held_RU: NDArray[np.uint8],
    active: NDArray[np.int64],
) -> None:
    """Keep a living primary; else promote the mirror with the smallest load; else the rank with the smallest load."""
    rank_H, unit_H, role_H = _holders(held_RU, active)
    lowest_U = np.full(len(primary_U), len(held_RU), dtype=np.int64)
    np.minimum.at(lowest_U, unit_H[role_H == PRIMARY], rank_H[role_H == PRIMARY])
    keeps_U = movable_U & (lowest_U < len(held_RU))
    primary_U[keeps_U] = lowest_U[keeps_U]
    load_R = _loads(primary_U, size_U, len(held_RU))
    open_U = np.flatnonzero(movable_U & ~keeps_U)
    by_unit = np.argsort(unit_H, kind="stable")
    rank_H, first_U = rank_H[by_unit], np.searchsorted(unit_H[by_unit], np.arange(len(primary_U) + 1))
    emptiest = [(int(load_R[rank]), rank) for rank in active.tolist()]
    heapq.heapify(emptiest)  # a load that has changed since is put right when it comes up
    for unit in open_U[np.lexsort((open_U, -size_U[open_U]))].tolist():
        holders = rank_H[first_U[unit] : first_U[unit + 1]]
        if holders.size:
            rank = int(holders[load_R[holders].argmin()])
        else:
            while emptiest[0][0] != load_R[emptiest[0][1]]:
                rank = emptiest[0][1]
                heapq.heapreplace(emptiest, (int(load_R[rank]), rank))
            rank = emptiest[0][1]
        primary_U[unit] = rank
        load_R[rank] += size_U[unit]


def _balance_dense(
    primary_U: NDArray[np.int32],
    movable_U: NDArray[np.bool_],
    size_U: NDArray[np.int64],
    held_RU: NDArray[np.uint8],
    active: NDArray[np.int64],
) -> None:
    """Move dense units from the fullest to the emptiest rank until all are within tolerance, or no move helps.

    Units that the receiver mirrors already come first; of these, the unit whose size is nearest to half the difference.
    """
    load_R = _loads(primary_U, size_U, len(held_RU))
    limit = _BALANCE_TOLERANCE * load_R.sum() / len(active)
    lightest_R = np.full(len(held_RU), np.iinfo(np.int64).max)
    may_move_U = movable_U & (size_U > 0)
    np.minimum.at(lightest_R, primary_U[may_move_U], size_U[may_move_U])
    while True:
        dst = int(active[load_R[active].argmin()])
        over = active[(load_R[active] > limit) & (lightest_R[active] < load_R[active] - load_R[dst])]
        if not over.size:
            return
        src = int(over[load_R[over].argmax()])
        gap = int(load_R[src] - load_R[dst])
        mine = np.flatnonzero(may_move_U & (primary_U == src))
        units = mine[size_U[mine] < gap]
        miss = np.abs(size_U[units] - min(gap / 2, load_R[src] - limit))
        unit = int(units[np.lexsort((units, miss, held_RU[dst, units] == NONE))[0]])
        primary_U[unit] = dst
        load_R[src] -= size_U[unit]
        load_R[dst] += size_U[unit]
        lightest_R[src] = size_U[mine[mine != unit]].min(initial=np.iinfo(np.int64).max)
        lightest_R[dst] = min(int(lightest_R[dst]), int(size_U[unit]))


def _partners(
    primary_U: NDArray[np.int32],
    numel_U: NDArray[np.int64],
    held_RU: NDArray[np.uint8],
    view: View,
    redundancy: int,
) -> NDArray[np.int32]:
    """Mirror ranks of each rank, int32[R, redundancy]; -1 for none."""
    num_ranks = view.world_size
    active = np.asarray(view.active_ranks, dtype=np.int64)
    rank_H, unit_H, _ = _holders(held_RU, active)
    pair_H = primary_U[unit_H].astype(np.int64) * num_ranks + rank_H
    overlap = np.bincount(pair_H, weights=numel_U[unit_H], minlength=num_ranks * num_ranks)
    overlap_RR = overlap.astype(np.int64).reshape(num_ranks, num_ranks)
    np.fill_diagonal(overlap_RR, _loads(primary_U, numel_U, num_ranks))
    nodes = [member.node for member in view.members]
    partners = choose_partners(view.active_ranks, nodes, overlap_RR, redundancy)
    partners_RK = np.full((num_ranks, redundancy), -1, dtype=np.int32)
    for rank, chosen in partners.items():
        partners_RK[rank, : len(chosen)] = chosen
    return partners_RK
