"""Transfers whose bytes prove nothing: they are state only once all ranks have said that theirs ended well.

The group is a stand-in for one over NCCL, where a rank that is aborted lets its peers complete with wrong bytes.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from elastic_moe.config.schema import ElasticConfig, TrainConfig
from elastic_moe.errors import GroupAborted
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.plan.state.ownership import MIRROR, NONE, PRIMARY, Ownership
from elastic_moe.plan.state.transfers import Transfer
from elastic_moe.runtime.local_state import LocalState
from elastic_moe.runtime.reconfigure import Reconfigurer
from elastic_moe.runtime.state import HeldState, merge_roles
from elastic_moe.types import Part, Unit

HOST = torch.device("cpu")
STEP, SIZE = 7, 4
UNITS = [Unit(name, (Part(name, 0, SIZE, 0, (SIZE,)),)) for name in ("a", "b")]
GARBAGE = -77.0
TRANSFERS = [Transfer(unit=0, src=0, dst=1)]  # rank 1, which is looked at, becomes the mirror of unit a
AFTER = Ownership(np.array([0, 1], np.int32), np.array([[1], [-1]], np.int32))


def _value(unit: int) -> float:
    return 10.0 + unit


class PoisonedGroup:
    """Rank 1 of two. Rank 0 aborts during the all-to-all, which completes here with `arrives` all the same.

    Args:
        arrives: what the all-to-all brings.
        aborted: rank 0 was aborted, so nobody completes a barrier after it.
        passes: barriers that complete before this rank hears of an abort of its own.
    """

    rank, world_size, device, generation = 1, 2, HOST, 3

    def __init__(self, arrives: float, aborted: bool, passes: int = 2) -> None:
        self._arrives, self._passes = arrives, 0 if aborted else passes
        self.log: list[str] = []

    def all_gather(self, tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        return torch.tensor([[0, 3 * SIZE], [0, 0]])  # elements that each rank sends to each

    def all_to_all(self, out: torch.Tensor, inp: torch.Tensor, out_splits: list[int], in_splits: list[int]) -> None:
        self.log.append("transfer")
        out.fill_(self._arrives)

    def attest(self) -> None:
        self._end("attest")

    def barrier(self) -> None:
        self._end("confirm")

    def _end(self, name: str) -> None:
        self.log.append(name)
        if self._passes == 0:
            raise GroupAborted("rank 0 was lost")
        self._passes -= 1


def _local() -> LocalState:
    """Rank 1 owns unit b."""
    roles_U = np.array([NONE, PRIMARY], np.uint8)
    states = {1: UnitState.initial(UNITS[1], torch.full((SIZE,), _value(1)))}
    return LocalState(committed=STEP, holdings=[HeldState.build(UNITS, roles_U, states, HOST)])


def _take_over(local: LocalState, group: PoisonedGroup, transfers: list[Transfer] = TRANSFERS) -> HeldState:
    anything: Any = None
    config = TrainConfig(elastic=ElasticConfig(check_every_steps=0))
    reconfigurer = Reconfigurer(config, UNITS, (0, 0), local, anything, anything, anything, lambda *_: None)
    return reconfigurer.take_over(cast(Any, group), AFTER, transfers, STEP)[0]


def test_garbage_from_a_rank_that_was_aborted_is_never_held() -> None:
    local = _local()
    old = local.holdings[0]
    group = PoisonedGroup(GARBAGE, aborted=True)
    with pytest.raises(GroupAborted, match="rank 0 was lost"):
        _take_over(local, group)
    assert local.holdings == [old]
    assert merge_roles(local.holdings).tolist() == [NONE, PRIMARY], "it would pass for a holder of unit a"
    assert torch.equal(old.states[1].weight, torch.full((SIZE,), _value(1)))
    assert group.log == ["transfer", "attest"]


def test_what_was_attested_is_held_beside_the_old_state_until_all_have_confirmed() -> None:
    local, group = _local(), PoisonedGroup(_value(0), aborted=False, passes=1)
    with pytest.raises(GroupAborted):
        _take_over(local, group)
    assert group.log == ["transfer", "attest", "confirm"]
    assert len(local.holdings) == 2
    assert merge_roles(local.holdings).tolist() == [MIRROR, PRIMARY]
    assert torch.equal(local.holdings[1].states[0].weight, torch.full((SIZE,), _value(0)))


def test_an_undisturbed_transfer_replaces_the_old_state() -> None:
    local, group = _local(), PoisonedGroup(_value(0), aborted=False)
    new = _take_over(local, group)
    assert local.holdings == [new]
    assert new.roles.tolist() == [MIRROR, PRIMARY]


def test_nothing_is_attested_where_nothing_moves() -> None:
    local, group = _local(), PoisonedGroup(GARBAGE, aborted=False)
    local.holdings[0].states[0] = UnitState.initial(UNITS[0], torch.zeros(SIZE))
    _take_over(local, group, [])
    assert group.log == ["confirm"]
