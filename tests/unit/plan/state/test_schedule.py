"""Schedules: sender and receiver agree, gradients reach their primaries and mirrors, and weights come back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.plan.placement import Placement, Topology, plan_placement
from elastic_moe.plan.state.ownership import NONE, plan_ownership
from elastic_moe.plan.state.schedule import Layout, Schedule, slots_by_expert
from elastic_moe.types import RULE_FACTS, Member, Part, Unit, View

LAYERS, EXPERTS = 2, 4
SCHEDULES = ("gradients", "mirrors", "dense_weights", "expert_weights", "frozen_weights")


def _unit(name: str, numel: int, rule: str, expert: int | None = None, moe_layer: int | None = None) -> Unit:
    part = Part(name, 0, numel, 0, (numel,))
    return Unit(name, (part,), optimizer=rule, layer=moe_layer, expert=expert, moe_layer=moe_layer)


@st.composite
def _layouts(draw: st.DrawFn) -> list[Layout]:
    """The layout of every rank of a view: dense units and experts of all rules, any placement, ranks that drain."""
    nodes = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=6))
    num_ranks = len(nodes)
    draining = draw(st.sets(st.integers(0, num_ranks - 1), max_size=num_ranks - 1))
    view = View(1, tuple(Member(f"w{r}", n, r, draining=r in draining) for r, n in enumerate(nodes)))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))

    expert_rules = [draw(st.sampled_from(["adamw", "frozen"])) for _ in range(LAYERS)]
    units = [_unit(f"dense{i}", int(rng.integers(1, 9)), rule) for i, rule in enumerate(RULE_FACTS)]
    units += [_unit(f"bias{layer}", EXPERTS, "bias", moe_layer=layer) for layer in range(LAYERS)]
    units += [
        _unit(f"{layer}.{expert}", 5, expert_rules[layer], expert, layer)
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    ]
    order = rng.permutation(len(units))
    units = [units[i] for i in order]

    topology = Topology(tuple(nodes), tuple(0.0 if m.draining else 1.0 for m in view.members))
    slots = [0 if m.draining else draw(st.integers(EXPERTS // len(view.active_ranks) + 1, 5)) for m in view.members]
    placement = plan_placement(rng.pareto(1.0, (LAYERS, EXPERTS)) + 0.1, topology, slots)
    held = np.full((num_ranks, len(units)), NONE, dtype=np.uint8)
    ownership = plan_ownership(units, view, held, draw(st.integers(0, 2)), placement.home)
    return [Layout(units, view, rank, ownership, placement) for rank in range(num_ranks)]


def _deliveries(layouts: list[Layout], name: str) -> set[tuple[int, int, int]]:
    """(unit, sender, receiver) of an exchange, from the senders' schedules."""
    return {
        (unit, layout.rank, receiver)
        for layout in layouts
        for receiver, units in enumerate(getattr(layout, name).send)
        for unit in units
    }


def _computing_ranks(layouts: list[Layout], unit: Unit) -> list[int]:
    """Ranks with a copy, found slot by slot; all ranks for a dense unit."""
    if unit.expert is None:
        return list(range(len(layouts)))
    placement = layouts[0].placement
    experts = placement.expert_of_slot[unit.moe_layer].tolist()
    copies = zip(experts, placement.rank_of_slot.tolist(), strict=True)
    return sorted({rank for expert, rank in copies if expert == unit.expert})


@settings(deadline=None)
@given(_layouts())
def test_sender_and_receiver_list_the_same_units_in_the_same_order(layouts: list[Layout]) -> None:
    for name in SCHEDULES:
        schedules: list[Schedule] = [getattr(layout, name) for layout in layouts]
        for src, sender in enumerate(schedules):
            assert len(sender.send) == len(sender.receive) == len(layouts)
            for dst, receiver in enumerate(schedules):
                assert sender.send[dst] == receiver.receive[src]
                assert list(sender.send[dst]) == sorted(set(sender.send[dst]))
                assert layouts[src].sizes(sender.send)[dst] == layouts[dst].sizes(receiver.receive)[src]


@settings(deadline=None)
@given(_layouts())
def test_gradients_reach_the_primary_from_every_rank_that_computes(layouts: list[Layout]) -> None:
    primary = layouts[0].ownership.primary.tolist()
    expected = {
        (u, rank, primary[u])
        for u, unit in enumerate(layouts[0].units)
        if unit.rule.has_gradient
        for rank in _computing_ranks(layouts, unit)
    }
    assert _deliveries(layouts, "gradients") == expected


@settings(deadline=None)
@given(_layouts())
def test_reduced_gradients_reach_every_mirror(layouts: list[Layout]) -> None:
    ownership = layouts[0].ownership
    expected = {
        (u, int(ownership.primary[u]), mirror)
        for u, unit in enumerate(layouts[0].units)
        if unit.rule.has_gradient
        for mirror in ownership.mirrors[u].tolist()
        if mirror >= 0
    }
    assert _deliveries(layouts, "mirrors") == expected


@settings(deadline=None)
@given(_layouts())
def test_weights_come_back_to_every_rank_that_computes(layouts: list[Layout]) -> None:
    """From itself where it mirrors the unit: nothing travels then."""
    primary, mirrors = layouts[0].ownership.primary.tolist(), layouts[0].ownership.mirrors.tolist()
    expected: dict[str, set[tuple[int, int, int]]] = {name: set() for name in SCHEDULES[2:]}
    for u, unit in enumerate(layouts[0].units):
        kind = "dense_weights" if unit.expert is None else "expert_weights"
        kind = "frozen_weights" if unit.optimizer == "frozen" else kind
        expected[kind] |= {
            (u, rank if rank in mirrors[u] else primary[u], rank) for rank in _computing_ranks(layouts, unit)
        }
    for name, deliveries in expected.items():
        assert _deliveries(layouts, name) == deliveries, name


@settings(deadline=None)
@given(_layouts())
def test_slots_are_those_of_the_rank(layouts: list[Layout]) -> None:
    for layout in layouts:
        span = layout.placement.slots_of(layout.rank)
        own_LS = layout.placement.expert_of_slot[:, span]
        assert len(layout.slot_of) == int((own_LS >= 0).sum())
        for (layer, expert), slot in layout.slot_of.items():
            assert own_LS[layer, slot] == expert


@settings(deadline=None)
@given(_layouts(), st.integers(1, 4), st.integers(0, 10**6))
def test_buckets_are_the_exchange_in_parts_on_which_all_ranks_agree(
    layouts: list[Layout], count: int, seed: int
) -> None:
    buckets_U = np.random.default_rng(seed).integers(0, count, len(layouts[0].units))
    buckets_U[0] = count - 1
    for name in SCHEDULES:
        cut = [getattr(layout, name).split(buckets_U) for layout in layouts]
        assert {len(parts) for parts in cut} == {count}
        for bucket, of_ranks in enumerate(zip(*cut, strict=True)):
            for src, sender in enumerate(of_ranks):
                for dst, receiver in enumerate(of_ranks):
                    whole = getattr(layouts[src], name).send[dst]
                    assert sender.send[dst] == tuple(u for u in whole if buckets_U[u] == bucket)
                    assert sender.send[dst] == receiver.receive[src]


def test_buffers_are_ordered_by_peer_then_by_unit() -> None:
    schedule = Schedule(send=((1,), (0, 1)), receive=((0,), (0, 1)))
    assert schedule.sent_units == [1, 0, 1]
    assert schedule.received_units == [0, 0, 1], "a unit comes once from every rank that sends it"


def test_an_empty_slot_has_no_expert() -> None:
    placement = Placement(
        np.array([[1, -1, 0, 1]], np.int32), np.array([0, 0, 1, 1], np.int32), np.array([[1, 0]], np.int32)
    )
    assert slots_by_expert(placement, 0) == {(0, 1): 0}
    assert slots_by_expert(placement, 1) == {(0, 0): 0, (0, 1): 1}


def test_an_expert_without_a_copy_is_an_error() -> None:
    view = View(1, (Member("w0", "a", 0),))
    units = [_unit("0.0", 5, "adamw", 0, 0)]
    ownership = plan_ownership(units, view, np.zeros((1, 1), np.uint8), 0, np.zeros((1, 1), np.int32))
    empty = Placement(np.array([[-1]], np.int32), np.array([0], np.int32), np.zeros((1, 1), np.int32))
    with pytest.raises(KeyError):
        Layout(units, view, 0, ownership, empty)
