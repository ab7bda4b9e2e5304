"""AdamW equals torch's, however the vectors are cut."""

from __future__ import annotations

import pytest
import torch

from elastic_moe.config.schema import OptimConfig
from elastic_moe.optim.adamw import CHUNK, apply_adamw
from elastic_moe.optim.unit_state import UnitState


def fresh(numel: int, seed: int = 0) -> UnitState:
    weight = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    return UnitState({"weight": weight, "m": torch.zeros(numel), "v": torch.zeros(numel)})


@pytest.mark.parametrize("decay", [True, False])
def test_equals_torch(decay: bool) -> None:
    cfg = OptimConfig(weight_decay=0.1)
    state = fresh(CHUNK + 101)
    oracle = torch.nn.Parameter(state.weight.clone())
    optimizer = torch.optim.AdamW(
        [oracle], lr=0.0, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.weight_decay if decay else 0.0
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 13):
        lr = 1e-2 / step
        grad = torch.randn(state.weight.shape, generator=generator)
        kept = grad.clone()
        apply_adamw(state, grad, step, lr, cfg, decay)
        assert torch.equal(grad, kept)
        oracle.grad = grad
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    moments = optimizer.state[oracle]
    torch.testing.assert_close(state.weight, oracle.detach(), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(state["m"], moments["exp_avg"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state["v"], moments["exp_avg_sq"], rtol=1e-5, atol=1e-7)


def test_bits_do_not_depend_on_the_layout() -> None:
    """Twins hold the same unit at other offsets of other vectors."""
    cfg, numel = OptimConfig(), 2 * CHUNK + 1003
    generator = torch.Generator().manual_seed(2)
    whole, cut = fresh(numel), fresh(numel)
    for step in range(1, 4):
        grad = torch.randn(numel, generator=generator)
        apply_adamw(whole, grad, step, 1e-3, cfg, True)
        start = 0
        for length in (1, 3, 14, 1001, CHUNK, numel):
            span = slice(start, min(numel, start + length))
            apply_adamw(cut.span(span.start, span.stop), grad[span], step, 1e-3, cfg, True)
            start = span.stop
        assert start == numel
    for name in ("weight", "m", "v"):
        assert torch.equal(whole[name], cut[name]), name


def test_update_is_in_place() -> None:
    state = fresh(10)
    places = [t.data_ptr() for t in state.fields.values()]
    before = state.weight.clone()
    apply_adamw(state, torch.ones(10), 1, 0.5, OptimConfig(weight_decay=0.0), True)
    assert places == [t.data_ptr() for t in state.fields.values()]
    torch.testing.assert_close(state.weight, before - 0.5)  # the first step has length lr
