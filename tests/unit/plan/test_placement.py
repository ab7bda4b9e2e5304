"""Placement: every expert has one home in a slot of that rank, no rank two copies, homes stay where they can."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.errors import UserError
from elastic_moe.plan.placement import EMPTY, LOST, Placement, Topology, default_slots, plan_placement
from elastic_moe.plan.split import split_tokens
from elastic_moe.types import Member, View


def _check(placement: Placement, slots: list[int], num_experts: int) -> None:
    assert placement.rank_of_slot.tolist() == [rank for rank, count in enumerate(slots) for _ in range(count)]
    for expert_P, home_E in zip(placement.expert_of_slot, placement.home, strict=True):
        for rank, count in enumerate(slots):
            here = expert_P[placement.slots_of(rank)]
            experts = here[here != EMPTY].tolist()
            homes = np.flatnonzero(home_E == rank).tolist()
            assert len(set(experts)) == len(experts), "two copies on one rank"
            assert experts[: len(homes)] == homes and len(homes) <= count
            if EMPTY in here:
                assert len(experts) == num_experts, "a free slot although an expert would fit"
        assert ((home_E >= 0) & (home_E < len(slots))).all()


@st.composite
def _cases(draw: st.DrawFn) -> tuple[np.ndarray, Topology, list[int], Placement | None]:
    num_ranks, num_experts, num_layers = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    slots = draw(st.lists(st.integers(0, 6), min_size=num_ranks, max_size=num_ranks))
    while sum(slots) < num_experts:
        slots[draw(st.integers(0, num_ranks - 1))] += 1
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    load = rng.integers(0, 5, (num_layers, num_experts)) * draw(st.sampled_from([0.0, 1.0, 100.0]))
    topology = Topology(
        tuple(draw(st.sampled_from("abc")) for _ in range(num_ranks)),
        tuple(draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])) for _ in range(num_ranks)),
    )
    previous = None
    if draw(st.booleans()):
        homes = rng.integers(-1, num_ranks, (num_layers, num_experts)).astype(np.int32)
        previous = Placement(np.zeros((num_layers, 0), np.int32), np.zeros(0, np.int32), homes)
    return load, topology, slots, previous


@given(_cases())
def test_any_placement_is_valid_and_stable(case: tuple[np.ndarray, Topology, list[int], Placement | None]) -> None:
    load, topology, slots, previous = case
    placement = plan_placement(load, topology, slots, previous)
    _check(placement, slots, load.shape[1])
    again = plan_placement(load, topology, slots, previous)
    assert np.array_equal(again.expert_of_slot, placement.expert_of_slot)
    later = plan_placement(load[:, ::-1], topology, slots, placement, home_moves=0)
    assert np.array_equal(later.home, placement.home), "homes must not move while the slots stay"


def test_lost_homes_return_and_the_others_stay() -> None:
    topology = Topology(("a", "a", "b", "b"), (1.0,) * 4)
    first = plan_placement(np.ones((2, 16)), topology, [5] * 4)
    homes = np.where(first.home == 3, LOST, first.home).astype(np.int32)
    survivor = plan_placement(
        np.ones((2, 16)),
        Topology(("a", "a", "b"), (1.0,) * 3),
        [7] * 3,
        Placement(first.expert_of_slot, first.rank_of_slot, homes),
    )
    _check(survivor, [7] * 3, 16)
    assert np.array_equal(survivor.home[homes != LOST], homes[homes != LOST])
    joined = plan_placement(np.ones((2, 16)), topology, [5] * 4, survivor)
    assert [(joined.home == rank).sum() for rank in range(4)] == [8] * 4
    assert (joined.home != survivor.home).sum() == 8, "only what the joiner takes moves"


def test_hot_expert_gets_a_replica_on_another_node() -> None:
    load = np.ones((1, 8))
    load[0, 3] = 20.0
    placement = plan_placement(load, Topology(("a", "a", "b", "b"), (1.0,) * 4), [3] * 4)
    holders = placement.rank_of_slot[placement.expert_of_slot[0] == 3]
    assert {"aabb"[rank] for rank in holders} == {"a", "b"}


@pytest.mark.parametrize(("ranks", "experts", "spare"), [(4, 16, 1), (7, 64, 1), (8, 64, 2), (3, 64, 1)])
def test_zipf_load_is_balanced_by_the_split(ranks: int, experts: int, spare: int) -> None:
    rng = np.random.default_rng(0)
    topology = Topology(tuple("ab"[rank % 2] for rank in range(ranks)), (1.0,) * ranks)
    slots = [-(-experts // ranks) + spare] * ranks
    sticky = plan_placement(np.ones((1, experts)), topology, slots)
    for _ in range(10):
        tokens = (rng.permutation(1 / np.arange(1, experts + 1)) * 10_000).astype(int)
        placement = plan_placement(tokens[None], topology, slots, sticky)
        out = split_tokens(np.tile(tokens, (ranks, 1)), placement, 0)
        rank_load = np.bincount(placement.rank_of_slot, weights=out.sum(axis=0), minlength=ranks)
        assert rank_load.mean() / rank_load.max() > 0.95


def test_too_few_slots_is_the_users_error() -> None:
    with pytest.raises(UserError, match="slots"):
        plan_placement(np.ones((1, 9)), Topology(("a", "a"), (1.0, 1.0)), [4, 4])


def _view(*members: tuple[int, bool]) -> View:
    return View(1, tuple(Member(f"w{i}", "a", i, slots=s, draining=d) for i, (s, d) in enumerate(members)))


def test_default_slots() -> None:
    assert default_slots(16, _view((0, False), (0, False), (0, False)), 1, 0) == [7, 7, 7]
    assert default_slots(16, _view((0, False), (0, True), (0, False)), 1, 0) == [9, 0, 9]
    assert default_slots(4, _view((0, False)), 3, 0) == [4]
    assert default_slots(16, _view((2, False), (0, False)), 1, 0) == [2, 14], "others take what a small member cannot"
    assert default_slots(16, _view((0, False), (0, False), (0, False)), 1, 6) == [6, 6, 6]
    with pytest.raises(UserError, match="slots_per_worker"):
        default_slots(16, _view((0, False), (0, False)), 1, 7)
