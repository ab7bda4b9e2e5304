"""Homes: chosen among the copies, released beyond a rank's maximum, given to ranks that hold a copy."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.plan.placement.homes import choose_homes, place_homeless, release_homes
from tests.unit.plan.placement.problems import problem


def _choose(expert_P: list[int], slots: list[int], max_homes: list[int], home: list[int]) -> list[int]:
    layer, plan_P = problem([1] * len(home), slots, np.array(expert_P))
    home_E = np.array(home)
    choose_homes(np.array(max_homes), layer.rank_P, layer.slots_of_ER, layer.copies_E, home_E)
    assert len(plan_P) == len(expert_P)
    return home_E.tolist()


def test_a_full_rank_passes_a_home_on() -> None:
    """Expert 2 lives on rank 0 only, so expert 0 or 1, chosen there before, must move to its other copy."""
    assert _choose([0, 1, 2, 0, 1], [3, 2], [1, 2], [-1] * 3) == [1, 1, 0]


def test_given_homes_do_not_move() -> None:
    assert _choose([0, 1, 0, 1], [2, 2], [1, 1], [0, -1]) == [0, 1]


def test_above_the_maximum_only_where_nothing_else_is_possible() -> None:
    assert _choose([0, 1, 0], [2, 1], [1, 0], [-1, -1]) == [0, 0]


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 10**6))
def test_the_matching_is_as_large_as_can_be(num_ranks: int, num_experts: int, seed: int) -> None:
    """Beside a plain augmenting search that counts how many experts find a home within the maxima."""
    rng = np.random.default_rng(seed)
    holds_ER = rng.random((num_experts, num_ranks)) < 0.4
    holds_ER[np.arange(num_experts), rng.integers(0, num_ranks, num_experts)] = True
    max_homes = rng.integers(0, 4, num_ranks)
    slots = holds_ER.sum(axis=0).tolist()
    home = _choose(np.nonzero(holds_ER.T)[1].tolist(), slots, max_homes.tolist(), [-1] * num_experts)
    assert holds_ER[np.arange(num_experts), home].all()
    held_R = [[] for _ in range(num_ranks)]

    def insert(expert: int, seen: set[int]) -> bool:
        for rank in set(np.flatnonzero(holds_ER[expert]).tolist()) - seen:
            seen.add(rank)
            if len(held_R[rank]) < max_homes[rank]:
                held_R[rank].append(expert)
                return True
            for other in list(held_R[rank]):
                if insert(other, seen):
                    held_R[rank].remove(other)
                    held_R[rank].append(expert)
                    return True
        return False

    most = sum(insert(expert, set()) for expert in range(num_experts))
    assert np.minimum(np.bincount(home, minlength=num_ranks), max_homes).sum() == most


def test_release_gives_up_homes_without_a_copy_first() -> None:
    home_E, resident_ER = np.array([0, 0, 0, 1]), np.zeros((4, 2), np.bool_)
    resident_ER[[0, 2], 0] = True
    resident_ER[3, 1] = True
    load_E = np.array([3, 3, 3, 3])
    release_homes(load_E, np.array([6.0, 6.0]), np.array([2, 2]), np.array([3, 3]), resident_ER, home_E)
    assert home_E.tolist() == [0, -1, 0, 1]


def test_a_lost_home_goes_to_a_rank_that_holds_a_copy() -> None:
    home_E, resident_ER = np.array([0, -1, -1]), np.zeros((3, 2), np.bool_)
    resident_ER[1, :] = True
    release_homes(np.array([1, 1, 1]), np.array([1.5, 1.5]), np.array([2, 2]), np.array([3, 3]), resident_ER, home_E)
    assert home_E.tolist() == [0, 1, -1], "the rank with the fewest homes; expert 2 has no copy anywhere"


def test_a_rank_full_of_light_homes_releases_the_lightest() -> None:
    home_E = np.array([0, 0, 1])
    resident_ER = np.array([[True, False], [True, False], [False, True]])
    release_homes(np.array([2, 1, 9]), np.array([6.0, 6.0]), np.array([2, 2]), np.array([2, 2]), resident_ER, home_E)
    assert home_E.tolist()[0] == 0
    assert home_E.tolist()[2] == 1
    assert home_E[1] == 0, "it holds a copy and has the room again, so it gets the expert back"


def test_homeless_experts_go_to_the_least_loaded_rank_below_its_maximum() -> None:
    home_E = np.array([0, -1, -1, -1])
    place_homeless(np.array([5, 4, 3, 1]), np.array([1.0, 1.0]), np.array([2, 2]), np.array([4, 4]), home_E)
    assert home_E.tolist() == [0, 1, 1, 0]
    home_E = np.array([0, 0, -1])
    place_homeless(np.array([1, 1, 1]), np.array([1.0, 1.0]), np.array([1, 0]), np.array([3, 1]), home_E)
    assert home_E.tolist() == [0, 0, 1], "beyond the maximum, where there are slots"
