"""Attention with a sink against its twin: output, log-sum-exp and gradients."""

from __future__ import annotations

import pytest
import torch

from elastic_moe.model.attention.sinks import sink_attention, sink_attention_plain


@pytest.mark.parametrize("shape", [(2, 3, 5, 9, 8), (1, 1, 1, 1, 4), (2, 4, 7, 7, 33)])
def test_sinks_equal_the_twin(shape: tuple[int, ...]) -> None:
    batch, heads, queries, keys, width = shape
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand((batch, 1, queries, keys), generator=generator) < 0.6
    seen[..., 0] = True
    inputs = [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
        for s in ((batch, heads, queries, width), (batch, keys, width), (heads,))
    ]
    weights = torch.randn((batch, heads, queries, width), generator=generator, dtype=torch.float64)
    results = []
    for function in (sink_attention, sink_attention_plain):
        out, lse = function(*inputs, seen, 0.3)
        results.append([out.double(), lse.double(), *torch.autograd.grad((out * weights).sum(), inputs)])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
