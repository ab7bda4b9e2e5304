"""Splittable bin packing: each rank can be filled exactly to its target."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.plan.placement.bin_packing import pack_splittable
from elastic_moe.plan.placement.local_search import improve
from elastic_moe.plan.placement.replicas import EMPTY, LayerPlan
from tests.unit.plan.placement.problems import check_index, problem


def _pack(layer: LayerPlan, expert_P: np.ndarray, resident_ER: np.ndarray | None = None) -> None:
    if resident_ER is None:
        resident_ER = np.zeros(layer.slots_of_ER.shape, np.bool_)
    load_E, target_R, start_R, _, _, round_robin_R, slots_of_ER, copies_E = layer
    pack_splittable(load_E, target_R, start_R, round_robin_R, resident_ER, expert_P, slots_of_ER, copies_E)


@settings(deadline=None)
@given(st.integers(1, 10), st.integers(1, 5), st.integers(0, 10**6))
def test_equal_ranks_are_filled_exactly(num_ranks: int, per_rank: int, seed: int) -> None:
    """P >= E + R - 1: the flow through the copies, without any change of them, reaches the mean."""
    rng = np.random.default_rng(seed)
    num_experts = max(1, num_ranks * per_rank - num_ranks + 1)
    load = 1 + (np.exp(rng.normal(0, rng.choice([0.1, 1, 3]), num_experts)) * 2**30).astype(np.int64)
    layer, expert_P = problem((load * num_ranks).tolist(), [per_rank] * num_ranks)
    _pack(layer, expert_P)
    check_index(layer, expert_P)
    assert (layer.copies_E >= 1).all()
    assert improve(layer, expert_P, np.full(num_experts, -1), 0, 0, 1.0) < 1 + 1e-6


def test_an_expert_is_split_where_a_rank_is_full() -> None:
    layer, expert_P = problem([8, 3, 1], [2, 2])
    _pack(layer, expert_P)
    assert layer.copies_E.tolist() == [2, 1, 1]


def test_ranks_keep_resident_experts_in_a_tie() -> None:
    layer, expert_P = problem([1, 1, 1, 1], [2, 2])
    resident_ER = np.zeros((4, 2), np.bool_)
    resident_ER[:2, 1] = True
    resident_ER[2:, 0] = True
    _pack(layer, expert_P, resident_ER)
    assert expert_P.tolist() == [2, 3, 0, 1]


def test_a_rank_with_too_much_passes_its_hottest_expert_on() -> None:
    layer, expert_P = problem([9, 2, 1], [2, 2], np.array([0, EMPTY, EMPTY, EMPTY]))
    _pack(layer, expert_P)
    check_index(layer, expert_P)
    assert layer.copies_E[0] == 2
    assert improve(layer, expert_P, np.full(3, -1), 0, 0, 1.0) < 1 + 1e-6
