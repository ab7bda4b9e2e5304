"""The cost model of placement: what it decides from votes alone, and what it says about it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from elastic_moe.config.schema import BalanceConfig
from elastic_moe.control import rebalance
from elastic_moe.control.rebalance import Rebalancer, moves_between
from elastic_moe.control.vote import Measures, VoteResult
from elastic_moe.plan.placement import Topology, plan_placement
from elastic_moe.plan.split import slowest_times
from elastic_moe.plan.state.ownership import NONE, plan_ownership
from elastic_moe.types import Member, ModelStats, Part, Unit, View

RANKS, EXPERTS, LAYERS = 4, 16, 2
VIEW = View(1, tuple(Member(f"w{r}", f"n{r // 2}", r) for r in range(RANKS)))
UNITS = [
    Unit(f"{layer}.{e}", (Part("p", 0, 1000, 0, (1000,)),), expert=e, moe_layer=layer)
    for layer in range(LAYERS)
    for e in range(EXPERTS)
]


def _hot(experts: list[int]) -> np.ndarray:
    """Load with most tokens on a few experts."""
    load_LE = np.full((LAYERS, EXPERTS), 10.0)
    load_LE[:, experts] = 400.0
    return load_LE


def _rebalancer(**config: float) -> Rebalancer:
    topology = Topology(tuple(m.node for m in VIEW.members), (1.0,) * RANKS)
    placement = plan_placement(np.ones((LAYERS, EXPERTS)), topology, [5] * RANKS)
    held = np.full((RANKS, len(UNITS)), NONE, dtype=np.uint8)
    ownership = plan_ownership(UNITS, VIEW, held, 1, placement.home)
    settings = BalanceConfig(**({"window": 0.1} | config))  # type: ignore[arg-type]
    return Rebalancer(settings, VIEW, UNITS, 1, placement, ownership)


def _vote(balancer: Rebalancer, step: int, load_LE: np.ndarray, **measured: float) -> VoteResult:
    """A vote in which a row takes a millisecond and a byte a nanosecond, unless told otherwise."""
    usual = {
        "expert_s": 1.0,
        "expert_rows": 1000.0,
        "cross_node_rows": 0.0,
        "publish_s": 1.0,
        "publish_bytes": 1e9,
        "switch_s": 0.0,
    }
    time_L = slowest_times(load_LE, balancer.placement, [1.0] * RANKS)
    sums = dict.fromkeys(("ce_sum", "tokens", "grad_square"), 1.0)
    sums |= dict.fromkeys(("nonfinite", "reconfigure", "stop", "save"), 0.0)
    return VoteResult(
        **sums,
        stats=ModelStats(),
        measures=Measures(**(usual | measured)),
        load_LE=load_LE,
        step=step,
        generation=1,
        world_size=RANKS,
        balance=1.0,
        spike=False,
        layer_time_L=time_L,
    )


def _on_one_rank(balancer: Rebalancer) -> list[int]:
    """Experts whose homes are all on rank 0."""
    return np.flatnonzero(balancer.placement.home[0] == 0)[:4].tolist()


def test_an_even_load_changes_nothing() -> None:
    balancer = _rebalancer()
    assert all(
        balancer.propose(_vote(balancer, step, np.full((LAYERS, EXPERTS), 50.0))) is None for step in range(1, 30)
    )


def test_replicas_follow_the_load_and_homes_stay() -> None:
    balancer = _rebalancer(home_moves=0)
    load_LE = _hot(_on_one_rank(balancer)[:2])
    vote = _vote(balancer, 1, load_LE)
    change = balancer.propose(vote)
    assert change is not None
    assert change.ownership is None
    assert change.transfers == ()
    assert np.array_equal(change.placement.home, balancer.placement.home)
    assert change.estimate["balance_after"] > change.estimate["balance_before"]
    before = vote.layer_time_L.sum()
    balancer.accept(change)
    later = _vote(balancer, 2, load_LE)
    assert later.layer_time_L.sum() < before
    assert balancer.propose(later) is None, "nothing is left to gain"
    [record] = balancer.finished
    assert record["step"] == 1
    assert record["measured"]["steps"] == 1
    assert abs(record["measured"]["gain_s"] - record["expected"]["gain_s"]) < 1e-6, (
        "the model's own world is predicted exactly"
    )


def test_a_change_must_pay_for_changing_over() -> None:
    balancer = _rebalancer(home_moves=0, payback_steps=10)
    load_LE = _hot(_on_one_rank(balancer)[:2])
    gain_s = float(_rebalancer_gain(load_LE))
    first = [balancer.propose(_vote(balancer, step, load_LE, switch_s=RANKS * 4.5 * gain_s)) for step in range(1, 8)]
    assert first[:4] == [None] * 4, (
        "a placement that lasted 4 steps is not replaced for a change that takes as long as 4.5"
    )
    assert first[4] is not None, "the load has stayed, so a change is expected to last"


def _rebalancer_gain(load_LE: np.ndarray) -> float:
    balancer = _rebalancer(home_moves=0)
    change = balancer.propose(_vote(balancer, 1, load_LE))
    assert change is not None
    return float(change.estimate["gain_s"])


def test_homes_move_only_where_their_bytes_are_cheap() -> None:
    def homes_moved(bytes_per_s: float) -> int:
        balancer = _rebalancer(home_every_steps=1, home_moves=4)
        load_LE = _hot(np.flatnonzero(balancer.placement.home[0] < 2).tolist())  # two spare slots elsewhere are too few
        change = balancer.propose(_vote(balancer, 1, load_LE, publish_bytes=bytes_per_s))
        if change is None:
            return 0
        if change.ownership is not None:
            assert change.estimate["moved_bytes"] > 0
            assert change.transfers
            assert np.array_equal(change.ownership.primary.reshape(LAYERS, EXPERTS), change.placement.home)
        return int((change.placement.home != balancer.placement.home).sum())

    assert homes_moved(1e9) > 0
    assert homes_moved(10.0) == 0


def test_every_rank_decides_alike() -> None:
    one, other = _rebalancer(home_every_steps=2), _rebalancer(home_every_steps=2)
    rng = np.random.default_rng(0)
    for step in range(1, 12):
        load_LE = np.rint(rng.pareto(1.0, (LAYERS, EXPERTS)) * 100)
        vote = _vote(one, step, load_LE)
        mine, theirs = one.propose(vote), other.propose(replace(vote, load_LE=load_LE.copy()))
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert np.array_equal(mine.placement.expert_of_slot, theirs.placement.expert_of_slot)
            one.accept(mine)
            other.accept(theirs)


def test_many_ranks_look_at_some_layers_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebalance, "LOOK_WORK", 1)  # one layer a step
    settings = {"home_every_steps": 2, "home_moves": 4}
    whole, spread = _rebalancer(**settings), _rebalancer(**settings)
    whole._layers_per_look = LAYERS  # pyright: ignore[reportPrivateUsage]
    load_LE = _hot(_on_one_rank(whole)[:2])
    for step in (1, 2):
        assert spread.propose(_vote(spread, step, load_LE)) is None, "the second layer has not had its turn"
    late, change = spread.propose(_vote(spread, 3, load_LE)), whole.propose(_vote(whole, 1, load_LE))
    assert late is not None
    assert change is not None
    assert np.array_equal(late.placement.expert_of_slot, change.placement.expert_of_slot)
    assert np.array_equal(late.placement.home, change.placement.home)
    assert late.estimate["gain_s"] == pytest.approx(change.estimate["gain_s"])


def test_moves_say_what_changed() -> None:
    balancer = _rebalancer(home_moves=0)
    old = balancer.placement
    everything = moves_between(None, old)
    assert sum(what == 2 for *_, what in everything) == LAYERS * EXPERTS
    assert sum(what == 1 for *_, what in everything) == LAYERS * 5 * RANKS
    change = balancer.propose(_vote(balancer, 1, _hot(_on_one_rank(balancer)[:2])))
    assert change is not None
    moves = moves_between(old, change.placement)
    assert moves
    assert sum(what for *_, what in moves) == 0, "slots are full before and after"
    assert moves_between(old, old) == []
