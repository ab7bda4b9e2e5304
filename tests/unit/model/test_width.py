"""`optim.base_width`: a setting has the same effect at any width (a coordinate check)."""

from __future__ import annotations

import math

import pytest
import torch

from elastic_moe.config.schema import ModelConfig, OptimConfig
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.init import init_param
from elastic_moe.model.params import param_specs
from elastic_moe.model.transformer import Transformer
from elastic_moe.optim.committed import CommittedStep
from elastic_moe.optim.rules import RULES
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.plan.state.units import build_units

BASE, WIDE = 32, 192


def model_of(width: int, **keys: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=64, hidden_size=width, num_layers=3, num_heads=width // 16, num_kv_heads=width // 16, head_dim=16,
        dense_hidden=2 * width, num_experts=4, experts_per_token=2, expert_hidden=width, bias_update_speed=0.0,
        init_std=0.1, **keys,  # type: ignore[arg-type]
    )  # fmt: skip


def logits_change(width: int, optimizer: str, base_width: int, steps: int = 3) -> float:
    """Root mean square by which a few updates, on the same text, change the logits."""
    cfg, optim = model_of(width), OptimConfig(lr=0.01, name=optimizer)
    specs = param_specs(cfg, optimizer, base_width)
    experts = LocalExperts(cfg, seed=None)
    model = Transformer(cfg, experts)
    model.initialize(0)
    views = {name: p.data for name, p in model.named_parameters()} | experts.named_views()
    trained = [spec for spec in specs if spec.rule.has_gradient]
    for spec in trained:
        views[spec.name].copy_(init_param(spec, 0))
    units = build_units(trained, 0)
    states = [UnitState.initial(u, torch.cat([views[part.param].flatten() for part in u.parts])) for u in units]
    dice = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (8, 16), generator=dice)
    targets = tokens.roll(-1, dims=1)
    before = model(tokens).detach()
    for step in range(1, steps + 1):
        for parameter in (*model.parameters(), *experts.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        (model.loss(tokens, targets).loss_sum / tokens.numel()).backward()
        grads = {name: p.grad for name, p in model.named_parameters()} | experts.named_views(of_grad=True)
        committed = CommittedStep(step, optim.lr, torch.zeros(0).numpy(), optim, cfg)
        for unit, state in zip(units, states, strict=True):
            grad = torch.cat([grads[part.param].flatten() for part in unit.parts])  # type: ignore[union-attr]
            RULES[unit.optimizer].apply([unit], state, grad, committed.scaled(unit.lr_scale))
            for part in unit.parts:
                views[part.param].copy_(state.weight[part.offset : part.offset + part.numel].view(part.shape))
    return float((model(tokens).detach() - before).square().mean().sqrt())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_updates_change_the_logits_as_much_at_any_width(optimizer: str) -> None:
    narrow, wide = (logits_change(width, optimizer, BASE) for width in (BASE, WIDE))
    as_they_are = logits_change(WIDE, optimizer, 0)
    assert narrow == logits_change(BASE, optimizer, 0), "at the base width nothing is scaled"
    assert 0.5 < wide / narrow < 2.0, (narrow, wide)
    assert as_they_are / narrow > 1.5 * max(1.0, wide / narrow), (narrow, wide, as_they_are)


def test_factors() -> None:
    cfg = model_of(WIDE, residual="mhc", readout="learned")
    plain = {spec.name: spec for spec in param_specs(cfg, "muon")}
    scaled = {spec.name: spec for spec in param_specs(cfg, "muon", BASE)}
    ratio, root = BASE / WIDE, math.sqrt(BASE / WIDE)
    expected = {
        "embed.weight": (1.0, 1.0), "head.weight": (ratio, ratio), "norm.weight": (1.0, 1.0),
        "layers.1.attn.q.weight": (root, root), "layers.2.moe.experts.3.down": (root, root),
        "layers.1.moe.router.weight": (root, root), "layers.1.moe.router.bias": (1.0, 1.0),
        "readout.proj": (root, ratio), "layers.0.attn_mix.base": (1.0, 1.0),
    }  # fmt: skip
    for name, (std, lr) in expected.items():
        assert scaled[name].std == pytest.approx(plain[name].std * std), name
        assert scaled[name].lr_scale == pytest.approx(lr), name
        assert plain[name].lr_scale == 1.0
    units = {unit.name: unit.lr_scale for unit in build_units(tuple(scaled.values()), 4096)}
    assert units["layers.2.experts.3"] == pytest.approx(root)
    assert units["head.weight#0"] == pytest.approx(ratio)


def test_weights_decay_as_without_a_scale() -> None:
    step = CommittedStep(1, 0.5, torch.zeros(0).numpy(), OptimConfig(weight_decay=0.1), ModelConfig())
    assert step.scaled(1.0) is step
    quarter = step.scaled(0.25)
    assert quarter.lr == 0.125
    assert quarter.lr * quarter.optim.weight_decay == pytest.approx(0.05)
