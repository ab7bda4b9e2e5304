"""Maximum flow of the token split: capacities, the greedy start, and rises of the makespan at a cut."""

from __future__ import annotations

import numpy as np
import pytest

from elastic_moe.plan.split.max_flow import augment_flow, greedy_flow, initial_capacities, sort_arcs_by_rank
from elastic_moe.plan.split.min_cost import cancel_cycles


def _capacities(total: int, fixed: list[int], speeds: list[float], reach: list[bool]) -> tuple[list[int], list[int]]:
    capacity_R, slack_R = np.zeros(len(fixed), np.int64), np.zeros(len(fixed), np.int64)
    initial_capacities(total, np.array(fixed), np.array(speeds), np.array(reach), capacity_R, slack_R)
    return capacity_R.tolist(), slack_R.tolist()


def test_arcs_by_rank() -> None:
    arcs_by_rank, first_arc_R = sort_arcs_by_rank(np.array([2, 0, 2, 1]), 4)
    assert arcs_by_rank.tolist() == [1, 3, 0, 2]
    assert first_arc_R.tolist() == [0, 1, 2, 4, 4]


@pytest.mark.parametrize(
    ("total", "fixed", "speeds", "reach", "capacities"),
    [
        (10, [0, 0], [1.0, 1.0], [True, True], [5, 5]),
        (9, [0, 0], [1.0, 0.5], [True, True], [6, 3]),
        (4, [8, 0], [1.0, 1.0], [True, True], [8, 8]),  # the slowest rank's fixed load
        (4, [0, 0], [1.0, 1.0], [True, False], [4, 4]),  # ranks without flexible experts do not count for the mean
        (5, [0, 0], [1.0, 1.0], [True, True], [2, 2]),  # whole tokens, rounded down: a lower bound
    ],
)
def test_initial_capacities(
    total: int, fixed: list[int], speeds: list[float], reach: list[bool], capacities: list[int]
) -> None:
    capacity, slack = _capacities(total, fixed, speeds, reach)
    assert capacity == capacities
    assert slack == [c - f for c, f in zip(capacities, fixed, strict=True)]


def test_greedy_flow_keeps_tokens_on_their_rank_then_in_their_node() -> None:
    """One expert on ranks 0, 1 (node a) and 2 (node b): rank 0 sends 4, rank 1 sends 2, rank 2 sends 4."""
    flow_A, unplaced_K, slack_R = np.zeros(3, np.int64), np.array([10]), np.array([3, 5, 1])
    own_A, local_Q = np.array([4, 2, 4]), np.array([6, 4])
    greedy_flow(flow_A, unplaced_K, slack_R, own_A, local_Q, np.arange(3), np.array([0, 3]), np.array([0, 0, 1]))
    assert flow_A.tolist() == [3, 5, 1], "rank 1 takes the own node's token, then what rank 2 has no slack for"
    assert unplaced_K.tolist() == [1]
    assert slack_R.tolist() == [0, 0, 0]


def _augment(
    total: list[int], arcs: list[tuple[int, int]], fixed: list[int], speeds: list[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Flow and capacities from an empty flow; arcs (expert, rank) expert by expert, all ranks on one node."""
    expert_A, rank_A = (np.array(column) for column in zip(*arcs, strict=True))
    total_K, fixed_R, speed_R = np.array(total), np.array(fixed), np.array(speeds)
    first_arc_K = np.searchsorted(expert_A, np.arange(len(total) + 1))
    reach_R = np.isin(np.arange(len(fixed)), rank_A)
    capacity_R, slack_R = np.zeros(len(fixed), np.int64), np.zeros(len(fixed), np.int64)
    initial_capacities(sum(total), fixed_R, speed_R, reach_R, capacity_R, slack_R)
    flow_A, unplaced_K = np.zeros(len(arcs), np.int64), total_K.copy()
    arcs_by_rank, first_arc_R = sort_arcs_by_rank(rank_A, len(fixed))
    augment_flow(
        flow_A,
        unplaced_K,
        total_K,
        fixed_R,
        speed_R,
        expert_A,
        rank_A,
        first_arc_K,
        arcs_by_rank,
        first_arc_R,
        capacity_R,
        slack_R,
        total_K.copy(),
        expert_A.copy(),
    )
    assert not unplaced_K.any()
    assert np.bincount(expert_A, weights=flow_A, minlength=len(total)).tolist() == total
    used_R = fixed_R + np.bincount(rank_A, weights=flow_A, minlength=len(fixed)).astype(int)
    assert (used_R + slack_R == capacity_R).all()
    return flow_A, capacity_R


def test_tokens_pass_along_a_chain_of_experts() -> None:
    flow_A, capacity_R = _augment([6, 6, 6], [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 3)], [6, 0, 0, 0], [1.0] * 4)
    assert capacity_R.max() == 6
    assert np.bincount([0, 1, 1, 2, 2, 3], weights=flow_A).tolist() == [0, 6, 6, 6]


def test_the_makespan_rises_to_the_need_of_the_cut() -> None:
    """Experts 0 and 1 fit on ranks 0 and 1 only; the mean over all ranks is 5, the cut needs 9 tokens on two ranks."""
    flow_A, capacity_R = _augment(
        [9, 9, 2], [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (2, 3)], [0] * 4, [1.0, 1.0, 1.0, 1.0]
    )
    assert capacity_R.max() == 9
    assert np.bincount([0, 1, 0, 1, 2, 3], weights=flow_A)[:2].tolist() == [9, 9]


def test_single_tokens_go_where_they_cost_least_time() -> None:
    flow_A, _ = _augment([7], [(0, 0), (0, 1)], [0, 0], [1.0, 0.4])
    assert flow_A.tolist() == [5, 2], "times 5 and 5; with 6 and 1 the slowest would take 6"


def test_cancelled_cycles_bring_tokens_home_within_the_same_load() -> None:
    """Both experts lie on both ranks, and the flow sends every token to the other rank."""
    flow_A, slack_R = np.array([0, 5, 5, 0]), np.zeros(2, np.int64)
    rank_A, pair_A = np.array([0, 1, 0, 1]), np.array([0, 1, 2, 3])
    own_A, local_Q = np.array([5, 0, 0, 5]), np.array([5, 0, 0, 5])
    cycles = cancel_cycles(flow_A, slack_R, own_A, local_Q, rank_A, pair_A, np.array([0, 0, 1, 1]), 2, 2)
    assert flow_A.tolist() == [5, 0, 0, 5]
    assert cycles >= 1
    assert cancel_cycles(flow_A, slack_R, own_A, local_Q, rank_A, pair_A, np.array([0, 0, 1, 1]), 2, 2) == 0
