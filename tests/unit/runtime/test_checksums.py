"""Checksums of a unit's state: any bit shows, and so do values that change places; seals find what changed at rest."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from elastic_moe.optim.unit_state import UnitState
from elastic_moe.plan.state.ownership import MIRROR, NONE, PRIMARY
from elastic_moe.runtime import checksums
from elastic_moe.runtime.checksums import PERIOD
from elastic_moe.runtime.state import HeldState
from elastic_moe.types import Part, Unit

SIZES = [1, 2, 3, 31, 2 * PERIOD - 1, 2 * PERIOD, 2 * PERIOD + 5, 7 * PERIOD + 3]


def _state(numel: int, offset: int = 0) -> UnitState:
    made = torch.Generator().manual_seed(numel)
    return UnitState({name: torch.randn(numel + offset, generator=made)[offset:] for name in ("weight", "m", "v")})


def _checksum(state: UnitState) -> int:
    return int(checksums.checksums([state])[0])


@pytest.mark.parametrize("numel", SIZES)
def test_every_bit_shows(numel: int) -> None:
    state = _state(numel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = _checksum(state)
    for name in state.fields:
        bits = state[name].view(torch.int32)
        for place in {0, numel // 2, numel - 1}:
            for bit in (0, 22, 30, 31):
                flipped = -(1 << 31) if bit == 31 else 1 << bit
                bits[place] ^= flipped
                assert _checksum(state) != before
                bits[place] ^= flipped
    assert _checksum(state) == before


@pytest.mark.parametrize("numel", SIZES)
def test_copies_that_lie_differently_in_memory_have_the_same_checksum(numel: int) -> None:
    state, copy = _state(numel), _state(numel, offset=1)
    copy.copy_(state)
    assert _checksum(copy) == _checksum(state)


@pytest.mark.parametrize("numel", SIZES)
def test_a_gpu_would_find_the_same(numel: int) -> None:
    """The form for GPUs, here on CPU tensors."""
    values = _state(numel).weight
    weights = torch.from_numpy(checksums._WEIGHTS.view(np.int64))
    found = int(checksums._sum_on_device(values, weights)) & checksums._MASK
    assert found == checksums._sum(values.numpy()) & checksums._MASK


def test_values_and_fields_that_change_places_show() -> None:
    state = _state(100)
    before = _checksum(state)
    state.weight[:4] = state.weight[[2, 3, 0, 1]].clone()
    assert _checksum(state) != before
    state.weight[:4] = state.weight[[2, 3, 0, 1]].clone()
    assert _checksum(UnitState({"weight": state["m"], "m": state.weight, "v": state["v"]})) != before


def _unit(name: str, numel: int) -> Unit:
    return Unit(name, (Part(name, 0, numel, 0, (numel,)),))


def _held() -> HeldState:
    units = [_unit("a", 10), _unit("b", 2000), _unit("c", 7)]
    roles_U = np.array([PRIMARY, MIRROR, NONE], dtype=np.uint8)
    return HeldState.build(units, roles_U, {0: _state(10), 1: _state(2000)}, torch.device("cpu"))


def test_what_changes_after_the_seal_is_damaged_and_counts_as_not_held_until_repaired() -> None:
    held = _held()
    held.verify()
    assert not held.damaged, "nothing was sealed"
    held.seal()
    held.verify()
    assert not held.damaged
    held.states[1]["v"][1234] += 1
    held.verify()
    assert held.damaged == {1}
    assert held.roles.tolist() == [PRIMARY, NONE, NONE]
    held.repair(1, _state(2000), MIRROR)
    held.verify()
    assert not held.damaged
    assert held.roles.tolist() == [PRIMARY, MIRROR, NONE]


def test_a_unit_that_is_not_held_is_not_dropped() -> None:
    held = _held()
    held.drop([0, 2])
    assert held.damaged == {0}
