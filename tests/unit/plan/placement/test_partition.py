"""Too few slots to link all ranks: the division into groups, beside a bound and all placements of small cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.plan.placement import Placement, Topology, plan_placement
from elastic_moe.plan.placement.partition import partition_experts
from elastic_moe.plan.split import slowest_times
from scripts.benchmarks.placement_bound import least_time


@st.composite
def _few_slots(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    """Loads, heaviest first, and slots that need not suffice to link all ranks; some ranks have none."""
    slots = draw(st.lists(st.integers(0, 6), min_size=1, max_size=10))
    slots[0] += 1
    experts = draw(st.integers(max(1, sum(slots) - len(slots)), sum(slots)))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    load_E = np.sort(rng.lognormal(0, draw(st.sampled_from([0.1, 1.0, 2.5])), experts))[::-1]
    return np.rint(load_E / load_E.sum() * 2.0**40).astype(np.int64) + 1, slots


@settings(max_examples=150, deadline=None)
@given(_few_slots())
def test_groups_hold_what_they_claim(case: tuple[np.ndarray, list[int]]) -> None:
    load_E, slots = case
    slots_R = np.array(slots)
    target_R = np.where(slots_R > 0, 1.0, 0.0) * load_E.sum() / (slots_R > 0).sum()
    groups = partition_experts(load_E, target_R, slots_R, 1.003)
    able = slots_R > 0
    assert set(groups.group_E) <= set(groups.group_R[able]) == set(np.flatnonzero(groups.alive_G))
    for group in np.flatnonzero(groups.alive_G):
        ranks, experts = able & (groups.group_R == group), groups.group_E == group
        assert groups.load_G[group] == load_E[experts].sum()
        assert groups.target_G[group] == pytest.approx(target_R[ranks].sum())
        assert groups.experts_G[group] == experts.sum()
        assert experts.sum() <= groups.max_experts_G[group] == slots_R[ranks].sum() - (ranks.sum() - 1)


@pytest.mark.parametrize("slots", [[2, 2, 2], [3, 2, 2], [3, 3, 1], [2, 2, 2, 1], [4, 3]])
def test_small_cases_against_all_placements(slots: list[int]) -> None:
    rng = np.random.default_rng(sum(slots))
    ranks, topology = len(slots), Topology(("a",) * len(slots), (1.0,) * len(slots))
    ratios = []
    for experts in range(sum(slots) - ranks + 1, sum(slots) + 1):  # P - E < R - 1, and one case of enough
        for spread in (0.3, 1.0, 2.0):
            load_E = rng.lognormal(0, spread, experts)
            best = min(_all_times(load_E, slots))
            assert least_time(load_E, slots, topology.speeds) <= best * load_E.sum() / ranks * (1 + 1e-6)
            placement = plan_placement(load_E[None], topology, slots)
            ratios.append(best / float(slowest_times(load_E[None], placement)[0]))
    assert max(ratios) < 1 + 1e-6, "nothing is better than the best"
    assert min(ratios) > 0.99
    assert np.mean(ratios) > 0.998


@pytest.mark.parametrize("slots", [[6] * 12, [5] * 60, [10] + [9] * 6, [9, 9] + [8] * 6, [5] * 8 + [4] * 8])
@pytest.mark.parametrize("kind", ["zipf", "lognormal"])
def test_within_two_percent_of_the_bound(slots: list[int], kind: str) -> None:
    experts = 256 if len(slots) == 60 else 64
    rng, speeds = np.random.default_rng(2), (1.0,) * len(slots)
    topology = Topology(tuple(f"n{rank // 8}" for rank in range(len(slots))), speeds)
    for _ in range(4):
        load_E = rng.lognormal(0, 0.4 if kind == "zipf" else 1.0, experts)
        if kind == "zipf":
            load_E /= rng.permutation(np.arange(1, experts + 1))
        placement = plan_placement(load_E[None], topology, slots)
        bound = least_time(load_E, slots, speeds) / (load_E.sum() / len(slots))
        assert bound / slowest_times(load_E[None], placement)[0] > 0.98


def test_groups_take_their_ranks_from_different_nodes() -> None:
    load_E = np.ones(16)
    load_E[3] = 7.0
    topology = Topology(("a",) * 4 + ("b",) * 4, (1.0,) * 8)
    placement = plan_placement(load_E[None], topology, [3, 2, 2, 2] * 2)
    ranks = placement.rank_of_slot[placement.expert_of_slot[0] == 3]
    assert len(ranks) >= 2
    assert {topology.nodes[rank] for rank in ranks} == {"a", "b"}


def _all_times(load_E: np.ndarray, slots: list[int]) -> list[float]:
    """Time of the slowest rank of every placement that fills its slots as far as there are experts; 1 is the mean."""
    experts, times = len(load_E), []
    rank_P = np.repeat(np.arange(len(slots)), slots).astype(np.int32)
    home = np.zeros((1, experts), dtype=np.int32)
    for chosen in itertools.product(*(itertools.combinations(range(experts), min(s, experts)) for s in slots)):
        if len(set(itertools.chain(*chosen))) == experts:
            held = [e for ranks, s in zip(chosen, slots, strict=True) for e in (*ranks, *[-1] * (s - len(ranks)))]
            placement = Placement(np.array([held], dtype=np.int32), rank_P, home)
            times.append(float(slowest_times(load_E[None], placement, [1.0] * len(slots))[0]))
    return times
