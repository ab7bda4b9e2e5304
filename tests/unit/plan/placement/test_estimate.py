"""The estimate of the least time with few slots."""

from __future__ import annotations

import numpy as np
import pytest

from elastic_moe.plan.placement.estimate import estimate_least_time, sums_from_lightest


def test_sums_from_lightest() -> None:
    assert sums_from_lightest(np.array([5, 3, 1])).tolist() == [0, 1, 4, 9]


@pytest.mark.parametrize(
    ("load", "slots", "least"),
    [
        ([4, 4, 4, 4], [2, 2], 1.0),
        ([9, 1, 1, 1], [2, 2], 10 / 6),  # no spare slot: the hot expert and the lightest one share a rank
        ([9, 1, 1], [2, 2], 1.0),  # one spare slot: the hot expert has both ranks
    ],
)
def test_estimate(load: list[int], slots: list[int], least: float) -> None:
    load_E, slots_R = np.array(load) * 2**20, np.array(slots)
    target_R = np.full(len(slots), load_E.sum() / len(slots))
    assert estimate_least_time(load_E, target_R, slots_R) == pytest.approx(least, abs=1e-3)
