"""Slow twins of mHC for the tests, and small random inputs."""

from __future__ import annotations

import torch

from elastic_moe.model.residual import mhc
from elastic_moe.model.residual.eager import MixSettings


def unrolled(z: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    """Slow twin: the paper's iterations from exp, with transformers' eps."""
    matrix = z.exp() / z.exp().sum(dim=-2, keepdim=True) + eps
    matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + eps)
    for _ in range(iters - 1):
        matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + eps)
    return matrix


def reference(x: torch.Tensor, weights: mhc.Weights, settings: MixSettings, f: torch.nn.Module) -> torch.Tensor:
    """Slow twin of a whole sub-layer, for autograd: equations 7 to 9 as they stand, one stream at a time."""
    n = settings.streams
    flat = x.flatten(1).float()
    normed = flat / (flat.square().mean(dim=1, keepdim=True) + settings.norm_eps).sqrt()
    z = normed @ weights.proj.t()
    pre = torch.sigmoid(weights.alphas[0] * z[:, :n] + weights.base[:n]) + settings.eps
    post = 2 * torch.sigmoid(weights.alphas[1] * z[:, n : 2 * n] + weights.base[n : 2 * n])
    res = unrolled(
        (weights.alphas[2] * z[:, 2 * n :] + weights.base[2 * n :]).view(-1, n, n), settings.iters, settings.eps
    )
    y = f(sum(pre[:, i, None] * x[:, i] for i in range(n)))
    return torch.stack(
        [sum(res[:, i, j, None] * x[:, j] for j in range(n)) + post[:, i, None] * y for i in range(n)], dim=1
    )


def example(n: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, mhc.Weights, MixSettings]:
    generator = torch.Generator().manual_seed(n)
    k = 2 * n + n * n
    weights = mhc.Weights(
        *(
            torch.randn(shape, generator=generator).mul_(0.5).to(dtype).requires_grad_()
            for shape in ((k, n * width), (k,), (3,))
        )
    )
    x = torch.randn((7, n, width), generator=generator).to(dtype).requires_grad_()
    return x, weights, MixSettings(n, 5, 1e-4, 1e-6)
