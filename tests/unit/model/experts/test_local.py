"""LocalExperts: its way on CPUs, its general way and a token-by-token reference agree in values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts.local import LocalExperts, local_experts, local_experts_grouped
from elastic_moe.model.init import init_param
from elastic_moe.model.params import param_specs


@pytest.mark.parametrize("autocast", [False, True])
def test_expert_by_expert_equals_all_together(autocast: bool) -> None:
    """LocalExperts' own path on CPUs against the general one, through gates and tokens too."""
    cfg = ModelConfig(
        hidden_size=8, expert_hidden=12, num_experts=5, experts_per_token=3, num_layers=2, swiglu_limit=0.05
    )
    backend = LocalExperts(cfg, seed=4)
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(7)])
    results = []
    for computed in (local_experts, local_experts_grouped):
        x = torch.randn((7, 8), generator=torch.Generator().manual_seed(2), requires_grad=True)
        gates = torch.rand((7, 3), generator=torch.Generator().manual_seed(3), requires_grad=True)
        backend.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = computed(x, ids, gates, backend.slot_params(0), cfg.swiglu_limit)
        (y * torch.linspace(-1, 1, 56).view(7, 8)).sum().backward()
        results.append([y, x.grad, gates.grad, *(p.grad for p in backend.slot_params(0))])
    tolerance = {"rtol": 5e-2, "atol": 1e-4} if autocast else {"rtol": 1e-5, "atol": 1e-7}
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, **tolerance)


def test_local_experts_equal_token_by_token() -> None:
    cfg = ModelConfig(hidden_size=8, expert_hidden=12, num_experts=5, experts_per_token=3, num_layers=3)
    backend = LocalExperts(cfg, seed=4)
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(7)])
    x = torch.randn((7, 8), generator=generator, requires_grad=True)
    gates = torch.rand((7, 3), generator=generator, requires_grad=True)
    out_grad = torch.randn((7, 8), generator=generator)
    inputs = [x, gates, *backend.parameters()]

    y = backend(1, x, ids, gates)
    fast = torch.autograd.grad(y, inputs, out_grad, allow_unused=True)
    gate_up_w, down_w = backend.slot_params(1)
    gate_w, up_w = gate_up_w.chunk(2, dim=1)
    rows = []
    for t in range(7):
        row = torch.zeros(8)
        for k in range(3):
            e = int(ids[t, k])
            row = row + gates[t, k] * (down_w[e] @ (F.silu(gate_w[e] @ x[t]) * (up_w[e] @ x[t])))
        rows.append(row)
    slow_y = torch.stack(rows)
    slow = torch.autograd.grad(slow_y, inputs, out_grad, allow_unused=True)
    torch.testing.assert_close(y, slow_y, rtol=1e-5, atol=1e-7)
    for a, b in zip(fast, slow, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_local_experts_hold_their_specs_values() -> None:
    cfg = ModelConfig(hidden_size=8, expert_hidden=12, num_experts=3, num_layers=2)
    backend = LocalExperts(cfg, seed=9)
    specs = [spec for spec in param_specs(cfg) if spec.expert is not None]
    assert len(specs) == 9
    views = backend.named_views()
    for spec in specs:
        assert torch.equal(views[spec.name], init_param(spec, 9))
