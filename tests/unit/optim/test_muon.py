"""Muon: the iteration against the singular value decomposition, the update against torch's Muon, and bits of twins."""

from __future__ import annotations

import pytest
import torch

from elastic_moe.config.schema import ModelConfig, OptimConfig
from elastic_moe.model.params import param_specs
from elastic_moe.optim import muon
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.plan.state.units import build_units
from elastic_moe.types import RULE_FACTS, ParamSpec, Unit

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit_of(*shapes: tuple[int, int], stacked: int = 1) -> Unit:
    """An expert's unit of several matrices, or the unit of one."""
    expert = 0 if len(shapes) > 1 else None
    specs = [
        ParamSpec(f"m{i}", shape, optimizer="muon", stacked=stacked, layer=0, moe_layer=expert, expert=expert)
        for i, shape in enumerate(shapes)
    ]
    (unit,) = build_units(specs, 8)
    return unit


def fresh(unit: Unit, seed: int = 1) -> UnitState:
    return UnitState({"weight": randn(unit.numel, seed=seed), "m": torch.zeros(unit.numel)})


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (16, 40), (1, 7), (64, 65)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_the_iteration_makes_rows_orthonormal(rows: int, columns: int, scale: float) -> None:
    g = randn(3, rows, columns) * scale
    u, values, v = torch.linalg.svd(g.double(), full_matrices=False)
    found = muon.orthogonal(g)
    sure = (values[..., -1:] > 1e-2 * values[..., :1]).squeeze(-1)  # a nearly singular matrix has no nearest one
    torch.testing.assert_close(found[sure].double(), (u @ v)[sure], rtol=0, atol=3e-3)
    assert torch.linalg.svdvals(found[sure]).sub(1).abs().max() < 2e-3


def test_the_work_is_planned_for_as_many_rounds_as_there_are() -> None:
    assert RULE_FACTS["muon"].iterations == len(muon.STEPS)


def test_no_gradient_moves_nothing() -> None:
    assert not muon.orthogonal(torch.zeros(2, 4, 6)).any()


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_equals_torch(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's has one triple of coefficients, the factor 0.2, and products in bf16; so has ours here, but for bf16."""
    monkeypatch.setattr(muon, "STEPS", (muon.FAST,) * 5)
    monkeypatch.setattr(muon, "UPDATE_RMS", 0.2)
    cfg, unit = OptimConfig(name="muon", weight_decay=0.1, momentum=0.9), unit_of(shape)
    state = fresh(unit)
    oracle = torch.nn.Parameter(state.weight.view(shape).clone())
    optimizer = torch.optim.Muon(
        [oracle], lr=0.0, weight_decay=0.1, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(1, 9):
        lr = 1e-2 / step
        oracle.grad = randn(*shape, seed=step)
        before, kept = state.weight.clone(), oracle.detach().clone()
        muon.apply_muon(unit, state, oracle.grad.flatten(), lr, cfg)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        ours, theirs = (state.weight - before).view(shape), oracle.detach() - kept
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_the_update_has_the_size_of_adamws() -> None:
    """Root mean square 0.18 times the learning rate (Moonlight asks for 0.2 to 0.4)."""
    unit = unit_of((64, 160))
    state = fresh(unit)
    before = state.weight.clone()
    muon.apply_muon(unit, state, randn(unit.numel), 1.0, OptimConfig(weight_decay=0.0))
    assert (state.weight - before).square().mean().sqrt() == pytest.approx(0.18, rel=0.01)


def test_independent_matrices_are_orthogonalised_by_themselves() -> None:
    """Gate, up and down of an expert, and matrices that lie one above the other."""
    cfg, shapes = OptimConfig(weight_decay=0.0), [(12, 20), (12, 20), (20, 12)]
    together, grad = unit_of(*shapes), randn(720)
    state = fresh(together)
    muon.apply_muon(together, state, grad, 0.1, cfg)
    stacked = unit_of((36, 20), stacked=3)
    piled = fresh(stacked)
    muon.apply_muon(stacked, piled, grad, 0.1, cfg)
    start = fresh(together).weight
    for number, shape in enumerate(shapes):
        span = slice(240 * number, 240 * (number + 1))
        one = unit_of(shape)
        alone = UnitState({"weight": start[span].clone(), "m": torch.zeros(240)})
        muon.apply_muon(one, alone, grad[span], 0.1, cfg)
        torch.testing.assert_close(state.weight[span], alone.weight)
        if number < 2:
            torch.testing.assert_close(piled.weight[span], alone.weight)


@pytest.mark.parametrize("offset", [1, 3, 16, 61])
def test_bits_do_not_depend_on_where_the_unit_lies(offset: int) -> None:
    cfg, unit = OptimConfig(), unit_of((33, 50), (33, 50), (50, 33))
    state = fresh(unit)
    room = UnitState({name: torch.zeros(unit.numel + offset) for name in state.fields})
    elsewhere = room.span(offset, offset + unit.numel)
    elsewhere.copy_(state)
    for step in range(1, 5):
        grad = randn(unit.numel, seed=step)
        moved = torch.zeros(unit.numel + offset)[offset:].copy_(grad)
        muon.apply_muon(unit, state, grad, 1e-2, cfg)
        muon.apply_muon(unit, elsewhere, moved, 1e-2, cfg)
        assert torch.equal(grad, randn(unit.numel, seed=step)), "the gradient is left as it is"
    for name, tensor in state.fields.items():
        assert torch.equal(tensor, elsewhere[name]), name


def test_which_parameters_are_muons() -> None:
    """All matrices of layers, none of them cut; not embedding, head, norms, biases and gating factors."""
    cfg = ModelConfig(attention="csa", residual="mhc", mtp_depth=1, num_hash_layers=1, max_unit_elements=64)
    specs = param_specs(cfg, "muon")
    mine = {spec.name for spec in specs if spec.optimizer == "muon"}
    assert {
        "layers.0.attn.group_out",
        "layers.1.moe.experts.3.gate",
        "layers.0.attn_mix.proj",
        "mtp.proj.weight",
    } <= mine
    assert "layers.2.moe.router.weight" in mine
    assert not mine & {
        "embed.weight",
        "head.weight",
        "norm.weight",
        "layers.0.attn_mix.gates",
        "layers.0.attn_mix.base",
    }
    assert all(len(spec.shape) == 2 for spec in specs if spec.name in mine)
    others = {spec.name: spec.optimizer for spec in specs if spec.name not in mine}
    assert others == {s.name: s.optimizer for s in param_specs(cfg) if s.name in others}
    units = build_units(specs, cfg.max_unit_elements)
    assert {part.param for unit in units if unit.optimizer == "muon" for part in unit.parts} == mine
    assert not [unit.name for unit in units if unit.optimizer == "muon" and "#" in unit.name]
    (pile,) = [unit for unit in units if unit.name == "layers.0.attn.group_out"]
    assert len(muon.matrices(pile, torch.zeros(pile.numel))) == cfg.output_groups


def test_the_arithmetic_has_a_name() -> None:
    threads = torch.get_num_threads()
    assert muon.arithmetic(CPU).startswith("cpu with products ")
    assert muon.arithmetic(CPU).endswith(f", {threads} threads")
