"""Twins: the copies of a unit's state on its primary and its mirrors, compared by checksums. Pure, numpy only.

Copies of a unit are equal bit for bit after every step. `signed_digests` lets one sum over the ranks show whether all
are: each copy adds a number that depends on its checksum, and the numbers of equal copies cancel. Where they do not,
`judge` decides which copy is wrong.

Legend: U units, R ranks, N units in question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.state.ownership import Ownership

_HALF = np.uint64(2**31 - 1)  # signed sums of numbers below it stay exact in int64, whatever the numbers of units


@dataclass(frozen=True, slots=True)
class Repair:
    """A copy that is wrong, and the rank that has a right one.

    Attributes:
        rank: that holds the wrong copy.
        unit: index of the unit.
        source: rank of a right copy.
    """

    rank: int
    unit: int
    source: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do about copies that differ.

    Attributes:
        repairs: copies to be replaced.
        unclear: units of which nobody can tell the right copy.
    """

    repairs: tuple[Repair, ...]
    unclear: tuple[int, ...]


def signed_digests(sums_U: NDArray[np.uint64], ownership: Ownership, rank: int) -> NDArray[np.int64]:
    """Numbers whose sums over all ranks are 0 for a unit whose copies are equal, int64 [2, U].

    A primary adds its digest once for each mirror, and a mirror takes it away. Copies that differ go unseen with a
    probability of 2^-62.

    Args:
        sums_U: checksum of each unit that the rank holds.
        ownership: primary and mirrors of each unit.
        rank: the rank itself.
    """
    mirrors_U = (ownership.mirrors >= 0).sum(axis=1)
    share_U = np.where(ownership.primary == rank, mirrors_U, 0) - (ownership.mirrors == rank).any(axis=1)
    mixed_U = _mix(sums_U)
    return share_U * np.stack([mixed_U & _HALF, (mixed_U >> np.uint64(32)) & _HALF]).astype(np.int64)


def _mix(sums_U: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of checksum and unit. Source: the finaliser of SplitMix64 (https://doi.org/10.1145/2714064.2660195)."""
    x_U = sums_U + np.arange(1, len(sums_U) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x_U = (x_U ^ (x_U >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_U = (x_U ^ (x_U >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_U ^ (x_U >> np.uint64(31))


def judge(
    units_N: Sequence[int], sums_RN: NDArray[np.int64], held_RN: NDArray[np.bool_], sound_RN: NDArray[np.bool_]
) -> Verdict:
    """Decide which copies are wrong.

    A copy that changed at rest is wrong, whatever the others say. Among the rest, more than half must be equal.

    Args:
        units_N: indices of the units in question.
        sums_RN: checksums of the copies.
        held_RN: the rank holds the unit.
        sound_RN: the copy had not changed between the update before and this one.
    """
    repairs: list[Repair] = []
    unclear: list[int] = []
    for n, unit in enumerate(units_N):
        voters = np.flatnonzero(held_RN[:, n] & sound_RN[:, n])
        values, counts = np.unique(sums_RN[voters, n], return_counts=True)
        if not voters.size or 2 * counts.max() <= voters.size:
            unclear.append(unit)
            continue
        right_R = held_RN[:, n] & sound_RN[:, n] & (sums_RN[:, n] == values[counts.argmax()])
        source = int(np.flatnonzero(right_R)[0])
        repairs += [Repair(int(rank), unit, source) for rank in np.flatnonzero(held_RN[:, n] & ~right_R)]
    return Verdict(tuple(repairs), tuple(unclear))
