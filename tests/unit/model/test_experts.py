"""grouped_swiglu against its loop twin, and LocalExperts against a token-by-token reference: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts.grouped import grouped_swiglu, loop_swiglu
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.init import init_param
from elastic_moe.model.params import param_specs


def make(counts: list[int], width: int, hidden: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(counts))
    slots = len(counts)
    shapes = [(sum(counts), width), (slots, 2 * hidden, width), (slots, width, hidden)]
    return [torch.randn(s, generator=generator).mul_(0.3).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(
    ("dtype", "width", "hidden", "tolerance"),
    [
        (torch.float32, 16, 8, 1e-6),
        (torch.bfloat16, 16, 8, 2e-2),
        (torch.float32, 6, 10, 1e-6),  # strides that grouped_mm refuses
        (torch.float64, 16, 8, 1e-12),  # a dtype that grouped_mm refuses
    ],
)
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 7], [9], [0, 0, 0]])
def test_grouped_equals_loop(counts: list[int], dtype: torch.dtype, width: int, hidden: int, tolerance: float) -> None:
    results = []
    for function in (grouped_swiglu, loop_swiglu):
        x, gate_up, down = make(counts, width, hidden, dtype)
        y = function(x, torch.tensor(counts), gate_up, down)
        y.sum().backward()  # an expanded gradient, which grouped_mm alone refuses
        results.append([y.detach(), x.grad, gate_up.grad, down.grad])
    assert results[0][0].dtype == dtype
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("limit", [0.0, 0.2])
def test_gradients_may_be_added_in_place(limit: float) -> None:
    """With `direct` the weights' gradients are added to what is there, and autograd gets none."""
    counts = [3, 0, 5]
    twins = [make(counts, 16, 8, torch.float32) for _ in range(2)]
    for (x, *weights), direct in zip(twins, (True, False), strict=True):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        kept = [weight.grad for weight in weights]
        y = grouped_swiglu(x, torch.tensor(counts), *weights, limit, direct)
        (y * torch.linspace(0, 1, y.numel()).view(y.shape)).sum().backward()
        assert not direct or all(w.grad is g for w, g in zip(weights, kept, strict=True))
    for fast, slow in zip(*twins, strict=True):
        torch.testing.assert_close(fast.grad, slow.grad)


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
    for general in (False, True):
        x = torch.randn((7, 8), generator=torch.Generator().manual_seed(2), requires_grad=True)
        gates = torch.rand((7, 3), generator=torch.Generator().manual_seed(3), requires_grad=True)
        backend.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = backend.forward_grouped(0, x, ids, gates) if general else backend(0, x, ids, gates)
        (y * torch.linspace(-1, 1, 56).view(7, 8)).sum().backward()
        results.append([y, x.grad, gates.grad, *(p.grad for p in backend.slot_params(0))])
    tolerance = {"rtol": 5e-2, "atol": 1e-4} if autocast else {"rtol": 1e-5, "atol": 1e-7}
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, **tolerance)


def _with_counts(tensors: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
    x, *weights = tensors
    return [x, torch.tensor(counts), *weights]


def test_no_slots_stays_in_the_graph() -> None:
    x = torch.zeros((0, 8), requires_grad=True)
    y = grouped_swiglu(x, torch.zeros(0, dtype=torch.int64), torch.zeros((0, 16, 8)), torch.zeros((0, 8, 8)))
    y.sum().backward()
    assert y.shape == (0, 8) and x.grad is not None


def test_autocast_is_close_to_fp32() -> None:
    arguments = _with_counts(make([4, 4, 1], 16, 16, torch.float32), [4, 4, 1])
    exact = grouped_swiglu(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        rough = grouped_swiglu(*arguments)
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.02)


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
