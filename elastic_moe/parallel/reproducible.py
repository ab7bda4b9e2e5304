"""Sums whose bits do not depend on the ranks that compute the shares: the arithmetic of `elastic.reproducible`.

fp32 addition is not associative. A gradient summed by four workers differs in its last bits from the same gradient
summed by three. Near ties of two experts are then decided differently, and the runs part.

Here the micro-batch is the unit of computation. It has the same sequences on any rank, and its matrix products have the
same shapes. Its contribution is rounded to a common grid of fp64 before it is added. Sums of multiples of one power of
two are exact as long as they fit into 53 bits, so their order does not matter. (Pre-rounding: Demmel and Nguyen, "Fast
reproducible floating-point summation", ARITH 2013, with a fixed grid in place of one from a first pass over the data.)

A segment is the rows that one micro-batch sends to one expert.

Shapes: M rows, S slots, D hidden, F expert hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from elastic_moe.model.layers import compute_dtype, swiglu, swiglu_backward

RANGE_BITS = 8  # elements of the mean gradient up to 2**7 are summed exactly; AdamW normalises far smaller ones


class Grid:
    """Multiples of 2**(RANGE_BITS - 52) of the mean gradient, in units of the gradient's sum over tokens.

    Larger elements stay correct to fp64; only their independence of the order is lost.

    Args:
        tokens: tokens of a global batch.
    """

    def __init__(self, tokens: int) -> None:
        self._shift = 1.5 * 2.0 ** (math.ceil(math.log2(max(tokens, 1))) + RANGE_BITS)

    def add(self, total: torch.Tensor, part: torch.Tensor) -> None:
        """Add `part` to the fp64 `total`, rounded to the grid: adding a large constant pushes the bits below it out."""
        total.add_(part.double().add_(self._shift).sub_(self._shift))


Weights = tuple[torch.Tensor, torch.Tensor]


class _SegmentedSwiglu(torch.autograd.Function):
    """SwiGLU segment by segment; weight gradients go to fp64 sums on the grid and not to autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: torch.Tensor,
        segments: list[tuple[int, int]],
        weights: Weights,
        sums: Weights,
        grid: Grid,
        limit: float,
        remake: bool,
    ) -> torch.Tensor:
        # Every operand is a copy of its own: BLAS may choose its kernel by a pointer's alignment.
        xs = [x.clone() for x in x_MD.split([rows for _, rows in segments])]
        w_gate_up_SGD, w_down_SDF = weights
        hidden = [x @ w_gate_up_SGD[slot].T for x, (slot, _) in zip(xs, segments, strict=True)]
        out: list[torch.Tensor] = []
        for gate_up, (slot, _) in zip(hidden, segments, strict=True):
            gate, up = gate_up.chunk(2, dim=1)
            out.append(swiglu(gate, up, limit) @ w_down_SDF[slot].T)
        ctx.saved = (xs, None if remake else hidden, segments, weights, sums, grid, limit)
        return torch.cat(out) if out else x_MD.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None, None]:
        xs, kept, segments, (w_gate_up_SGD, w_down_SDF), sums, grid, limit = ctx.saved
        hidden = kept or [x @ w_gate_up_SGD[slot].T for x, (slot, _) in zip(xs, segments, strict=True)]
        back: list[torch.Tensor] = []
        grads = grad_MD.split([rows for _, rows in segments])
        for dy, x, gate_up, (slot, _) in zip(grads, xs, hidden, segments, strict=True):
            dy = dy.clone()
            rows, d_gate_up = swiglu_backward(dy @ w_down_SDF[slot], gate_up, limit)
            grid.add(sums[0][slot], d_gate_up.T @ x)
            grid.add(sums[1][slot], dy.T @ rows)
            back.append(d_gate_up @ w_gate_up_SGD[slot])
        return torch.cat(back) if back else grad_MD.clone(), None, None, None, None, None, None


def segmented_swiglu(
    x_MD: torch.Tensor,
    segments: Sequence[tuple[int, int]],
    weights: Weights,
    sums: Weights,
    grid: Grid,
    limit: float = 0.0,
    remake: bool = False,
) -> torch.Tensor:
    """Twin of `grouped_swiglu` that computes each segment by itself.

    Args:
        x_MD: rows, segment after segment.
        segments: (slot, rows) of each segment.
        weights: (gate above up [S, 2F, D], down [S, D, F]).
        sums: fp64 tensors of the same shapes, to which the backward pass adds the weights' gradients.
        grid: of the sums.
        limit: clamp of the SwiGLU's inputs; 0 for none.
        remake: the backward pass makes the products of gate and up again, which are then not kept.

    Returns:
        y_MD in the dtype of x. Under autocast the products run in autocast's dtype.
    """
    dtype, compute = x_MD.dtype, compute_dtype(x_MD)
    used = [(slot, rows) for slot, rows in segments if rows]
    cast = (weights[0].detach().to(compute), weights[1].detach().to(compute))
    return _SegmentedSwiglu.apply(x_MD.to(compute), used, cast, sums, grid, limit, remake).to(dtype)
