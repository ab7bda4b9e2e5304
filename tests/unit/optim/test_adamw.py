"""AdamW equals torch's, and bit for bit a slow twin, however the vectors are cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from elastic_moe.config.schema import OptimConfig
from elastic_moe.optim.adamw import SPAN, apply_adamw
from elastic_moe.optim.unit_state import UnitState


def fresh(numel: int, seed: int = 0) -> UnitState:
    weight = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    return UnitState({"weight": weight, "m": torch.zeros(numel), "v": torch.zeros(numel)})


@pytest.mark.parametrize("decay", [True, False])
def test_equals_torch(decay: bool) -> None:
    cfg = OptimConfig(weight_decay=0.1)
    state = fresh(32_869)
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


def slow_twin(state: UnitState, grad: torch.Tensor, step: int, lr: float, cfg: OptimConfig) -> None:
    """One update by numpy, one rounded operation after another, with weight decay."""
    weight, m, v, g = (t.numpy() for t in (state.weight, state["m"], state["v"], grad))
    one = np.float32
    weight *= one(1.0 - lr * cfg.weight_decay)
    m[:] = m * one(cfg.beta1) + g * one(1.0 - cfg.beta1)
    v[:] = v * one(cfg.beta2) + (g * g) * one(1.0 - cfg.beta2)
    denominator = np.sqrt(v) * one(1.0 / math.sqrt(1.0 - cfg.beta2**step)) + one(cfg.eps)
    weight -= m * one(lr / (1.0 - cfg.beta1**step)) / denominator


def gradient(numel: int, generator: torch.Generator) -> torch.Tensor:
    """Gradients of very different sizes, some of them 0 and some whose squares are not normal numbers."""
    sizes = 10.0 ** torch.empty(numel).uniform_(-24, 4, generator=generator)
    return torch.randn(numel, generator=generator) * sizes * (torch.rand(numel, generator=generator) < 0.9)


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 31, 1003, 70_001])
def test_every_operation_rounds_once(numel: int) -> None:
    """So the result is the same on every CPU: numpy's add, multiply, divide and square root are IEEE's."""
    cfg, generator = OptimConfig(weight_decay=0.1), torch.Generator().manual_seed(4)
    state, twin = fresh(numel), fresh(numel)
    for step in range(1, 6):
        grad = gradient(numel, generator)
        apply_adamw(state, grad, step, 1e-3, cfg, True)
        slow_twin(twin, grad, step, 1e-3, cfg)
        for name in ("weight", "m", "v"):
            assert torch.equal(state[name], twin[name]), (name, step)


@pytest.mark.parametrize("seed", range(4))
def test_bits_do_not_depend_on_the_layout(seed: int) -> None:
    """Twins hold the same unit at other offsets of other vectors, cut at other places."""
    cfg, numel = OptimConfig(), 66_539
    generator, random = torch.Generator().manual_seed(2), np.random.default_rng(seed)
    whole, cut = fresh(numel), fresh(numel)
    offset = int(random.integers(1, 64))
    room = UnitState({name: torch.zeros(numel + offset) for name in cut.fields}).span(offset, offset + numel)
    room.copy_(cut)
    for step in range(1, 4):
        grad = gradient(numel, generator)
        apply_adamw(whole, grad, step, 1e-3, cfg, True)
        start = 0
        while start < numel:
            stop = min(numel, start + int(random.choice([1, 3, 7, 8, 9, 14, 31, 1001, 32768])))
            apply_adamw(room.span(start, stop), grad[start:stop], step, 1e-3, cfg, True)
            start = stop
    for name in ("weight", "m", "v"):
        assert torch.equal(whole[name], room[name]), name


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    numel, before = 3 * SPAN + 11, torch.get_num_threads()
    alone, shared = fresh(numel), fresh(numel)
    grad = gradient(numel, torch.Generator().manual_seed(5))
    try:
        for state, threads in ((alone, 1), (shared, 3)):
            torch.set_num_threads(threads)
            apply_adamw(state, grad, 1, 1e-3, OptimConfig(), True)
    finally:
        torch.set_num_threads(before)
    for name in ("weight", "m", "v"):
        assert torch.equal(alone[name], shared[name]), name


def test_numbers_that_are_not_finite_stay_where_they_are() -> None:
    state, twin = fresh(9), fresh(9)
    grad = torch.zeros(9)
    apply_adamw(twin, grad, 1, 1e-3, OptimConfig(), True)
    grad[4] = math.inf
    apply_adamw(state, grad, 1, 1e-3, OptimConfig(), True)
    assert not state.weight[4].isfinite()
    others = [i for i in range(9) if i != 4]
    assert torch.equal(state.weight[others], twin.weight[others])


def test_update_is_in_place() -> None:
    state = fresh(10)
    places = [t.data_ptr() for t in state.fields.values()]
    before = state.weight.clone()
    apply_adamw(state, torch.ones(10), 1, 0.5, OptimConfig(weight_decay=0.0), True)
    assert places == [t.data_ptr() for t in state.fields.values()]
    torch.testing.assert_close(state.weight, before - 0.5)  # the first step has length lr
