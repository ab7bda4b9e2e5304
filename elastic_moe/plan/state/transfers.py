"""Transfers: the units that ranks send to one another, to get from the state held now to a planned ownership.

Failure, join, drain and rebalancing are all this one problem. Sends are spread over all holders of a unit, so that its
primary is not the only sender. A draining rank sends like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.state.ownership import NONE, Ownership


@dataclass(frozen=True, slots=True)
class Transfer:
    """One whole unit (weight and optimizer state) from one rank to another."""

    unit: int
    src: int
    dst: int


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """The transfers of one change of ownership.

    Attributes:
        transfers: ascending by (unit, dst).
        missing: units that no rank holds; they must come from a checkpoint or from initialisation.
    """

    transfers: tuple[Transfer, ...]
    missing: tuple[int, ...]


def plan_transfers(held_RU: NDArray[np.uint8], ownership: Ownership) -> TransferPlan:
    """Bring every unit to its primary and mirrors that do not hold it yet. Pure and deterministic.

    Args:
        held_RU: uint8[R, U], role in which each rank of the new view holds each unit now; NONE if it does not.
        ownership: the planned ownership of the same ranks and units.
    """
    holds_RU = np.asarray(held_RU) != NONE
    num_units = holds_RU.shape[1]
    owners_UO = np.concatenate([ownership.primary[:, None], ownership.mirrors], axis=1)
    unit_index_U1: NDArray[np.int64] = np.arange(num_units, dtype=np.int64)[:, None]
    lacks_UO = (owners_UO >= 0) & ~holds_RU[np.maximum(owners_UO, 0), unit_index_U1]
    lost_U = ~holds_RU.any(axis=0)
    sent_by = [0] * holds_RU.shape[0]
    transfers: list[Transfer] = []
    rank_H: NDArray[np.int64]  # the holders of all units
    rank_H, unit_H = np.divmod(np.flatnonzero(holds_RU), num_units)
    by_unit = np.argsort(unit_H, kind="stable")
    rank_H, first_U = rank_H[by_unit], np.searchsorted(unit_H[by_unit], np.arange(num_units + 1, dtype=np.int64))
    for unit in np.flatnonzero(lacks_UO.any(axis=1) & ~lost_U).tolist():
        sources: list[int] = rank_H[first_U[unit] : first_U[unit + 1]].tolist()
        for dst in sorted(owners_UO[unit][lacks_UO[unit]].tolist()):
            src = min(sources, key=lambda rank: (sent_by[rank], rank))
            sent_by[src] += 1
            transfers.append(Transfer(unit, src, dst))
    return TransferPlan(tuple(transfers), tuple(np.flatnonzero(lost_U).tolist()))
