"""Copies of units: their digests cancel where they are equal, and a verdict names the wrong ones where they differ."""

from __future__ import annotations

import numpy as np
import pytest

from elastic_moe.control.twins import Repair, Verdict, judge, signed_digests
from elastic_moe.plan.state.ownership import NONE, Ownership

UNITS, RANKS = 40, 5
RNG = np.random.default_rng(0)
BITS = [0, 1, 30, 31, 32, 62, 63]


def _ownership(redundancy: int) -> Ownership:
    primary_U = np.arange(UNITS, dtype=np.int32) % RANKS
    mirrors_UK = np.stack([(primary_U + 1 + k) % RANKS for k in range(redundancy)], axis=1).astype(np.int32)
    mirrors_UK = mirrors_UK.reshape(UNITS, redundancy)
    if redundancy == 2:
        mirrors_UK[::3, 1] = -1  # fewer mirrors than wanted
    return Ownership(primary_U, mirrors_UK)


def _sums(ownership: Ownership) -> np.ndarray:
    """Equal checksums on every holder, uint64 [R, U]; 0 where a rank holds nothing."""
    sums_U = RNG.integers(0, 2**64, UNITS, dtype=np.uint64)
    return np.stack([np.where(ownership.role(r) != NONE, sums_U, np.uint64(0)) for r in range(RANKS)])


@pytest.mark.parametrize("redundancy", [1, 2])
def test_digests_of_equal_copies_cancel(redundancy: int) -> None:
    ownership = _ownership(redundancy)
    sums_RU = _sums(ownership)
    assert not sum(signed_digests(sums_RU[r], ownership, r) for r in range(RANKS)).any()


@pytest.mark.parametrize("redundancy", [1, 2])
@pytest.mark.parametrize("bit", BITS)
def test_one_bit_of_one_checksum_shows_and_shows_where(redundancy: int, bit: int) -> None:
    ownership = _ownership(redundancy)
    for unit in (0, 7, UNITS - 1):
        for rank in np.flatnonzero([ownership.role(r)[unit] != NONE for r in range(RANKS)]).tolist():
            sums_RU = _sums(ownership)
            sums_RU[rank, unit] ^= np.uint64(1 << bit)
            total_2U = sum(signed_digests(sums_RU[r], ownership, r) for r in range(RANKS))
            assert total_2U.sum(axis=1).any()
            assert np.flatnonzero(total_2U.any(axis=0)).tolist() == [unit]


def test_two_units_whose_checksums_changed_places_show() -> None:
    ownership = _ownership(1)
    sums_RU = _sums(ownership)
    sums_RU[0, [0, 5]] = sums_RU[0, [5, 0]]  # rank 0 is the primary of both
    total_2U = sum(signed_digests(sums_RU[r], ownership, r) for r in range(RANKS))
    assert np.flatnonzero(total_2U.any(axis=0)).tolist() == [0, 5]


def _judge(*copies: tuple[int, bool]) -> Verdict:
    """Verdict on unit 9, of which each rank has a copy: (checksum, has not changed at rest)."""
    sums_R1 = np.array([[value] for value, _ in copies])
    sound_R1 = np.array([[sound] for _, sound in copies])
    return judge([9], sums_R1, np.ones_like(sound_R1), sound_R1)


def test_a_copy_that_changed_at_rest_is_wrong() -> None:
    assert _judge((1, True), (2, False)) == Verdict((Repair(1, 9, 0),), ())
    assert _judge((2, False), (1, True)) == Verdict((Repair(0, 9, 1),), ())
    assert _judge((2, False), (1, True), (3, False)) == Verdict((Repair(0, 9, 1), Repair(2, 9, 1)), ())


def test_more_than_half_of_the_sound_copies_are_right() -> None:
    assert _judge((1, True), (2, True), (1, True)) == Verdict((Repair(1, 9, 0),), ())
    assert _judge((2, True), (1, True), (1, True)) == Verdict((Repair(0, 9, 1),), ())


@pytest.mark.parametrize(
    "copies",
    [
        [(1, True), (2, True)],
        [(1, True), (2, True), (3, True)],
        [(1, True), (2, True), (1, False)],  # what changed at rest has no say
        [(1, False), (2, False)],
        [(1, False)],
    ],
)
def test_what_nobody_can_tell_is_unclear(copies: list[tuple[int, bool]]) -> None:
    assert _judge(*copies) == Verdict((), (9,))


def test_ranks_without_a_copy_have_no_say_and_get_none() -> None:
    sums_RN = np.array([[0, 7], [5, 7], [6, 0]])
    held_RN = np.array([[False, True], [True, True], [True, False]])
    sound_RN = np.array([[True, False], [True, True], [False, True]])
    assert judge([3, 4], sums_RN, held_RN, sound_RN) == Verdict((Repair(2, 3, 1), Repair(0, 4, 1)), ())
