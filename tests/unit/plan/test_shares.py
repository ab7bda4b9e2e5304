"""Shares of a batch: nothing lost, the last rank ends as early as possible, and micro-batches fit together."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.plan.shares import Batching, Speeds, fastest_split, plan_shares, seconds_of, slices_of, work_of
from elastic_moe.types import Member, View

SPEEDS = st.lists(st.floats(0, 100).map(lambda v: round(v, 2)), min_size=1, max_size=12).filter(any)


@settings(deadline=None)
@given(st.integers(0, 500), SPEEDS)
def test_the_last_rank_ends_as_early_as_possible(units: int, speeds: list[float]) -> None:
    counts = fastest_split(units, speeds)
    assert sum(counts) == units
    able = [rank for rank, speed in enumerate(speeds) if speed > 0]
    assert all(counts[rank] == 0 for rank in range(len(speeds)) if rank not in able)
    if units < len(able):
        return
    assert all(counts[rank] for rank in able), "a rank without work could not be measured"
    end = max(counts[rank] / speeds[rank] for rank in able)
    least = [max(1, int(end * speeds[rank] * (1 - 1e-9))) for rank in able]  # all that ends before
    only_one = all(counts[rank] == 1 for rank in able if counts[rank] / speeds[rank] == end)
    assert only_one or sum(least) < units, "a faster split exists"


@pytest.mark.parametrize(
    ("batch", "speeds", "sizes"),
    [(32, [1, 1, 1], [11, 11, 10]), (10, [2, 0, 1], [7, 0, 3]), (2, [1, 1, 1], [1, 1, 0]), (9, [9, 1e-6], [8, 1])],
)
def test_split_examples(batch: int, speeds: list[float], sizes: list[int]) -> None:
    assert fastest_split(batch, speeds) == sizes


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 9), SPEEDS, st.booleans(), st.booleans())
def test_shares_cover_the_batch_and_micro_batches_the_shares(
    batch: int, size: int, speeds: list[float], whole: bool, together: bool
) -> None:
    batching = Batching(batch, size, whole, together)
    shares = plan_shares(batching, speeds)
    covered = [i for part in slices_of(shares) for i in range(batch)[part]]
    assert covered == list(range(batch))
    sizes = [batching.sizes(share, max(shares)) for share in shares]
    assert [sum(parts) for parts in sizes] == shares
    assert len({len(parts) for parts in sizes}) == 1, "all ranks have equally many micro-batches"
    assert all(0 <= n <= size for parts in sizes for n in parts)
    if whole:
        cut = [n for parts in sizes for n in parts if n not in (0, size)]
        assert cut == ([batch % size] if batch % size else []), "only the batch's last micro-batch is not full"


def test_a_slow_rank_has_as_many_micro_batches_as_the_others_and_smaller_ones() -> None:
    batching = Batching(28, 4, together=True)
    assert plan_shares(batching, [1, 1, 1, 0.5]) == [8, 8, 8, 4]
    assert batching.sizes(4, 8) == [2, 2]
    assert batching.sizes(8, 8) == [4, 4]


def test_the_cost_is_that_of_the_slowest_rank_in_each_micro_batch() -> None:
    second_R = np.array([1.0, 2.0])
    apart, together = (Batching(12, 8, whole=True, together=t) for t in (False, True))
    assert seconds_of(apart, [8, 4], second_R) == max(8 + 1, (4 + 1) * 2)
    assert seconds_of(together, [4, 8], second_R) == (8 + 1) * 2
    spread = Batching(16, 8)
    assert seconds_of(spread, [12, 4], second_R) == 2 * max(6 + 1, (2 + 1) * 2)
    assert work_of(spread, [12, 4]).tolist() == [14, 6]


def test_a_partial_micro_batch_is_avoided_where_it_costs_more_than_it_brings() -> None:
    """Nine sequences of one rank take three rounds; eight of each take two, and the batch has 64."""
    batching = Batching(64, 4)
    assert plan_shares(batching, [1.0] * 8) == [8] * 8
    slightly = [1.06, *[1.0] * 6, 0.94]
    second_R = 1 / np.array(slightly)
    shares = plan_shares(batching, slightly)
    others = itertools.chain([[8] * 8, [9, *[8] * 6, 7]])
    assert seconds_of(batching, shares, second_R) <= min(seconds_of(batching, other, second_R) for other in others)


def test_draining_ranks_have_no_speed() -> None:
    view = View(1, (Member("a", "n", 0, draining=True), Member("b", "n", 1)))
    assert Speeds.equal(view) == Speeds((0.0, 1.0), (0.0, 1.0))
