"""Batches of several corpora: shares, epochs, and that nothing but seed and step decides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.plan.batch import mixture_at, sample_ids


def corpus_of(ids: np.ndarray, samples: list[int]) -> np.ndarray:
    return np.searchsorted(np.cumsum(samples), ids, side="right")


@given(
    weights=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6),
    sizes=st.lists(st.integers(1, 500), min_size=6, max_size=6),
    seed=st.integers(0, 2**63 - 1),
    begin=st.integers(0, 10**6),
    batch=st.integers(1, 300),
)
def test_every_run_of_places_has_the_shares(
    weights: list[float], sizes: list[int], seed: int, begin: int, batch: int
) -> None:
    samples = sizes[: len(weights)]
    ids = mixture_at(seed, begin * batch, batch, samples, weights)
    assert ids.dtype == np.int64
    assert 0 <= ids.min() <= ids.max() < sum(samples)
    counts = np.bincount(corpus_of(ids, samples), minlength=len(weights))
    wanted = batch * np.array(weights) / sum(weights)
    assert (abs(counts - wanted) <= len(weights) + 0.01).all()


def test_a_batch_does_not_depend_on_how_the_places_are_divided() -> None:
    samples, weights = [100, 37, 5], [0.5, 0.3, 0.2]
    whole = mixture_at(7, 0, 240, samples, weights)
    assert np.array_equal(whole, np.concatenate([mixture_at(7, 8 * step, 8, samples, weights) for step in range(30)]))
    assert not np.array_equal(whole, mixture_at(8, 0, 240, samples, weights))


@pytest.mark.parametrize("corpus", [0, 1, 2])
def test_each_corpus_goes_through_its_epochs(corpus: int) -> None:
    """Within an epoch of a corpus no sample repeats, and the next epoch has another order."""
    samples, weights = [100, 37, 5], [0.5, 0.3, 0.2]
    ids = mixture_at(7, 0, 4000, samples, weights)
    own = ids[corpus_of(ids, samples) == corpus] - sum(samples[:corpus])
    size = samples[corpus]
    assert len(own) > 2 * size
    for begin in range(0, len(own) - size, size):
        assert sorted(own[begin : begin + size]) == list(range(size))
    if size > 5:
        assert not np.array_equal(own[:size], own[size : 2 * size])


def test_one_corpus_is_as_without_a_mixture() -> None:
    assert np.array_equal(mixture_at(3, 5 * 64, 64, [1000], [0.1]), sample_ids(3, 5, 64, 1000))


def test_far_places_are_exact() -> None:
    step = 10**9
    ids = mixture_at(0, 1000 * step, 1000, [10**6, 10**6], [0.25, 0.75])
    assert (ids < 10**6).sum() == 250
    after = mixture_at(0, 1000 * (step + 1), 1000, [10**6, 10**6], [0.25, 0.75])
    assert len(np.unique(np.concatenate([ids, after]))) == 2000
