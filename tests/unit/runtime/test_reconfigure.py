"""`agree` carries out the decision of `recover` on every case of deaths that the protocol allows."""

from __future__ import annotations

from dataclasses import astuple
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from elastic_moe.control.protocol import recover, status
from elastic_moe.control.spikes import DataPosition
from elastic_moe.control.vote import Measures, VoteResult, pack
from elastic_moe.plan.state.ownership import MIRROR, NONE, PRIMARY
from elastic_moe.runtime.local_state import LocalState
from elastic_moe.runtime.reconfigure import agree
from elastic_moe.types import ModelStats
from tests.chaos.test_protocol import SIZES, STEP, cases

SHAPE = (2, 3)


def _vote(step: int) -> VoteResult:
    return VoteResult(
        ce_sum=2.0 * step,
        tokens=4.0,
        grad_square=1.0,
        nonfinite=0.0,
        reconfigure=0.0,
        stop=0.0,
        save=0.0,
        stats=ModelStats(),
        measures=Measures(0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        load_LE=np.full(SHAPE, float(step)),
        step=step,
        generation=1,
        world_size=5,
        balance=1.0,
        spike=False,
        layer_time_L=np.ones(SHAPE[0]),
    )


def _local(committed: int, reduced: int, voted: int, roles: list[int]) -> LocalState:
    """A worker that holds one state with these roles; `voted` is the step of the vote that it knows."""
    vote = _vote(voted) if voted > 0 else None
    local = LocalState(committed, reduced, vote, evaluated=committed)
    if any(roles):
        local.holdings.append(cast(Any, SimpleNamespace(roles=np.array(roles, dtype=np.uint8))))
    return local


class FakeGroup:
    """The collectives of one rank among peers whose contributions are known beforehand."""

    def __init__(self, rank: int, gathered: list[torch.Tensor], votes: list[VoteResult | None]) -> None:
        self.rank, self._gathered, self._votes = rank, list(gathered), votes
        self.broadcasts: list[int] = []

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        stacked = self._gathered.pop(0)
        assert torch.equal(stacked[self.rank], tensor), "this rank contributes something else"
        return stacked

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self.broadcasts.append(src)
        vote = self._votes[src]
        value = torch.zeros_like(tensor) if vote is None else torch.from_numpy(pack(vote))
        if src == self.rank:
            assert torch.equal(value, tensor)
        tensor.copy_(value)


def _agree(locals_R: list[LocalState], roles_RU: np.ndarray) -> list[tuple[np.ndarray, Any, list[int], list[int]]]:
    """(roles, decision, steps rolled forward, leaders of broadcasts) of every rank."""
    reports = []
    for local in locals_R:
        mine = local.status
        position = local.position
        reports.append([*astuple(mine), local.evaluated, position.skipped, position.go_on_at])
    gathered = [torch.tensor(reports, dtype=torch.int64), torch.from_numpy(roles_RU)]
    votes = [local.vote for local in locals_R]
    results = []
    for rank, local in enumerate(locals_R):
        group, rolled = FakeGroup(rank, gathered, votes), list[int]()

        def roll_forward(vote: VoteResult, local: LocalState = local, rolled: list[int] = rolled) -> None:
            rolled.append(vote.step)
            local.committed, local.vote = vote.step, vote

        roles, decision = agree(cast(Any, group), local, roll_forward, SHAPE, roles_RU.shape[1])
        results.append((roles, decision, rolled, group.broadcasts))
    return results


@pytest.mark.timeout(900)  # half a minute where nothing else runs
@pytest.mark.parametrize("num_ranks", [*SIZES[:-1], pytest.param(SIZES[-1], marks=pytest.mark.long)])
def test_agree_does_as_recover_says(num_ranks: int) -> None:
    seen = {True: 0, False: 0}
    for phases, alive in cases(num_ranks):
        statuses = [status(STEP, phases[r]) for r in alive]
        expected = recover(statuses)
        roles_RU = np.full((len(alive), 2), NONE, dtype=np.uint8)
        roles_RU[:, 0] = MIRROR
        roles_RU[0, :] = PRIMARY
        locals_R = [_local(s.committed, s.reduced, s.voted, roles_RU[i].tolist()) for i, s in enumerate(statuses)]
        for i, (roles, decision, rolled, leaders) in enumerate(_agree(locals_R, roles_RU)):
            assert decision == expected
            assert np.array_equal(roles, roles_RU), "no survivor of one view is stale"
            assert rolled == ([expected.committed] if i in expected.forward else [])
            assert locals_R[i].committed == expected.committed
            assert locals_R[i].holdings
            vote = locals_R[i].vote
            assert vote is not None
            assert vote.step == expected.committed
            assert all(statuses[leader].voted == expected.committed for leader in leaders)
            assert len(leaders) == 1
            seen[bool(rolled)] += 1
    assert all(seen.values())


def test_a_rank_of_an_older_step_counts_as_holding_nothing() -> None:
    roles_RU = np.array([[PRIMARY], [MIRROR]], dtype=np.uint8)
    locals_R = [_local(STEP, -1, STEP, [PRIMARY]), _local(STEP - 2, -1, STEP - 2, [MIRROR])]
    for roles, decision, rolled, _ in _agree(locals_R, roles_RU):
        assert decision.stale == (1,)
        assert not rolled
        assert roles.tolist() == [[PRIMARY], [NONE]]
    assert locals_R[0].holdings
    assert not locals_R[1].holdings


def test_a_rank_that_is_not_behind_says_whether_the_run_is_to_go_back() -> None:
    knows, behind = DataPosition(7).after_spike(STEP), DataPosition(7).after_spike(STEP - 2)
    roles_RU = np.array([[PRIMARY], [MIRROR], [NONE]], dtype=np.uint8)
    for first, expected in ((knows, knows), (DataPosition(7), DataPosition(7))):
        locals_R = [_local(STEP, -1, STEP, [PRIMARY]), _local(STEP - 2, -1, STEP - 2, [MIRROR]), LocalState()]
        locals_R[0].position, locals_R[1].position = first, behind
        _agree(locals_R, roles_RU)
        assert [local.position for local in locals_R] == [expected] * 3


def test_nobody_has_state_at_the_start() -> None:
    roles_RU = np.zeros((2, 3), dtype=np.uint8)
    for roles, decision, rolled, leaders in _agree([LocalState(), LocalState()], roles_RU):
        assert (decision.committed, decision.forward, rolled, leaders) == (-1, (), [], [])
        assert not roles.any()


def test_state_from_a_checkpoint_has_no_vote() -> None:
    """The leader has none to broadcast, and a rank that joins holds nothing."""
    roles_RU = np.array([[PRIMARY], [NONE]], dtype=np.uint8)
    locals_R = [_local(STEP, -1, -1, [PRIMARY]), LocalState()]
    for roles, decision, rolled, leaders in _agree(locals_R, roles_RU):
        assert decision.committed == STEP
        assert not rolled
        assert leaders == [0]
        assert roles.tolist() == [[PRIMARY], [NONE]]
    assert locals_R[0].vote is None
    assert locals_R[1].vote is None


def test_a_rank_without_state_never_rolls_forward() -> None:
    """It was one step behind, holds nothing since, and has received the vote; then the generation ended again."""
    roles_RU = np.array([[PRIMARY], [MIRROR]], dtype=np.uint8)
    locals_R = [_local(STEP, -1, STEP, [PRIMARY]), _local(STEP - 1, -1, STEP - 1, [MIRROR])]
    for attempt in range(2):
        for roles, decision, rolled, _ in _agree(locals_R, roles_RU):
            assert (decision.committed, decision.forward, decision.stale) == (STEP, (), (1,)), attempt
            assert roles.tolist() == [[PRIMARY], [NONE]]
            assert not rolled
        assert locals_R[0].holdings
        assert not locals_R[1].holdings
        assert locals_R[1].vote is not None, "it has the loads of the experts, for the same plan as the others"
        roles_RU[1] = NONE
