"""Ownership and transfers: every unit always has a living owner, and transfers turn the old layout into the new one."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.plan.state.ownership import (
    MIRROR,
    NONE,
    PRIMARY,
    Ownership,
    copies_from_roles,
    homes_from_roles,
    plan_ownership,
)
from elastic_moe.plan.state.transfers import plan_transfers
from elastic_moe.plan.state.units import Units, unit_work
from elastic_moe.types import Member, Part, Unit, View


def _unit(index: int, numel: int, expert: int | None = None, moe_layer: int | None = None) -> Unit:
    return Unit(
        f"u{index}", (Part(f"u{index}", 0, numel, 0, (numel,)),), layer=moe_layer, expert=expert, moe_layer=moe_layer
    )


def _view(generation: int, nodes: str, draining: frozenset[int] = frozenset()) -> View:
    return View(generation, tuple(Member(f"w{i}", node, i, draining=i in draining) for i, node in enumerate(nodes)))


def _roles(ownership: Ownership, num_ranks: int) -> np.ndarray:
    return np.stack([ownership.role(rank) for rank in range(num_ranks)])


def _check(ownership: Ownership, view: View, redundancy: int, homes: np.ndarray | None, units: list[Unit]) -> None:
    active = set(view.active_ranks)
    assert ownership.primary.dtype == np.int32
    assert ownership.mirrors.shape == (len(units), redundancy)
    nodes = [member.node for member in view.members]
    several_nodes = len({nodes[rank] for rank in active}) > 1
    for index, unit in enumerate(units):
        primary, mirrors = int(ownership.primary[index]), ownership.mirrors[index].tolist()
        living = [rank for rank in mirrors if rank >= 0]
        assert primary in active
        assert set(living) <= active - {primary}
        assert len(set(living)) == len(living) == min(redundancy, len(active) - 1)
        if several_nodes and living:
            assert any(nodes[rank] != nodes[primary] for rank in living)
        if unit.expert is not None and homes is not None:
            assert primary == homes[unit.moe_layer, unit.expert]


@st.composite
def _cases(draw: st.DrawFn) -> tuple[list[Unit], View, np.ndarray, int, np.ndarray | None]:
    nodes = "".join(draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=7)))
    draining = frozenset(draw(st.lists(st.integers(0, len(nodes) - 1), max_size=2)))
    view = _view(1, nodes, draining if len(draining) < len(nodes) else frozenset())
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    sizes = rng.integers(1, draw(st.sampled_from([2, 100, 10_000])), draw(st.integers(0, 30))).tolist()
    units = [_unit(i, size) for i, size in enumerate(sizes)]
    homes = None
    if draw(st.booleans()):
        homes = rng.choice(view.active_ranks, (2, 4)).astype(np.int32)
        units += [_unit(len(sizes) + i, 50, i % 4, i // 4) for i in range(8)]
    held = rng.choice(
        [NONE, MIRROR, PRIMARY], (len(nodes), len(units)), p=draw(st.sampled_from([(1, 0, 0), (0.6, 0.2, 0.2)]))
    )
    return units, view, held.astype(np.uint8), draw(st.integers(0, 2)), homes


@settings(deadline=None)
@given(_cases())
def test_every_unit_has_a_living_owner_and_transfers_bring_it(
    case: tuple[list[Unit], View, np.ndarray, int, np.ndarray | None],
) -> None:
    units, view, held, redundancy, homes = case
    ownership = plan_ownership(units, view, held, redundancy, homes)
    _check(ownership, view, redundancy, homes, units)
    again = plan_ownership(units, view, held.copy(), redundancy, homes)
    assert np.array_equal(again.primary, ownership.primary)
    assert np.array_equal(again.mirrors, ownership.mirrors)
    assert np.array_equal(ownership.roles(view.world_size), _roles(ownership, view.world_size))

    plan = plan_transfers(held, ownership)
    state = held != NONE
    assert plan.missing == tuple(np.flatnonzero(~state.any(axis=0)))
    assert len({(move.unit, move.dst) for move in plan.transfers}) == len(plan.transfers)
    for move in plan.transfers:
        assert held[move.src, move.unit] != NONE
        assert held[move.dst, move.unit] == NONE
        state[move.dst, move.unit] = True
    state[:, list(plan.missing)] = True  # from a checkpoint
    wanted = _roles(ownership, view.world_size) != NONE
    assert (state | ~wanted).all()
    assert all(wanted[move.dst, move.unit] for move in plan.transfers), "nothing moves that nobody needs"


@settings(deadline=None)
@given(_cases())
def test_a_plan_in_place_moves_nothing(case: tuple[list[Unit], View, np.ndarray, int, np.ndarray | None]) -> None:
    units, view, held, redundancy, homes = case
    ownership = plan_ownership(units, view, held, redundancy, homes)
    roles = _roles(ownership, view.world_size)
    later = plan_ownership(units, view, roles, redundancy, homes)
    assert np.array_equal(later.primary, ownership.primary)
    assert np.array_equal(np.sort(later.mirrors, axis=1), np.sort(ownership.mirrors, axis=1))
    assert not plan_transfers(roles, later).transfers


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(0, 7), st.integers(1, 2))
def test_one_death_loses_nothing_and_stays_balanced(num_ranks: int, dead: int, redundancy: int) -> None:
    dead %= num_ranks
    units = [_unit(i, 100 + i % 7) for i in range(80)]
    view = _view(1, ("ab" * num_ranks)[:num_ranks])
    before = plan_ownership(units, view, np.zeros((num_ranks, 80), np.uint8), redundancy, None)
    held = np.delete(_roles(before, num_ranks), dead, axis=0)
    assert (held != NONE).any(axis=0).all()
    members = tuple(member for rank, member in enumerate(view.members) if rank != dead)
    after_view = View(2, members)
    after = plan_ownership(units, after_view, held, redundancy, None)
    assert not plan_transfers(held, after).missing
    bytes_R = np.bincount(after.primary, weights=[unit.numel for unit in units], minlength=num_ranks - 1)
    assert bytes_R.max() <= 1.1 * bytes_R.mean() + 107


def test_join_moves_little_and_balances() -> None:
    units = [_unit(i, 100) for i in range(120)]
    before = plan_ownership(units, _view(1, "aab"), np.zeros((3, 120), np.uint8), 1, None)
    held = np.vstack([_roles(before, 3), np.zeros((1, 120), np.uint8)])
    after = plan_ownership(units, _view(2, "aabb"), held, 1, None)
    assert np.bincount(after.primary).max() <= 34
    assert (after.primary != before.primary).sum() <= 30
    assert set(after.primary[after.primary != before.primary].tolist()) == {3}


def test_few_partners() -> None:
    """With R ranks on two nodes, exactly R / 2 pairs of deaths can lose state."""
    units = [_unit(i, 10) for i in range(200)]
    plan = plan_ownership(units, _view(1, "aaaabbbb"), np.zeros((8, 200), np.uint8), 1, None)
    pairs = {frozenset((int(p), int(m))) for p, m in zip(plan.primary, plan.mirrors[:, 0], strict=True)}
    assert len(pairs) == 4
    odd = plan_ownership(units, _view(1, "aaa"), np.zeros((3, 200), np.uint8), 1, None)
    assert len(np.unique(odd.mirrors)) == 3, "no rank mirrors for two while another mirrors for none"


def test_draining_rank_hands_over_and_owns_nothing() -> None:
    units = [_unit(i, 10) for i in range(20)]
    before = plan_ownership(units, _view(1, "abc"), np.zeros((3, 20), np.uint8), 0, None)
    held = _roles(before, 3)
    after = plan_ownership(units, _view(2, "abc", frozenset({1})), held, 0, None)
    assert after.owned(1).size == 0
    assert after.held(1).size == 0
    plan = plan_transfers(held, after)
    assert not plan.missing
    assert {move.src for move in plan.transfers} == {1}
    assert sorted(move.unit for move in plan.transfers) == before.owned(1).tolist()


def test_homes_are_the_strongest_active_holders() -> None:
    units = [_unit(0, 10), *(_unit(1 + e, 10, e, 0) for e in range(4))]
    roles_RU = np.full((3, 5), NONE, np.uint8)
    roles_RU[:, 0] = PRIMARY  # a dense unit has no home
    roles_RU[[0, 2], 1] = MIRROR, PRIMARY  # the primary before a lower rank
    roles_RU[[1, 2], 2] = MIRROR  # the lowest of equal ranks
    roles_RU[[0, 1], 3] = PRIMARY, MIRROR  # rank 0 drains, so its mirror is next
    roles_RU[0, 4] = PRIMARY  # only a draining rank holds it
    homes_LE = homes_from_roles(units, roles_RU, (1, 2), (1, 4))
    assert homes_LE.dtype == np.int32
    assert homes_LE.tolist() == [[2, 1, 1, -1]]


def test_copies_are_what_active_ranks_hold() -> None:
    units = [_unit(0, 10), *(_unit(1 + e, 10, e, 0) for e in range(3)), *(_unit(4 + e, 10, e, 1) for e in range(3))]
    roles_RU = np.full((3, 7), NONE, np.uint8)
    roles_RU[:, 0] = PRIMARY  # a dense unit is no expert
    roles_RU[0, 1:] = PRIMARY  # rank 0 drains
    roles_RU[1, [1, 3, 6]] = MIRROR, PRIMARY, PRIMARY
    roles_RU[2, [2, 4, 5]] = PRIMARY, MIRROR, MIRROR
    expert_LP, rank_P = copies_from_roles(units, roles_RU, (1, 2), (2, 3))
    assert rank_P.tolist() == [1, 1, 2, 2]
    assert expert_LP.tolist() == [[2, 0, 1, -1], [2, -1, 0, 1]]
    expert_LP, rank_P = copies_from_roles(units, np.zeros((3, 7), np.uint8), (1, 2), (2, 3))
    assert expert_LP.shape == (2, 0)
    assert rank_P.shape == (0,)


@settings(deadline=None)
@given(_cases())
def test_homes_of_planned_roles_are_the_planned_homes(
    case: tuple[list[Unit], View, np.ndarray, int, np.ndarray | None],
) -> None:
    units, view, held, redundancy, homes = case
    if homes is not None:
        roles_RU = _roles(plan_ownership(units, view, held, redundancy, homes), view.world_size)
        assert np.array_equal(homes_from_roles(units, roles_RU, view.active_ranks, homes.shape), homes)


def test_updates_that_take_products_are_shared_out_by_their_work() -> None:
    """By elements the large embedding would count like many matrices, and its rank would have none to iterate."""
    embedding = [_unit(0, 1 << 19)]
    matrices = [Unit(f"m{i}", (Part(f"m{i}", 0, s * 256, 0, (s, 256)),), "muon") for i, s in enumerate([64, 128] * 16)]
    units, view = [*embedding, *matrices], _view(1, "aabb")
    ownership = plan_ownership(units, view, np.zeros((4, len(units)), np.uint8), 1, None)
    iterated = [unit_work(unit) if unit.optimizer == "muon" else 0 for unit in units]
    work_R = np.bincount(ownership.primary, weights=iterated, minlength=4)
    assert work_R.max() <= 1.1 * work_R.mean()
    _check(ownership, view, 1, None, units)
    held_RU = _roles(ownership, 4)[:3]  # one died: who mirrors its matrices, or has room, takes them
    after = plan_ownership(units, _view(2, "aab"), held_RU, 1, None)
    work_R = np.bincount(after.primary, weights=iterated, minlength=3)
    assert work_R.max() <= 1.15 * work_R.mean()


def test_the_work_of_an_iterated_update() -> None:
    """Ten rounds of two products of m x m by m x n, and one of m x m by m x m, for each stacked matrix."""
    wide = Unit("w", (Part("w", 0, 6 * 8 * 16, 0, (6 * 8, 16), 6),), "muon")
    assert unit_work(wide) == 10 * 6 * (2 * 8 * 8 * 16 + 8**3)
    tall = Unit("t", (Part("t", 0, 16 * 8, 0, (16, 8)), Part("t2", 0, 8 * 16, 128, (8, 16))), "muon")
    assert unit_work(tall) == 2 * 10 * (2 * 8 * 8 * 16 + 8**3)
    assert Units([wide, _unit(1, 7)]).work_U.tolist() == [unit_work(wide), 7]
