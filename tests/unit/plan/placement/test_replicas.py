"""Copies of a layer's experts: the index, the first construction, copies that stay, and the order of slots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.plan.placement.replicas import (
    EMPTY,
    add_copy,
    construct,
    drop_copy,
    keep_copies,
    replication_weight,
    sort_slots,
)
from tests.unit.plan.placement.problems import check_index, components, problem


def test_the_index_follows_copies_added_and_dropped() -> None:
    layer, expert_P = problem([4, 3, 2], [2, 2, 2])
    index = (expert_P, layer.slots_of_ER, layer.copies_E)
    for expert, slot in ((0, 0), (0, 3), (0, 4), (2, 1)):
        add_copy(expert, slot, *index)
        check_index(layer, expert_P)
    drop_copy(3, *index)
    check_index(layer, expert_P)
    assert layer.copies_E.tolist() == [2, 0, 1]
    assert expert_P.tolist() == [0, 2, EMPTY, EMPTY, 0, EMPTY]


def test_replication_weight_is_a_power_of_the_load() -> None:
    load_E = np.array([1, 10, 2**40], dtype=np.int64)
    assert replication_weight(load_E) == pytest.approx(load_E.astype(float) ** (7 / 8))


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 10**6))
def test_construction_fills_all_slots_and_links_all_ranks(num_ranks: int, per_rank: int, seed: int) -> None:
    """P = E + R - 1 slots are enough to link all ranks, if an expert may have as many copies as it takes."""
    rng = np.random.default_rng(seed)
    num_experts = max(1, num_ranks * per_rank - num_ranks + 1)
    layer, expert_P = problem(rng.integers(1, 1000, num_experts).tolist(), [per_rank] * num_ranks)
    construct(layer, expert_P)
    check_index(layer, expert_P)
    assert (layer.copies_E >= 1).all()
    assert (expert_P != EMPTY).all()
    assert components(layer, expert_P) == 1


def test_the_hottest_expert_gets_the_replicas_on_another_node() -> None:
    layer, expert_P = problem([100, 10, 10, 10, 10], [2, 2, 1, 1], nodes="aabb")
    construct(layer, expert_P)
    assert layer.copies_E.tolist() == [2, 1, 1, 1, 1]
    ranks = layer.rank_P[expert_P == 0]
    assert set(layer.node_R[ranks]) == {0, 1}


def test_homes_stay_before_hot_resident_copies() -> None:
    layer, expert_P = problem([1, 5, 9], [2, 1])
    resident_ER = np.array([[True, False], [True, False], [True, True]])
    keep_copies(resident_ER, layer.load_E, np.array([0, -1, 1]), layer.start_R, expert_P)
    assert expert_P.tolist() == [0, 2, 2], "expert 0 is cold but at home; of the others the hottest stays"


def test_slots_are_sorted_homes_first() -> None:
    expert_LP = np.array([[3, EMPTY, 0, 1, 2, 0]])
    sort_slots(expert_LP, np.array([[1, 0, 1, 0]]), np.array([0, 4, 6]))
    assert expert_LP.tolist() == [[1, 3, 0, EMPTY, 0, 2]]
