"""Measured speeds: shares follow them soon, noise moves nothing, and stragglers are named once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from elastic_moe.control.meter import BLOCK, Meter
from elastic_moe.control.speeds import SCALE, MemberSpeed, SpeedRule, agreed
from elastic_moe.plan.shares import Batching, Speeds
from elastic_moe.types import Member, View
from scripts.benchmarks.speed_world import SpeedWorld, ballots, view_of


def _world(speeds: list[float], together: bool = True, per_rank: int = 32, **how: float) -> SpeedWorld:
    return SpeedWorld(np.array(speeds), Batching(per_rank * len(speeds), 8, together=together), **how)


@pytest.mark.parametrize("ranks", [2, 5, 64, 1024])
@pytest.mark.parametrize("together", [True, False])
def test_noise_on_equal_machines_moves_nothing(ranks: int, together: bool) -> None:
    world = _world([1.0] * ranks, together, noise=0.1)
    world.run(200)
    assert not world.changes
    assert not world.rule.news


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("fixed", [0.0, 0.2])
def test_a_rank_at_half_speed_costs_no_more_than_its_share(together: bool, fixed: float) -> None:
    world = _world([1.0, 1.0, 1.0, 0.5], together, noise=0.02, fixed=fixed)
    assert world.even_efficiency() == pytest.approx(4 / 7), "all wait for the slow one"
    world.run(100)
    assert world.efficiency() > 0.95 - fixed / 4
    assert min(world.changes) <= 12, "it is measured in a few steps"
    assert len(world.changes) <= 4
    assert max(world.changes) < 80
    if together:
        assert world.rule.speeds.rows[3] == pytest.approx(0.5 * world.rule.speeds.rows[0], rel=0.05)
    else:
        assert world.rule.speeds.rows == world.rule.speeds.sequences


def test_two_kinds_of_machines_among_a_thousand_converge() -> None:
    speeds = [0.7 if rank % 3 == 0 else 1.0 for rank in range(1024)]
    world = _world(speeds, noise=0.1)
    world.run(200)
    assert world.efficiency() > 0.93 > world.even_efficiency() + 0.1
    assert len(world.changes) <= 10
    assert len([step for step in world.changes if step > 100]) <= 2, "it comes to rest"
    assert len(set(world.rule.speeds.rows)) <= 4, "ranks of one kind have one speed"


def test_a_rank_that_slows_down_and_recovers_is_followed() -> None:
    world = _world([1.0] * 8, noise=0.03)

    def throttle(step: int) -> None:
        world.speed_R[5] = 0.5 if 50 <= step < 150 else 1.0

    world.run(149, throttle)
    assert 50 <= min(world.changes) <= 62
    assert world.rule.shares[5] < 20
    world.run(100, throttle)
    assert world.efficiency() > 0.97
    assert [(news.rank, news.begins, news.phase) for news in world.rule.news] == [
        (5, True, "compute"),
        (5, False, "compute"),
    ]


def test_a_single_slow_step_is_not_followed() -> None:
    world = _world([1.0] * 4, noise=0.02)

    def hiccup(step: int) -> None:
        world.speed_R[1] = 0.05 if step % 40 == 30 else 1.0

    world.run(200, hiccup)
    assert not world.changes
    assert not world.rule.news


def test_what_gains_too_little_is_left() -> None:
    """One sequence less is no gain for a rank of two that is a fifth slower than the others."""
    world = _world([1.0, 1.0, 1.0, 0.8], together=False, per_rank=2, noise=0.01)
    world.run(100)
    assert not world.changes


def test_switched_off_it_names_stragglers_and_changes_nothing() -> None:
    world = _world([1.0, 1.0, 0.5], noise=0.02)
    world.rule = SpeedRule(world.view, world.batching, Speeds.equal(world.view), adapts=False)
    world.run(60)
    assert not world.changes
    assert [(news.rank, news.begins, news.phase) for news in world.rule.news] == [(2, True, "compute")]
    assert world.rule.news[0].factor == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("phase", ["data", "exchange", "checkpoint"])
def test_the_phase_in_which_a_straggler_loses_is_named(phase: str) -> None:
    view = view_of(4)
    rule = SpeedRule(view, Batching(64, 8), Speeds.equal(view))
    news = []
    for step in range(1, 121):
        slow = step < 60
        spent = {f"{name}_s_R": np.full(4, 0.01) for name in ("dense", "expert", "data", "exchange")}
        spent["checkpoint_s_R"] = np.full(4, 0.001 * (step % 10 == 0))
        if slow and (phase != "checkpoint" or step % 10 == 0):
            spent[f"{phase}_s_R"][2] += 0.05 if phase != "checkpoint" else 0.5
        assert rule.observe(ballots(spent, np.full(4, 100.0))) is None
        news += [(step, one.rank, one.begins, one.phase) for one in rule.news]
        rule.news.clear()
    assert [one[1:] for one in news] == [(2, True, phase), (2, False, phase)]
    assert news[0][0] < 40
    assert 60 <= news[1][0] < 100


def test_a_view_begins_with_the_speeds_of_its_members() -> None:
    nodes = ["a", "a", "b", "b", "c", "d"]
    view = View(2, tuple(Member(f"w{i}", n, i, draining=n == "d") for i, n in enumerate(nodes)))
    half = MemberSpeed(SCALE // 2, SCALE // 4, 1)
    whole = MemberSpeed(SCALE, SCALE)
    speeds = agreed(view, [half, MemberSpeed(), whole, whole, MemberSpeed(), whole])
    assert speeds.sequences[0] == speeds.sequences[1] == speeds.sequences[2] / 2, "a newcomer is taken for its node's"
    assert speeds.sequences[4] == pytest.approx((0.5 + 1 + 1) / 3 / 1 * speeds.sequences[2])
    assert speeds.sequences[5] == speeds.rows[5] == 0.0
    assert speeds.rows[0] == speeds.rows[3] / 4
    assert sum(speeds.sequences) == pytest.approx(5)
    assert agreed(view, [MemberSpeed()] * 6) == Speeds.equal(view)


def test_what_a_worker_knows_of_itself_survives_a_view() -> None:
    world = _world([1.0, 1.0, 0.5, 1.0], noise=0.02)
    world.run(60)
    known = [world.rule.member(rank) for rank in range(4)]
    assert [one.straggles for one in known] == [0, 0, 1, 0]
    view = View(2, (*world.view.members[:3], Member("new", "elsewhere", 9)))
    speeds = agreed(view, [*known[:3], MemberSpeed()])
    rule = SpeedRule(view, world.batching, speeds, straggles=[one.straggles for one in known])
    assert rule.shares[2] < 0.6 * rule.shares[0]
    assert rule.member(2).straggles == 1
    again = SpeedWorld(np.array([1.0, 1.0, 0.5, 1.0]), world.batching, noise=0.02)
    again.view, again.rule = view, rule
    again.run(40)
    assert not [news for news in again.rule.news if news.rank == 2], "it was named before"
    assert again.rule.shares[3] > 1.8 * again.rule.shares[2], "the newcomer is measured"


def test_all_ranks_decide_alike_from_the_same_votes() -> None:
    """Whoever holds the rule: nothing in it depends on the rank, on a clock or on chance."""
    worlds = [_world([1.0, 0.6, 1.0, 1.0, 0.9], noise=0.05, seed=4) for _ in range(2)]
    for world in worlds:
        world.run(150)
    assert worlds[0].changes == worlds[1].changes
    assert worlds[0].changes


def test_an_estimate_leaves_out_ranks_without_work() -> None:
    meter = Meter(np.ones(3))
    for _ in range(3 * BLOCK):
        meter.add(np.array([1.0, np.nan, 2.0]))
    found = meter.differing()
    assert found is not None
    assert found.tolist() == [1.0, 1.0, 2.0]


@pytest.mark.parametrize(("change", "blocks"), [(3.0, 1), (1.5, 3), (1.1, 12)])
def test_larger_differences_are_seen_sooner(change: float, blocks: int) -> None:
    meter = Meter(np.ones(6))
    noise: Callable[[], np.ndarray] = lambda: 1 + 0.01 * random.standard_normal(6)  # noqa: E731
    random = np.random.default_rng(1)
    for _ in range(16 * BLOCK):
        assert not meter.add(noise()) or meter.differing() is None
    seen = 0
    for step in range(40 * BLOCK):
        factor = np.array([1, 1, 1, 1, change, 1])
        if meter.add(noise() * factor) and meter.differing() is not None:
            seen = step // BLOCK + 1
            break
    assert 0 < seen <= blocks


def test_a_group_of_one_has_nothing_to_share() -> None:
    view = view_of(1)
    rule = SpeedRule(view, Batching(8, 8), Speeds.equal(view))
    zeros = {f"{name}_s_R": np.ones(1) for name in ("dense", "expert", "data", "exchange", "checkpoint")}
    assert all(rule.observe(ballots(zeros, np.ones(1))) is None for _ in range(50))
