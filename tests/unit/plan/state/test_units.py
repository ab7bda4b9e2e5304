"""Units: every element of every parameter is in exactly one unit, whatever the cut."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.plan.state.units import build_units
from elastic_moe.types import ParamSpec


def _model(layers: int, experts: int, rows: int, columns: int) -> list[ParamSpec]:
    specs = [ParamSpec("embed", (rows, columns)), ParamSpec("norm", (columns,), decay=False)]
    for layer in range(layers):
        specs.append(ParamSpec(f"layers.{layer}.attn", (columns, columns), layer=layer))
        specs.append(ParamSpec(f"layers.{layer}.bias", (experts,), optimizer="bias", layer=layer, moe_layer=layer))
        for expert in range(experts):
            for matrix in ("gate", "up", "down"):
                name = f"layers.{layer}.moe.experts.{expert}.{matrix}"
                specs.append(ParamSpec(name, (3, columns), layer=layer, expert=expert, moe_layer=layer))
    return specs


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 7), st.integers(0, 60))
def test_units_cover_every_element_once(layers: int, experts: int, rows: int, columns: int, limit: int) -> None:
    specs = _model(layers, experts, rows, columns)
    units = build_units(specs, limit)
    seen = {spec.name: np.zeros(spec.numel, dtype=int) for spec in specs}
    by_name = {spec.name: spec for spec in specs}
    for unit in units:
        offset = 0
        for part in unit.parts:
            assert part.offset == offset
            assert part.numel > 0
            seen[part.param][part.start : part.start + part.numel] += 1
            assert by_name[part.param].optimizer == unit.optimizer
            offset += part.numel
        assert unit.numel == offset
        if limit and unit.expert is None and unit.optimizer == "adamw":
            spec = by_name[unit.parts[0].param]
            assert unit.numel <= max(limit, spec.numel // spec.shape[0])
            assert unit.parts[0].start % (spec.numel // spec.shape[0]) == 0
    assert all((count == 1).all() for count in seen.values())
    assert len({unit.name for unit in units}) == len(units)


def test_names_and_order() -> None:
    units = build_units(_model(1, 2, 10, 4), 16)
    assert [unit.name for unit in units] == [
        "embed#0",
        "embed#1",
        "embed#2",
        "norm",
        "layers.0.attn",
        "layers.0.bias",
        "layers.0.experts.0",
        "layers.0.experts.1",
    ]
    expert = units[-1]
    assert (expert.layer, expert.expert, expert.moe_layer, expert.optimizer) == (0, 1, 0, "adamw")
    assert [part.param.rsplit(".", 1)[1] for part in expert.parts] == ["gate", "up", "down"]
    assert [unit.numel for unit in units[:3]] == [12, 12, 16]


def test_stages_go_back_from_the_loss_to_the_embedding() -> None:
    specs = [
        ParamSpec("embed", (4, 2)), ParamSpec("0.norm", (2,), layer=0), ParamSpec("1.norm", (2,), layer=1),
        *(ParamSpec(f"e{e}", (2, 2), layer=1, expert=e, moe_layer=0) for e in range(2)),
        ParamSpec("norm", (2,)), ParamSpec("head", (4, 2)), ParamSpec("mtp.norm", (2,), layer=2),
    ]  # fmt: skip
    assert build_units(specs, 0).stage_U.tolist() == [4, 3, 2, 2, 2, 0, 0, 1]
    assert build_units([ParamSpec("a", (2,)), ParamSpec("b", (2,))], 0).stage_U.tolist() == [1, 1]
