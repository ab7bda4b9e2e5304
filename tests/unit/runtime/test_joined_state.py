"""State from view to view: what stays is not copied, gaps are closed, and the updates have the same bits."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from elastic_moe.config.schema import ModelConfig, OptimConfig
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.plan.state import buckets
from elastic_moe.plan.state.ownership import MIRROR, NONE, PRIMARY
from elastic_moe.runtime.state import HeldState, verify
from elastic_moe.types import Part, Unit
from tests.unit.optim.test_rules import gradients, initial, vote_of

CPU = torch.device("cpu")
SIZE, COUNT = 64, 12  # elements of a unit, units
UNITS = [Unit(f"u{i}", (Part(f"u{i}", 0, SIZE, 0, (SIZE,)),)) for i in range(COUNT)]
VECTOR = 4 * SIZE * 16  # bytes: four units of AdamW


@pytest.fixture(autouse=True)
def short_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "VECTOR_BYTES", VECTOR)


def roles_of(held: Sequence[int], role: int = MIRROR) -> np.ndarray:
    roles = np.full(COUNT, NONE, np.uint8)
    roles[list(held)] = role
    return roles


def held_of(units: Sequence[int], role: int = MIRROR) -> HeldState:
    return HeldState.build(UNITS, roles_of(units, role), initial(UNITS), CPU)


def changed(old: HeldState, stays: Sequence[int], comes: Sequence[int]) -> HeldState:
    """The next view's state, of which some units arrive."""
    arrived = HeldState.build(UNITS, roles_of(comes), initial(UNITS), CPU)
    return HeldState.joined(UNITS, roles_of([*stays, *comes]), [old, arrived])


def update(held: HeldState) -> None:
    gradients(held)
    held.apply(vote_of(1), 1e-2, OptimConfig(), ModelConfig())


def storages(held: HeldState) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for state in held.states.values() for tensor in state.fields.values()}


def test_vectors_are_short_and_whole_units_lie_in_them() -> None:
    held = held_of(range(COUNT))
    assert len(storages(held)) == 3 * COUNT // 4, "four units to a vector, three fields"
    alone = held_of(range(COUNT), PRIMARY)
    assert len(storages(alone)) == 3 * COUNT // 4, "units of different tensors"


def test_a_rank_that_is_alone_has_tensors_and_layers_in_one_vector_each() -> None:
    """It computes with its state: `exchange/one_memory.py`."""
    cut = [Unit(f"big#{i}", (Part("big", i * SIZE, SIZE, 0, (6 * SIZE,)),)) for i in range(6)]
    experts = [
        Unit(f"layers.{layer}.experts.{e}", (Part("x", 0, SIZE, 0, (SIZE,)),), layer=layer, expert=e, moe_layer=layer)
        for layer in range(2)
        for e in range(6)
    ]
    units = [*cut, *experts]
    for role, wanted in ((PRIMARY, [6, 6, 6]), (MIRROR, [4, 4, 4, 4, 2])):
        held = HeldState.build(units, np.full(len(units), role, np.uint8), initial(units), CPU)
        lies: dict[int, int] = {}
        for state in held.states.values():
            pointer = state.weight.untyped_storage().data_ptr()
            lies[pointer] = lies.get(pointer, 0) + 1
        assert sorted(lies.values()) == sorted(wanted)


def test_what_stays_is_in_the_same_memory_and_the_old_state_is_whole() -> None:
    old = held_of(range(8))
    before = {u: state.pack() for u, state in old.states.items()}
    new = changed(old, range(2, 8), [9])
    assert new.states.keys() == {*range(2, 8), 9}
    assert all(new.states[u].weight.data_ptr() == old.states[u].weight.data_ptr() for u in range(2, 8))
    assert all(torch.equal(state.pack(), before[u]) for u, state in old.states.items())
    with pytest.raises(AssertionError, match="both be updated"):
        new.apply(vote_of(1), 1e-2, OptimConfig(), ModelConfig())


def test_gaps_are_closed_and_vectors_without_gaps_stay() -> None:
    old = held_of(range(12))
    vector = weakref.ref(old._groups[0].state.weight)  # of the first four units
    whole = {u: old.states[u].weight.data_ptr() for u in range(4, 8)}
    before = {u: state.pack() for u, state in old.states.items()}
    stays = [1, 2, *range(4, 8), 8, 10]
    new = changed(old, stays, [])
    assert vector() is not None
    old.release()
    new.settle()
    assert vector() is None, "the vector with a gap"
    assert {u: new.states[u].weight.data_ptr() for u in range(4, 8)} == whole
    assert len(storages(new)) == 6, "two vectors of three fields"
    assert new.states.keys() == set(stays)
    assert all(torch.equal(state.pack(), before[u]) for u, state in new.states.items())


def test_the_updates_have_the_bits_of_a_state_that_was_laid_out_anew() -> None:
    old = held_of(range(9))
    new = changed(old, [0, 3, 4, 5, 6, 7], [10, 11])
    old.release()
    new.settle()
    other = held_of([0, 3, 4, 5, 6, 7, 10, 11])
    for held in (new, other):
        update(held)
    assert all(torch.equal(state.pack(), other.states[u].pack()) for u, state in new.states.items())
    assert not torch.equal(new.states[0].weight, initial(UNITS)[0].weight)


def test_many_changes_leave_few_vectors() -> None:
    held, here = held_of(range(6)), set(range(6))
    generator = np.random.default_rng(0)
    for _ in range(50):
        after = set(generator.choice(COUNT, 8, replace=False).tolist())
        old, held = held, changed(held, sorted(after & here), sorted(after - here))
        old.release()
        held.settle()
        here = after
        assert held.states.keys() == here
        assert len(storages(held)) <= 3 * 5
    assert all(torch.equal(held.states[u].weight, initial(UNITS)[u].weight) for u in here)


def test_a_try_that_failed_leaves_nothing_twice() -> None:
    """The next try goes on from the old state and the one of the try before."""
    old = held_of(range(8))
    first = changed(old, range(4), [8, 9])
    second = HeldState.joined(UNITS, roles_of([0, 1, 8]), [old, first, held_of([])])
    assert second.states[8].weight.data_ptr() == first.states[8].weight.data_ptr()
    old.release()
    first.release()
    second.settle()
    update(second)
    other = held_of([0, 1, 8])
    update(other)
    assert all(torch.equal(state.pack(), other.states[u].pack()) for u, state in second.states.items())


def test_memory_that_two_states_have_is_damaged_in_both() -> None:
    """Only one of them has a seal, as when a transfer was broken off before all had confirmed."""
    old = held_of(range(4))
    old.seal()
    new = changed(old, range(3), [9])
    old.states[2].weight[0] += 1
    verify([old, new])
    assert old.damaged == new.damaged == {2}
    assert new.roles[2] == NONE
    joined = HeldState.joined(UNITS, roles_of([0, 2]), [old, new, held_of([2])])
    assert torch.equal(joined.states[2].weight, initial(UNITS)[2].weight), "the one that has arrived"


def test_a_state_is_asked_for_once_where_it_is_made() -> None:
    asked: list[int] = []

    def source(unit: int) -> UnitState:
        asked.append(unit)
        return UnitState.initial(UNITS[unit], torch.full((SIZE,), float(unit)))

    held: Any = HeldState.build(UNITS, roles_of([5, 1, 3]), source, CPU)
    assert asked == [1, 3, 5]
    assert held.states[3].weight.unique().tolist() == [3.0]
