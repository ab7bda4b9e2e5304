"""The plan of one layer: copies that stay, ranks that are relabelled, homes within their maximum."""

from __future__ import annotations

import numpy as np

from elastic_moe.plan.placement.layer import plan_layer
from tests.unit.plan.placement.problems import check_index, problem

NO_HOMES_MOVE, ANY_HOME_MOVES = 0, 1 << 20


def _plan(
    load: list[int],
    slots: list[int],
    resident_ER: np.ndarray | None = None,
    home: list[int] | None = None,
    membership_changed: bool = False,
    home_moves: int = ANY_HOME_MOVES,
) -> tuple[np.ndarray, np.ndarray, float]:
    layer, expert_P = problem([value * 2**20 for value in load], slots)
    home_E = np.array(home or [-1] * len(load))
    if resident_ER is None:
        resident_ER = np.zeros((len(load), len(slots)), np.bool_)
    max_homes_R = np.full(len(slots), -(-len(load) // len(slots)))
    makespan = plan_layer(
        layer.load_E,
        layer.target_R,
        layer.start_R,
        layer.rank_P,
        layer.node_R,
        layer.round_robin_R,
        max_homes_R,
        resident_ER,
        expert_P,
        home_E,
        membership_changed,
        home_moves,
    )
    return expert_P, home_E, makespan


def test_a_plan_that_fits_stays() -> None:
    load = [9, 7, 5, 4, 3, 2, 1, 1]
    expert_P, home_E, makespan = _plan(load, [4, 4, 4])
    rank_P = np.repeat(np.arange(3), 4)
    resident_ER = np.zeros((8, 3), np.bool_)
    resident_ER[expert_P, rank_P] = True
    again_P, again_E, again = _plan(load, [4, 4, 4], resident_ER, home_E.tolist())
    assert makespan < 1.005
    assert again < 1.005
    assert again_E.tolist() == home_E.tolist()
    assert all(resident_ER[expert, rank] for expert, rank in zip(again_P, rank_P, strict=True))


def test_without_homes_ranks_take_the_contents_that_they_hold() -> None:
    load = [9, 7, 5, 4, 3, 2, 1, 1]
    expert_P, _, _ = _plan(load, [4, 4, 4])
    rank_P = np.repeat(np.arange(3), 4)
    resident_ER = np.zeros((8, 3), np.bool_)
    resident_ER[expert_P, (rank_P + 1) % 3] = True  # the same plan one rank further
    moved_P, _, _ = _plan(load, [4, 4, 4], resident_ER)
    kept = sum(resident_ER[expert, rank] for expert, rank in zip(moved_P, rank_P, strict=True))
    assert kept >= 9, "without relabelling, fewer copies would lie where they were"


def test_homes_stay_unless_they_may_move() -> None:
    load, home = [50, 40, 3, 2, 1, 1], [0, 0, 0, 1, 1, 1]
    resident_ER = np.zeros((6, 2), np.bool_)
    resident_ER[np.arange(6), home] = True
    _, fixed_E, fixed = _plan(load, [3, 3], resident_ER, home, home_moves=NO_HOMES_MOVE)
    _, moved_E, moved = _plan(load, [3, 3], resident_ER, home)
    assert fixed_E.tolist() == home
    assert moved < fixed
    assert moved_E.tolist() != home


def test_a_changed_membership_spreads_the_homes() -> None:
    resident_ER = np.zeros((6, 2), np.bool_)
    resident_ER[:, 0] = True
    _, kept_E, _ = _plan([1] * 6, [6, 6], resident_ER, [0] * 6, home_moves=NO_HOMES_MOVE)
    _, spread_E, _ = _plan([1] * 6, [6, 6], resident_ER, [0] * 6, True, NO_HOMES_MOVE)
    assert kept_E.tolist() == [0] * 6
    assert sorted(spread_E.tolist()) == [0, 0, 0, 1, 1, 1]


def test_few_slots_still_hold_all_experts() -> None:
    expert_P, home_E, _ = _plan([9, 8, 7, 6, 5, 4, 3, 2, 1], [3, 3, 3, 1])
    layer, _ = problem([1] * 9, [3, 3, 3, 1], expert_P)
    check_index(layer, expert_P)
    assert set(expert_P[expert_P >= 0]) == set(range(9))
    assert all(layer.rank_P[expert_P == expert].tolist().count(home_E[expert]) == 1 for expert in range(9))
