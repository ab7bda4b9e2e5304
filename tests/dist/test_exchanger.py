"""Gradients and weights of whole units between three ranks: the sums at primaries and mirrors, the weights at users."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from elastic_moe.optim.unit_state import UnitState
from elastic_moe.plan.placement import Placement
from elastic_moe.plan.state import buckets
from elastic_moe.plan.state.ownership import NONE, Ownership, plan_ownership
from elastic_moe.plan.state.schedule import Layout
from elastic_moe.plan.state.units import build_units
from elastic_moe.runtime.exchange.exchanger import Exchanger
from elastic_moe.runtime.exchange.windows import ComputeTensors, windows_of
from elastic_moe.runtime.state import HeldState
from elastic_moe.types import Member, ParamSpec, Unit, View
from tests.dist.ranks import Seat, results

WORLD, EXPERTS = 3, 3
SPECS = [
    ParamSpec("embed", (4, 3)),  # cut into two units
    ParamSpec("norm", (3,), decay=False),
    ParamSpec("bias", (EXPERTS,), optimizer="bias", layer=0, moe_layer=0),
    ParamSpec("positions", (5,), optimizer="frozen"),
    *(
        ParamSpec(f"experts.{e}.{name}", shape, layer=0, expert=e, moe_layer=0)
        for e in range(EXPERTS)
        for name, shape in {"gate": (2, 3), "up": (2, 3), "down": (3, 2)}.items()
    ),
]
UNITS = build_units(SPECS, 6)
VIEW = View(1, tuple(Member(f"w{r}", f"n{r}", r) for r in range(WORLD)))
SLOTS = {0: [0, 1], 1: [0, -1, 2], 2: []}  # rank -> experts; expert 0 is replicated, rank 2 has none
PLACEMENT = Placement(
    np.array([[e for experts in SLOTS.values() for e in experts]], np.int32),
    np.array([r for r, experts in SLOTS.items() for _ in experts], np.int32),
    np.array([[0, 0, 1]], np.int32),
)


def _ownership() -> Ownership:
    held = np.full((WORLD, len(UNITS)), NONE, dtype=np.uint8)
    return plan_ownership(UNITS, VIEW, held, 1, PLACEMENT.home)


def _value(unit: int, kind: int) -> torch.Tensor:
    """Distinct whole numbers, exact in every sum."""
    return torch.arange(UNITS[unit].numel, dtype=torch.float32) + 100 * unit + 10_000 * kind


def _computes(rank: int, unit: Unit) -> bool:
    return unit.expert is None or unit.expert in SLOTS[rank]


def _tensors(rank: int, buffers: bool, matrices: torch.dtype = torch.float32) -> ComputeTensors:
    """Compute tensors full of -1, with the buffers that have no gradient if wanted. `matrices`: dtype of matrices."""
    dense = {s.name: torch.full(s.shape, -1.0) for s in SPECS if s.expert is None and (buffers or s.rule.has_gradient)}
    dense["embed"] = dense["embed"].to(matrices)
    num_slots = len(SLOTS[rank])
    slots = torch.full((num_slots, 4, 3), -1.0, dtype=matrices), torch.full((num_slots, 3, 2), -1.0, dtype=matrices)
    return ComputeTensors(dense, [slots])


def _flat(rank: int, tensors: ComputeTensors, unit: Unit) -> torch.Tensor:
    """A unit's elements as one vector, read from the whole tensors without windows."""
    if unit.expert is None:
        [part] = unit.parts
        return tensors.dense[part.param].flatten()[part.start : part.start + part.numel]
    slot = SLOTS[rank].index(unit.expert)
    return torch.cat([stacked[slot].flatten() for stacked in tensors.slots[0]])


def _fill(layout: Layout, tensors: ComputeTensors, kind: int) -> None:
    """Give every unit with a gradient that this rank computes with its value."""
    for u, unit in enumerate(UNITS):
        if unit.rule.has_gradient and _computes(layout.rank, unit):
            windows = windows_of(layout, tensors, u)
            values = _value(u, kind).split([window.numel() for window in windows])
            for window, value in zip(windows, values, strict=True):
                window.copy_(value)


def _exchange(
    seat: Seat, dtype: torch.dtype, matrices: torch.dtype, limit: int, rounding_seed: int | None = None
) -> dict[str, Any]:
    buckets.LEAST_ELEMENTS, buckets.MESSAGE_ELEMENTS = limit, 1
    rank, ownership = seat.rank, _ownership()
    group = seat.form(1, rank, seat.world)
    layout = Layout(UNITS, VIEW, rank, ownership, PLACEMENT)
    assert len(set(layout.bucket_U.tolist())) > 2 or limit > 1000
    roles_U = ownership.role(rank)
    source = {u: UnitState.initial(UNITS[u], _value(u, 9)) for u in np.flatnonzero(roles_U != NONE).tolist()}
    held = HeldState.build(UNITS, roles_U, source, torch.device("cpu"))
    weights, grads = _tensors(rank, True, matrices), _tensors(rank, False)
    grads = ComputeTensors(
        {name: t.to(dtype) for name, t in grads.dense.items()}, [tuple(t.to(dtype) for t in s) for s in grads.slots]
    )
    exchanger = Exchanger(layout, weights, grads, held, group, rounding_seed)

    _fill(layout, grads, rank)
    for u, unit in enumerate(UNITS):
        if unit.rule.has_gradient and _computes(rank, unit):
            assert torch.equal(_flat(rank, grads, unit), _value(u, rank).to(dtype)), "a window is at the wrong place"
    square = exchanger.reduce(1)
    exchanger.mirror()
    sums = {
        u: sum((_value(u, r) for r in range(WORLD) if _computes(r, unit)), torch.zeros(unit.numel))
        for u, unit in enumerate(UNITS)
        if unit.rule.has_gradient
    }
    reduced = {u: torch.cat(list(held.grads.pieces(u))) for u in sorted(set(sums) & set(source))}
    for u, total in reduced.items():
        if rounding_seed is None:
            assert torch.equal(total, sums[u]), f"gradient of {UNITS[u].name}"
        else:  # each contribution and the sum went to one of the neighbours
            assert torch.allclose(total, sums[u], rtol=2 * 2**-7)
            assert torch.equal(total, total.bfloat16().float())
    owned = [u for u in sums if ownership.primary[u] == rank]
    assert square == pytest.approx(float(sum(reduced[u].double().square().sum() for u in owned)))

    exchanger.publish()
    first_bytes = exchanger.publish_bytes
    exchanger.wait_expert_weights()
    exchanger.wait_expert_weights()
    for u, unit in enumerate(UNITS):
        if _computes(rank, unit):
            frozen = torch.full((unit.numel,), -1.0)
            expected = frozen if unit.optimizer == "frozen" else _value(u, 9)
            found = _flat(rank, weights, unit)
            assert torch.equal(found, expected.to(found.dtype)), f"weight of {unit.name}"
    if -1 in SLOTS[rank]:
        assert all((stacked[SLOTS[rank].index(-1)] == -1).all() for stacked in weights.slots[0]), "an empty slot"
    exchanger.publish(frozen=True)
    exchanger.wait_expert_weights()
    assert torch.equal(weights.dense["positions"], _value([u.name for u in UNITS].index("positions"), 9))
    group.close()
    published = {"first": first_bytes, "second": exchanger.publish_bytes, "seconds": exchanger.publish_s}
    return published | {"sums": {u: total.tolist() for u, total in reduced.items()}}


@pytest.mark.parametrize(("dtype", "matrices", "limit"), [
    (torch.float32, torch.float32, 1 << 22),
    (torch.float32, torch.bfloat16, 1 << 22),
    (torch.float64, torch.float32, 1 << 22),
    (torch.float64, torch.bfloat16, 1 << 22),
    (torch.float32, torch.float32, 12),  # in buckets of about a unit
    (torch.float64, torch.bfloat16, 12),
])  # fmt: skip
def test_gradients_add_up_and_weights_come_back(dtype: torch.dtype, matrices: torch.dtype, limit: int) -> None:
    def size(unit: Unit) -> int:
        """Bytes of a unit on its way."""
        is_matrix = unit.expert is not None or unit.name.startswith("embed")
        return unit.numel * (matrices.itemsize if is_matrix else 4)

    for rank, found in enumerate(results(WORLD, _exchange, dtype, matrices, limit)):
        role_U = _ownership().role(rank)
        others = [u for i, u in enumerate(UNITS) if _computes(rank, u) and role_U[i] == NONE]
        assert found["first"] == sum(size(u) for u in others if u.optimizer != "frozen")
        assert found["second"] == sum(size(u) for u in others)
        assert found["seconds"] > 0


@pytest.mark.parametrize("limit", [1 << 22, 12])
def test_rounded_gradients_are_the_same_at_primaries_and_mirrors(limit: int) -> None:
    first, again = (results(WORLD, _exchange, torch.float32, torch.float32, limit, 3) for _ in range(2))
    copies: dict[int, list[list[float]]] = {}
    for found in first:
        for u, total in found["sums"].items():
            copies.setdefault(u, []).append(total)
    assert all(len(totals) == 2 and totals[0] == totals[1] for totals in copies.values())
    assert [found["sums"] for found in first] == [found["sums"] for found in again]
