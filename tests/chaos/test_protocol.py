"""The commit protocol under every reachable combination of points at which one or two of 2 to 5 ranks die."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest

from elastic_moe.control.protocol import Held, Phase, Recovery, failure_points, reachable, recover, status

STEP = 5
SIZES = (2, 3, 4, 5)


def cases(num_ranks: int) -> Iterator[tuple[tuple[Phase, ...], tuple[int, ...]]]:
    """(phase of every rank, ranks that survive), for all reachable phases and all choices of one or two deaths."""
    for phases in failure_points(num_ranks):
        for num_dead in (1, 2):
            for dead in combinations(range(num_ranks), num_dead):
                if len(dead) < num_ranks:
                    yield phases, tuple(r for r in range(num_ranks) if r not in dead)


def decide(phases: tuple[Phase, ...], alive: tuple[int, ...]) -> Recovery:
    return recover([status(STEP, phases[r]) for r in alive])


@pytest.mark.parametrize("num_ranks", SIZES)
def test_no_committed_step_is_lost(num_ranks: int) -> None:
    """A step that a survivor knows as committed stays. A step that no survivor knows as committed is made again."""
    seen = {STEP - 1: 0, STEP: 0}
    for phases, alive in cases(num_ranks):
        decision = decide(phases, alive)
        known = any(phases[r] >= Phase.VOTE_DONE for r in alive)
        assert decision.committed == (STEP if known else STEP - 1)
        assert decision.redo == decision.committed + 1
        seen[decision.committed] += 1
    assert all(seen.values())  # both outcomes were exercised


@pytest.mark.parametrize("num_ranks", SIZES)
def test_survivors_meet_at_one_step(num_ranks: int) -> None:
    """No survivor is stale, and every rank that rolls forward has the gradients for it."""
    rolled = 0
    for phases, alive in cases(num_ranks):
        decision = decide(phases, alive)
        assert decision.stale == ()
        for i, rank in enumerate(alive):
            at = status(STEP, phases[rank]).committed + (i in decision.forward)
            assert at == decision.committed
            if i in decision.forward:
                assert phases[rank] >= Phase.VOTE_ENTERED
        rolled += len(decision.forward)
    assert rolled


@pytest.mark.parametrize("num_ranks", SIZES)
def test_twins_stay_equal(num_ranks: int) -> None:
    """Rank u and its twin u+1 hold unit u. After recovery and the next step, all living copies are equal."""
    past = Held(()).apply(STEP - 1, frozenset(range(num_ranks)))
    everyone = frozenset(range(num_ranks))
    for phases, alive in cases(num_ranks):
        decision = decide(phases, alive)
        for unit in range(num_ranks):
            copies = []
            for i, rank in enumerate(alive):
                if rank not in (unit, (unit + 1) % num_ranks):
                    continue
                held = past.apply(STEP, everyone) if phases[rank] >= Phase.APPLIED else past
                if i in decision.forward:
                    held = held.apply(STEP, everyone)
                copies.append(held.apply(decision.redo, frozenset(alive)))
            assert len(set(copies)) <= 1


def test_second_death_during_recovery() -> None:
    """Another rank dies when only some survivors have rolled forward. The rest still meet at one step."""
    for phases, alive in cases(4):
        decision = decide(phases, alive)
        reports = [status(STEP, phases[r]) for r in alive]
        for num_rolled in range(len(decision.forward) + 1):
            for done in combinations(decision.forward, num_rolled):
                now = [status(STEP, Phase.APPLIED) if i in done else report for i, report in enumerate(reports)]
                for dead in range(len(now)):
                    rest = now[:dead] + now[dead + 1 :]
                    if rest:
                        again = recover(rest)
                        assert again.stale == ()
                        assert STEP - 1 <= again.committed <= decision.committed


def test_reachable_respects_collectives() -> None:
    assert reachable((Phase.VOTE_ENTERED, Phase.VOTE_DONE))
    assert reachable((Phase.VOTE_ENTERED, Phase.APPLIED))
    assert not reachable((Phase.MIRROR, Phase.VOTE_DONE))
    assert not reachable((Phase.COMPUTE, Phase.MIRROR))
    assert not reachable((Phase.VOTE_DONE, Phase.PUBLISHED))
    assert sum(1 for _ in failure_points(2)) > 10


def test_rank_of_an_older_step_is_stale() -> None:
    decision = recover([status(STEP, Phase.PUBLISHED), status(STEP - 2, Phase.PUBLISHED)])
    assert (decision.committed, decision.forward, decision.stale) == (STEP, (), (1,))
