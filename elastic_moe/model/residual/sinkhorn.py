"""Sinkhorn-Knopp: positive matrices to doubly stochastic ones, differentiably.

Source: mHC (arXiv 2512.24880, equation 9): M_0 = exp(z), then M_t = rows(columns(M_{t-1})). So rows sum to 1 exactly,
and the error of a finite number of iterations shows in the columns. The first column normalisation of exp(z) is a
softmax, which cannot overflow.

With `eps` the steps are those of transformers' DeepSeek-V4, whose matrix is this one transposed: eps is added to the
first softmax and to every later sum. The backward pass is that of the unrolled iterations. It makes the iterates again,
so only z is saved.

Shapes: ... any, n streams; element [i, j] leads from stream j to stream i.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

COLUMNS, ROWS = -2, -1  # the axes to sum over to normalise columns and rows, where the matrix is the last two axes
Axes = tuple[int, int]


def _steps(iters: int, axes: Axes) -> list[int]:
    """Axes of the normalisations that follow the first softmax over columns."""
    columns, rows = axes
    return [rows, *([columns, rows] * (iters - 1))]


def iterate(z: torch.Tensor, iters: int, eps: float, axes: Axes = (COLUMNS, ROWS)) -> torch.Tensor:
    """The doubly stochastic matrix of the logits z.

    Args:
        z: logits [..., n, n].
        iters: iterations.
        eps: added to the first softmax and to every later sum.
        axes: the axes (to, from) of the matrix.
    """
    matrix = z.softmax(dim=axes[0]) + eps
    for axis in _steps(iters, axes):
        matrix = matrix / (matrix.sum(dim=axis, keepdim=True) + eps)
    return matrix


def iterate_backward(
    grad: torch.Tensor, z: torch.Tensor, iters: int, eps: float, axes: Axes = (COLUMNS, ROWS)
) -> torch.Tensor:
    """Gradient of `iterate` with respect to z, given that of its result."""
    soft = z.softmax(dim=axes[0])
    matrix, trail = soft + eps, []
    for axis in _steps(iters, axes):
        total = matrix.sum(dim=axis, keepdim=True) + eps
        matrix = matrix / total
        trail.append((matrix, total, axis))
    for matrix, total, axis in reversed(trail):
        grad = (grad - (grad * matrix).sum(dim=axis, keepdim=True)) / total
    return soft * (grad - (grad * soft).sum(dim=axes[0], keepdim=True))


class _Sinkhorn(torch.autograd.Function):
    """`iterate` on the last two axes; saves z alone."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
        ctx.save_for_backward(z)
        ctx.settings = (iters, eps)
        return iterate(z, iters, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (z,), (iters, eps) = ctx.saved_tensors, ctx.settings
        return iterate_backward(grads[0], z, iters, eps), None, None


def sinkhorn(z: torch.Tensor, iters: int, eps: float = 0.0) -> torch.Tensor:
    """Doubly stochastic matrices of the logits z [..., n, n]; differentiable once."""
    return _Sinkhorn.apply(z, iters, eps)
