"""Data order and its division: nothing lost, nothing repeated within an epoch, nothing dependent on the world size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.plan.batch import sample_ids, split_batch


@settings(deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 300), st.integers(1, 50), st.integers(0, 4))
def test_every_epoch_is_a_permutation(seed: int, num_samples: int, batch: int, epoch: int) -> None:
    first = epoch * num_samples // batch
    last = (epoch + 1) * num_samples // batch + 1
    ids = np.concatenate([sample_ids(seed, step, batch, num_samples) for step in range(first, last)])
    begin = epoch * num_samples - first * batch
    assert sorted(ids[begin : begin + num_samples].tolist()) == list(range(num_samples))


def test_order_depends_on_seed_and_epoch() -> None:
    base = sample_ids(0, 0, 1000, 1000)
    assert base.dtype == np.int64
    assert base.shape == (1000,)
    assert not np.array_equal(base, sample_ids(1, 0, 1000, 1000))
    assert not np.array_equal(base, sample_ids(0, 1, 1000, 1000))
    assert np.array_equal(base, np.concatenate([sample_ids(0, step, 100, 1000) for step in range(10)]))


def test_order_looks_shuffled() -> None:
    n = 10_000
    ids = sample_ids(3, 0, n, n)
    assert abs(np.corrcoef(np.arange(n), ids)[0, 1]) < 0.05
    assert np.mean(np.diff(ids) == 1) < 0.01


def test_order_costs_the_batch_not_the_corpus() -> None:
    ids = sample_ids(0, 10**6, 8, 10**12)
    assert len(set(ids.tolist())) == 8
    assert ids.min() >= 0
    assert ids.max() < 10**12


@settings(deadline=None)
@given(st.integers(0, 500), st.lists(st.floats(0, 100).map(lambda v: round(v, 3)), min_size=1, max_size=12))
def test_split_batch_covers(global_batch: int, speeds: list[float]) -> None:
    if sum(speeds) == 0:
        speeds = [*speeds, 1.0]
    slices = split_batch(global_batch, speeds)
    covered = [i for part in slices for i in range(global_batch)[part]]
    assert covered == list(range(global_batch))
    assert len(slices) == len(speeds)
    for part, speed in zip(slices, speeds, strict=True):
        size = part.stop - part.start
        assert abs(size - global_batch * speed / sum(speeds)) < 1 + 1e-6
        assert speed > 0 or size == 0


@pytest.mark.parametrize(("batch", "speeds", "sizes"), [(32, [1, 1, 1], [11, 11, 10]), (10, [2, 0, 1], [7, 0, 3])])
def test_split_batch_examples(batch: int, speeds: list[float], sizes: list[int]) -> None:
    assert [part.stop - part.start for part in split_batch(batch, speeds)] == sizes
