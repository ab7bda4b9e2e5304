"""Data order: nothing lost, nothing repeated within an epoch, nothing dependent on the world size."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.plan.batch import sample_ids


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
