"""grouped_swiglu against its loop twin: values and gradients."""

from __future__ import annotations

import pytest
import torch

from elastic_moe.model.experts.grouped import grouped_swiglu, loop_swiglu


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


def _with_counts(tensors: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
    x, *weights = tensors
    return [x, torch.tensor(counts), *weights]


def test_no_slots_stays_in_the_graph() -> None:
    x = torch.zeros((0, 8), requires_grad=True)
    y = grouped_swiglu(x, torch.zeros(0, dtype=torch.int64), torch.zeros((0, 16, 8)), torch.zeros((0, 8, 8)))
    y.sum().backward()
    assert y.shape == (0, 8)
    assert x.grad is not None


def test_autocast_is_close_to_fp32() -> None:
    arguments = _with_counts(make([4, 4, 1], 16, 16, torch.float32), [4, 4, 1])
    exact = grouped_swiglu(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        rough = grouped_swiglu(*arguments)
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.02)
