"""Local search: the makespan of a plan, and the changes that lower it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastic_moe.plan.placement import Placement
from elastic_moe.plan.placement.local_search import improve, improve_or_keep
from elastic_moe.plan.placement.replicas import construct
from elastic_moe.plan.split import slowest_times
from tests.unit.plan.placement.problems import check_index, problem


def _unpinned(num_experts: int) -> np.ndarray:
    return np.full(num_experts, -1)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 20), st.integers(0, 10**6))
@example(8, 8, 52430)  # the changes alone make it worse here
def test_its_makespan_is_that_of_the_optimal_split(num_ranks: int, num_experts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots = [-(-num_experts // num_ranks) + 1] * num_ranks
    load = rng.integers(1, 10**6, num_experts) * 2**10
    layer, expert_P = problem(load.tolist(), slots)
    construct(layer, expert_P)
    before_P = expert_P.copy()
    makespan = improve(layer, expert_P, _unpinned(num_experts), 0, 0, 1.0)
    assert (expert_P == before_P).all(), "no change is allowed"
    home = np.zeros((1, num_experts), np.int32)
    placement = Placement(expert_P[None].astype(np.int32), layer.rank_P.astype(np.int32), home)
    split_time = slowest_times(load[None].astype(float), placement, [1.0] * num_ranks)[0]
    assert makespan == pytest.approx(split_time, abs=1e-5)
    changed = improve_or_keep(layer, expert_P, _unpinned(num_experts), 20, 10**6, 1.0)
    check_index(layer, expert_P)
    assert changed <= makespan + 1e-6
    assert set(expert_P[expert_P >= 0]) == set(range(num_experts)), "no expert is lost"


def test_a_replica_is_added_across_the_cut() -> None:
    layer, expert_P = problem([600_000, 200_000], [2, 2], np.array([0, -1, 1, -1]))
    assert improve(layer, expert_P, np.array([0, 1]), 0, 0, 1.0) == pytest.approx(1.5, abs=1e-3)
    assert improve(layer, expert_P, np.array([0, 1]), 1, 0, 1.0) == pytest.approx(1.0, abs=1e-3)
    assert sorted(expert_P[2:].tolist()) == [0, 1]


def test_homes_are_swapped_only_if_they_may_move() -> None:
    load, plan = [500_000, 400_000, 100_000, 80_000], np.array([0, 1, 2, 3])
    layer, expert_P = problem(load, [2, 2], plan)
    home_E = np.array([0, 0, 1, 1])
    fixed = improve(layer, expert_P, home_E, 10, 0, 1.0)
    assert fixed == pytest.approx(900 / 540, abs=1e-3)
    assert home_E.tolist() == [0, 0, 1, 1]
    moved = improve(layer, expert_P, home_E, 10, 2, 1.0)
    assert moved < 1.2
    assert (home_E != [0, 0, 1, 1]).sum() == 2
    for expert in range(4):
        assert home_E[expert] == layer.rank_P[expert_P == expert]
