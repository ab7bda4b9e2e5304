"""Placement with a copy of every expert on each node: over memberships drawn at random, as they come and go."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from elastic_moe.config.schema import ModelConfig
from elastic_moe.control.look import look_at
from elastic_moe.model.params import param_specs
from elastic_moe.plan.placement import LOST, Placement, Topology, default_slots, plan_placement
from elastic_moe.plan.split import slowest_times
from elastic_moe.plan.state.ownership import NONE, copies_from_roles, homes_from_roles, plan_ownership
from elastic_moe.plan.state.units import build_units
from elastic_moe.plan.values import MOST_APART
from elastic_moe.types import Member, View

LAYERS, EXPERTS = 3, 12


def view_of(nodes: str, draining: frozenset[int] = frozenset()) -> View:
    return View(1, tuple(Member(f"w{r}", node, r, draining=r in draining) for r, node in enumerate(nodes)))


def planned(
    view: View, load_LE: np.ndarray, previous: Placement | None = None, moves: int | None = 0, spare: int = 1
) -> Placement:
    slots = default_slots(EXPERTS, view, spare, 0, 1, in_nodes=True)
    speeds = tuple(float(not member.draining) for member in view.members)
    topology = Topology(tuple(member.node for member in view.members), speeds, in_nodes=True)
    return plan_placement(load_LE, topology, slots, previous, home_moves=moves)


def check(view: View, placement: Placement) -> None:
    """Each node with an active rank has every expert, and each home is a copy on a rank that is active."""
    assert placement.in_nodes
    active = [view.members[rank].node for rank in view.active_ranks]
    for node in set(active):
        ranks = [r for r in view.active_ranks if view.members[r].node == node]
        here = np.isin(placement.rank_of_slot, ranks)
        for layer in range(LAYERS):
            assert set(placement.expert_of_slot[layer, here].tolist()) >= set(range(EXPERTS))
    for rank, member in enumerate(view.members):
        own = placement.slots_of(rank)
        assert (own.stop > own.start) == (not member.draining)
        for layer in range(LAYERS):
            experts = placement.expert_of_slot[layer, own].tolist()
            at_home = [expert for expert in experts if placement.home[layer, expert] == rank and expert >= 0]
            assert len(at_home) == int((placement.home[layer] == rank).sum()), (
                "a home is a copy, and there is one of it"
            )
            assert experts[: len(at_home)] == at_home, "homes come first"
    assert (np.diff(placement.rank_of_slot) >= 0).all()


@pytest.mark.parametrize("seed", range(30))
def test_memberships_that_come_and_go(seed: int) -> None:
    rng = random.Random(seed)
    loads = np.random.default_rng(seed)
    nodes = "".join(rng.choice("abc") for _ in range(rng.randint(2, 9)))
    view, placement = view_of(nodes), None
    for _ in range(5):
        load_LE = loads.integers(1, 1000, (LAYERS, EXPERTS)).astype(float)
        placement = planned(view, load_LE, placement, moves=rng.choice((0, 2, None)))
        check(view, placement)
        most = -(-EXPERTS * np.bincount(placement.rank_of_slot) // len(placement.rank_of_slot))
        for layer in range(LAYERS):
            homes = np.bincount(placement.home[layer], minlength=len(most))
            assert (homes <= most + EXPERTS // 4).all(), "the state is spread"
        again = planned(view, load_LE, placement)
        assert (again.home == placement.home).all(), "homes stay where nobody comes or goes"
        staying = [rank for rank in range(view.world_size) if rng.random() < 0.7] or [0]
        rank_of = [staying.index(rank) if rank in staying else LOST for rank in range(view.world_size)]
        placement = placement.remap_ranks(rank_of)
        nodes = "".join(view.members[rank].node for rank in staying)
        nodes += "".join(rng.choice("abcd") for _ in range(rng.randint(0, 3)))
        draining = frozenset({0} if rng.random() < 0.3 and len(nodes) > 1 else ())
        view = view_of(nodes, draining)


def test_a_rank_reaches_its_node() -> None:
    view = view_of("abab")
    placement = planned(view, np.ones((LAYERS, EXPERTS)))
    ranks, part = placement.reach(2)
    assert ranks == (0, 2)
    assert part.rank_of_slot.tolist() == [0] * 7 + [1] * 7
    for number, rank in enumerate(ranks):
        there = placement.expert_of_slot[:, placement.slots_of(rank)]
        assert (part.expert_of_slot[:, part.slots_of(number)] == there).all()
    at_home = (placement.home == 0) | (placement.home == 2)
    assert (part.home[~at_home] == LOST).all()
    assert (part.home[placement.home == 2] == 1).all()
    flat = plan_placement(np.ones((LAYERS, EXPERTS)), Topology(tuple("abab"), (1.0,) * 4), [4] * 4)
    assert flat.reach(2) == ((0, 1, 2, 3), flat)


def test_each_node_is_balanced_by_itself() -> None:
    """Two nodes, of two ranks and of three: with a spare slot each, any load can be split evenly in both."""
    load_LE = np.random.default_rng(0).zipf(1.5, (LAYERS, EXPERTS)).clip(1, 50).astype(float)
    placement = planned(view_of("aabbb"), load_LE)
    assert slowest_times(load_LE, placement, [1.0] * 5).max() <= 1.01
    assert placement.time_L is not None
    assert placement.time_L.max() <= 1.01
    for first in (0, 2):
        _, part = placement.reach(first)
        assert slowest_times(load_LE, part).max() <= 1.01


def test_homes_are_spread_over_all_nodes() -> None:
    placement = planned(view_of("aabb"), np.ones((LAYERS, EXPERTS)))
    for layer in range(LAYERS):
        assert np.bincount(placement.home[layer]).tolist() == [3, 3, 3, 3]
    grown = planned(view_of("aabbcc"), np.ones((LAYERS, EXPERTS)), placement)
    for layer in range(LAYERS):
        assert np.bincount(grown.home[layer]).tolist() == [2] * 6
    assert (grown.home != placement.home).sum() == LAYERS * 4, "no home moves that need not"


def test_a_main_copy_is_where_the_mirror_is() -> None:
    """So that it is sent no weights: always in a new run on equal nodes, and mostly after deaths and joins."""
    units = build_units(param_specs(ModelConfig(num_experts=EXPERTS, num_layers=LAYERS, num_dense_layers=0)), 1 << 20)
    nodes, roles_RU, found = "aaabbb", np.full((6, len(units)), NONE, np.uint8), []
    for change in (None, 4, "b", 1, "a"):
        if isinstance(change, int):
            nodes, roles_RU = nodes[:change] + nodes[change + 1 :], np.delete(roles_RU, change, 0)
        elif change is not None:
            nodes, roles_RU = nodes + change, np.vstack([roles_RU, np.full((1, len(units)), NONE, np.uint8)])
        view = view_of(nodes)
        homes = homes_from_roles(units, roles_RU, view.active_ranks, (LAYERS, EXPERTS))
        there = copies_from_roles(units, roles_RU, view.active_ranks, (LAYERS, EXPERTS))
        placement = planned(view, np.ones((LAYERS, EXPERTS)), Placement(*there, homes))
        check(view, placement)
        ownership = plan_ownership(units, view, roles_RU, 1, placement.home)
        roles_RU = ownership.roles(len(nodes))
        found.append(
            np.mean(
                [
                    unit.expert in placement.expert_of_slot[unit.moe_layer, placement.slots_of(int(mirror))]
                    for unit, mirror in zip(units, ownership.mirrors[:, 0], strict=True)
                    if unit.expert is not None
                ]
            )
        )
    assert found[0] == 1.0
    assert min(found) > 0.6, found


def test_a_look_during_the_run_keeps_rows_in_their_nodes() -> None:
    view, rng = view_of("aabb"), np.random.default_rng(3)
    even = planned(view, np.ones((LAYERS, EXPERTS)), spare=0)
    load_LE = rng.zipf(1.3, (LAYERS, EXPERTS)).clip(1, 30).astype(float)
    slots = np.bincount(even.rank_of_slot).tolist()
    topology = Topology(tuple("aabb"), (1.0,) * 4, in_nodes=True)
    look = look_at(load_LE, even, topology, slots, [1.0] * 4, home_moves=4)
    assert look.homes is not None
    assert look.homes_L is not None
    for placement in (look.replicas, look.homes):
        check(view, placement)
    assert (look.replicas.home == even.home).all()
    assert look.homes_L.sum() <= look.replicas_L.sum() <= look.now_L.sum()


def test_rows_have_a_group_of_their_own_between_nodes_of_not_too_many_ranks() -> None:
    def placement(nodes: list[int]) -> Placement:
        ranks = np.arange(len(nodes), dtype=np.int32)
        return Placement(ranks[None, :], ranks, ranks[None, :], np.array(nodes, dtype=np.int32))

    assert placement([0, 0, 1]).rows_apart
    assert not placement([0, 0, 0]).rows_apart
    assert not replace(placement([0, 1]), node_of_rank=None).rows_apart
    assert placement(list(range(MOST_APART))).rows_apart
    assert not placement(list(range(MOST_APART + 1))).rows_apart
    assert replace(placement(list(range(MOST_APART + 1))), in_nodes=True).rows_apart
