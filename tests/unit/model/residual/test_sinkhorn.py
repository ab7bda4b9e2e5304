"""Sinkhorn: values and gradient against the unrolled iterations, memory, overflow, products of many maps."""

from __future__ import annotations

import pytest
import torch

from elastic_moe.model.residual.sinkhorn import sinkhorn
from tests.unit.model.residual.twins import unrolled


@pytest.mark.parametrize("iters", [1, 2, 20])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_sinkhorn_and_its_gradient(iters: int, eps: float) -> None:
    generator = torch.Generator().manual_seed(iters)
    z = torch.randn((3, 4, 4), generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn((3, 4, 4), generator=generator, dtype=torch.float64)
    fast, slow = sinkhorn(z, iters, eps), unrolled(z, iters, eps)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    (ours,) = torch.autograd.grad((fast * weights).sum(), z)
    (theirs,) = torch.autograd.grad((slow * weights).sum(), z)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert torch.autograd.gradcheck(lambda t: sinkhorn(t, iters, eps), z)
    if not eps:
        torch.testing.assert_close(fast.sum(dim=-1), torch.ones(3, 4, dtype=torch.float64))


def test_sinkhorn_saves_its_input_alone() -> None:
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        sinkhorn(torch.randn(5, 4, 4, requires_grad=True), 20)
    assert [t.shape for t in saved] == [(5, 4, 4)]


def test_sinkhorn_does_not_overflow() -> None:
    assert torch.isfinite(sinkhorn(torch.eye(4) * 200 - 100, 20)).all()


@pytest.mark.parametrize(("iters", "std", "low", "high"), [
    (1, 1.0, 0.40, 1.70), (3, 1.0, 0.90, 1.08), (20, 1.0, 0.999, 1.001), (20, 4.0, 0.90, 1.10), (5, 4.0, 0.40, 1.60),
])  # fmt: skip
def test_gains_stay_within_their_bounds(iters: int, std: float, low: float, high: float) -> None:
    """Products of 60 maps of random logits: rows sum to one exactly, columns as closely as the iterations allow."""
    z = torch.randn((60, 64, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * std
    maps = sinkhorn(z, iters)
    product = torch.eye(4, dtype=torch.float64).expand(64, 4, 4)
    for matrix in maps:
        product = matrix @ product
    torch.testing.assert_close(product.sum(dim=2), torch.ones(64, 4, dtype=torch.float64))
    assert low < float(product.sum(dim=1).min())
    assert float(product.sum(dim=1).max()) < high
