"""The ramp of the batch: sizes, where each batch begins, and that no sample is lost or read twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.config.schema import DataConfig, RunConfig, TrainConfig
from elastic_moe.plan.batch import sample_ids, samples_at
from elastic_moe.plan.batch_sizes import BatchSizes, RunLength


def ramp(first: int, full: int, micro: int, steps: int = 0, tokens: int = 0) -> BatchSizes:
    keys = {"batch_ramp": first, "batch_ramp_steps": steps, "batch_ramp_tokens": tokens}
    return BatchSizes(DataConfig(global_batch=full, micro_batch=micro, seq_len=10, **keys))


def test_without_a_ramp_all_batches_are_equal() -> None:
    sizes = BatchSizes(DataConfig(global_batch=6))
    assert [(sizes.size(batch), sizes.start(batch)) for batch in (0, 1, 10**9)] == [(6, 0), (6, 6), (6, 6 * 10**9)]
    assert np.array_equal(samples_at(1, sizes.start(7), 6, 100), sample_ids(1, 7, 6, 100)), "as it was before ramps"
    assert sizes.ramp_steps == 0


def test_stages_of_equal_numbers_of_steps() -> None:
    sizes = ramp(2, 8, 2, steps=6)
    assert [sizes.size(batch) for batch in range(9)] == [2, 2, 4, 4, 6, 6, 8, 8, 8]
    assert [sizes.start(batch) for batch in range(9)] == [0, 2, 4, 8, 12, 18, 24, 32, 40]
    assert sizes.ramp_steps == 6
    assert sizes.tokens_through(6) == 240


def test_stages_of_equal_numbers_of_tokens() -> None:
    sizes = ramp(2, 8, 2, tokens=480)  # three stages of 160 tokens
    assert [sizes.size(batch) for batch in range(16)] == [2] * 8 + [4] * 4 + [6] * 3 + [8]
    assert sizes.tokens_through(sizes.ramp_steps) == pytest.approx(480, abs=3 * 60)


def test_a_ramp_of_fewer_steps_than_stages_leaves_stages_out() -> None:
    sizes = ramp(1, 9, 1, steps=3)
    assert [sizes.size(batch) for batch in range(5)] == [1, 3, 6, 9, 9]
    assert sizes.ramp_steps == 3


@settings(deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 40), st.integers(1, 9), st.integers(1, 200), st.booleans(), st.integers(1, 300)
)
def test_batches_take_consecutive_samples_and_grow(
    first: int, more: int, micro: int, length: int, by_tokens: bool, num_samples: int
) -> None:
    full = first + more
    sizes = ramp(first, full, micro, tokens=10 * length) if by_tokens else ramp(first, full, micro, steps=length)
    batches = range(sizes.ramp_steps + 3)
    made = [sizes.size(batch) for batch in batches]
    assert made == sorted(made)
    assert made[0] == first
    assert made[-1] == full
    assert sizes.start(0) == 0
    assert all(sizes.start(b + 1) == sizes.start(b) + made[b] for b in batches)
    assert all((size - first) % micro == 0 for size in made if size != full)
    if not by_tokens:
        assert sizes.ramp_steps == length
    ids = np.concatenate([samples_at(5, sizes.start(b), sizes.size(b), num_samples) for b in batches])
    for begin in range(0, len(ids) - num_samples + 1, num_samples):
        assert sorted(ids[begin : begin + num_samples].tolist()) == list(range(num_samples)), "a permutation per epoch"


def test_what_is_left_of_a_run_counts_its_tokens() -> None:
    plain = RunLength(100)
    assert [plain.left(step) for step in (0, 1, 60, 100)] == [100, 99, 40, 0]
    data = DataConfig(global_batch=8, micro_batch=2, seq_len=10, batch_ramp=2, batch_ramp_steps=6)
    grown = RunLength.of(TrainConfig(run=RunConfig(steps=10), data=data))
    assert grown.tokens == 10 * (2 * 2 + 2 * 4 + 2 * 6 + 4 * 8)
    assert grown.left(2) == (2 * 4 + 2 * 6 + 4 * 8) / 2, "steps as small as the second one"
    assert grown.left(8) == 2
