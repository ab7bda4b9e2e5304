"""The four passes of mHC against a slow twin of a whole sub-layer; dtypes and the direction of H_res."""

from __future__ import annotations

import pytest
import torch

from elastic_moe.model.residual import mhc
from elastic_moe.model.residual.blocked import BlockedKernels
from elastic_moe.model.residual.eager import EagerKernels, FusableKernels
from tests.unit.model.residual.twins import example, reference

FORMS = [EagerKernels(), FusableKernels(), BlockedKernels()]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
@pytest.mark.parametrize(("n", "width"), [(1, 6), (2, 5), (4, 8)])
def test_passes_equal_the_twin(form: EagerKernels, n: int, width: int) -> None:
    """Two sub-layers in one segment, so that the second one's streams are made again; values and every gradient."""
    x, weights, settings = example(n, width, torch.float32)
    f = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh())
    out_grad = torch.randn((7, n, width), generator=torch.Generator().manual_seed(9))
    inputs = [x, *weights, *f.parameters()]

    def fast() -> torch.Tensor:
        segment, streams = mhc.Segment(form, 2), x
        for _ in range(2):
            streams, h, link = mhc.read(streams, weights, settings, segment)
            streams = mhc.write(streams, f(h), link)
        return streams

    ours, theirs = fast(), reference(reference(x, weights, settings, f), weights, settings, f)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, out_grad), torch.autograd.grad(theirs, inputs, out_grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_streams_keep_their_dtype_and_coefficients_are_fp32() -> None:
    x, weights, settings = example(4, 8, torch.float32)
    form = EagerKernels()
    streams, h, link = mhc.read(x.detach().bfloat16().requires_grad_(), weights, settings, mhc.Segment(form, 1))
    out = mhc.write(streams, h, link)
    assert (streams.dtype, h.dtype, out.dtype) == (torch.bfloat16,) * 3
    assert link.res.dtype == link.post.dtype == torch.float32
    out.float().sum().backward()
    assert weights.proj.grad is not None
    assert weights.proj.grad.dtype == torch.float32


def test_direction_of_the_residual_matrix() -> None:
    """Element [i, j] leads from stream j to stream i: a cyclic shift moves stream 0 to stream 1."""
    form, n = EagerKernels(), 3
    shift = torch.zeros(1, n, n)
    for j in range(n):
        shift[0, (j + 1) % n, j] = 1.0
    x = torch.arange(n).float().view(1, n, 1)
    assert form.write(x, torch.zeros(1, 1), torch.zeros(1, n), shift).flatten().tolist() == [2.0, 0.0, 1.0]
