"""Buckets of an exchange: every rank has room for each of them, and there are no more than it takes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from elastic_moe.plan.state import buckets
from elastic_moe.plan.state.buckets import assign_buckets, assign_early_buckets, bucket_elements

LIMIT = 1000


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "LEAST_ELEMENTS", LIMIT)
    monkeypatch.setattr(buckets, "MESSAGE_ELEMENTS", 1)


def _world(ranks: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sizes, primaries and copies of units, and whether each rank computes with each."""
    rng = np.random.default_rng(seed)
    numel_U = rng.integers(1, 40, 600)
    primary_U = rng.integers(0, ranks, 600).astype(np.int32)
    computes_RU = rng.random((ranks, 600)) < np.where(rng.random(600) < 0.5, 1.0, 1.5 / ranks)
    computes_RU[primary_U, np.arange(600)] = True
    return numel_U, primary_U, computes_RU.sum(axis=0), computes_RU


@pytest.mark.parametrize("ranks", [2, 3, 8, 40])
@pytest.mark.parametrize("redundancy", [0, 2])
def test_no_rank_moves_much_more_than_a_bucket(ranks: int, redundancy: int) -> None:
    for seed in range(5):
        numel_U, primary_U, copies_U, computes_RU = _world(ranks, seed)
        of_U = assign_buckets(numel_U, primary_U, copies_U, ranks, redundancy)
        assert set(of_U.tolist()) <= set(range(int(of_U.max()) + 1))
        most = 40 * max(ranks - 1, redundancy, 1)  # of one unit, which is never cut
        for bucket in range(int(of_U.max()) + 1):
            for rank in range(ranks):
                mine = (of_U == bucket) & (primary_U == rank)
                assert (numel_U * (copies_U - 1))[mine].sum() <= LIMIT + most, "received by a primary, or published"
                assert (numel_U * redundancy)[mine].sum() <= LIMIT + most, "sent to mirrors"
                sent = (of_U == bucket) & computes_RU[rank] & (primary_U != rank)
                assert numel_U[sent].sum() <= 2 * LIMIT + 40 * ranks, "sent to primaries, or installed"


def test_a_small_exchange_is_made_at_once() -> None:
    numel_U, primary_U = np.full(10, 20), np.arange(10, dtype=np.int32) % 2
    assert not assign_buckets(numel_U, primary_U, np.full(10, 2), 2, 1).any()
    assert not assign_buckets(1000 * numel_U, 0 * primary_U, np.full(10, 1), 1, 0).any(), "alone"
    assert assign_buckets(1000 * numel_U, primary_U, np.full(10, 2), 2, 1).any()


def test_ranks_of_unequal_state_take_part_in_all_buckets() -> None:
    numel_U = np.array([500] * 20 + [50] * 20)
    primary_U = np.array([0] * 20 + [1] * 20, dtype=np.int32)
    of_U = assign_buckets(numel_U, primary_U, np.full(40, 2), 2, 1)
    assert of_U.max() == 9
    assert np.bincount(of_U[:20]).tolist() == np.bincount(of_U[20:]).tolist() == [2] * 10


def test_buckets_grow_with_the_ranks_and_stay_below_a_quarter_of_a_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    sizes = [2 * 4 * bucket_elements(ranks) for ranks in (1, 8, 100, 500, 100_000)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 32 << 20
    assert sizes[-1] == 256 << 20
    assert [buckets.vector_bytes(held) >> 20 for held in (1 << 20, 1 << 30, 2 << 30, 80 << 30)] == [64, 64, 128, 256]


@pytest.mark.parametrize("ranks", [2, 5, 40])
def test_early_buckets_follow_the_backward_pass(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """None comes before an earlier stage, none is larger than there is room, and only small stages share one."""
    monkeypatch.setattr(buckets, "EARLY_ELEMENTS", 60 * ranks)
    for seed in range(5):
        numel_U, primary_U, _, _ = _world(ranks, seed)
        stage_U = np.sort(np.random.default_rng(seed).integers(0, 30, 600))[::-1].copy()
        of_U = assign_early_buckets(numel_U, primary_U, np.full(600, ranks), ranks, stage_U)
        assert set(of_U.tolist()) == set(range(int(of_U.max()) + 1))
        first = [of_U[stage_U == stage].min() for stage in range(30)]
        last = [of_U[stage_U == stage].max() for stage in range(30)]
        assert all(end <= begin for end, begin in itertools.pairwise(itertools.chain(*zip(first, last, strict=True))))
        assert first[0] == 0
        moved_BR = np.zeros((int(of_U.max()) + 1, ranks), dtype=np.int64)
        np.add.at(moved_BR, (of_U, primary_U), numel_U * (ranks - 1))
        assert moved_BR.max() <= LIMIT + 40 * (ranks - 1)
        for bucket in range(len(moved_BR) - 1):
            stages = set(stage_U[of_U == bucket].tolist())
            if len(stages) > 1:
                earlier = (of_U == bucket) & (stage_U < max(stages))
                moved_R = np.bincount(primary_U[earlier], weights=numel_U[earlier] * (ranks - 1), minlength=ranks)
                assert moved_R.max() < 60 * ranks


def test_early_buckets_of_one_rank_and_of_no_unit() -> None:
    sizes, stages = np.array([10, 20, 30]), np.array([2, 1, 0])
    assert not assign_early_buckets(sizes, np.zeros(3, np.int32), np.ones(3, np.int64), 1, stages).any()
    nothing = np.zeros(0, np.int64)
    assert not len(assign_early_buckets(nothing, nothing.astype(np.int32), nothing, 2, nothing))
