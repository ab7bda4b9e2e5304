"""Rows of the experts to tokens: the gather that sends tokens to rows, and the gated sum that brings rows back.

The backward passes are written out: that of a gather is a sum over known rows, where autograd would scatter and add.

Shapes: N = T * K rows in the order of their experts, T tokens, K experts per token, D hidden.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable


class RoutedSums(Protocol):
    """The sum over the rows of each token, and its backward pass."""

    def forward(self, rows_ND: torch.Tensor, place_TK: torch.Tensor, gates_TK: torch.Tensor | None) -> torch.Tensor:
        """y_TD, in the dtype of the rows.

        Args:
            rows_ND: rows, contiguous.
            place_TK: int64, the row of each choice of each token, contiguous.
            gates_TK: weight of each; None for 1.
        """
        ...

    def backward(
        self, grad_TD: torch.Tensor, rows_ND: torch.Tensor, place_TK: torch.Tensor, gates_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of rows and gates, from that of the sum. Every row belongs to one token."""
        ...


class PlainSums:
    """`RoutedSums` in plain torch, on any device."""

    def forward(self, rows_ND: torch.Tensor, place_TK: torch.Tensor, gates_TK: torch.Tensor | None) -> torch.Tensor:
        rows_TKD = rows_ND[place_TK]
        if gates_TK is None:
            return rows_TKD.sum(dim=1)
        return torch.bmm(gates_TK.to(rows_ND.dtype).unsqueeze(1), rows_TKD).squeeze(1)

    def backward(
        self, grad_TD: torch.Tensor, rows_ND: torch.Tensor, place_TK: torch.Tensor, gates_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        d_rows = torch.empty_like(rows_ND)
        d_rows[place_TK] = gates_TK.to(rows_ND.dtype).unsqueeze(2) * grad_TD.unsqueeze(1)
        d_gates = torch.bmm(rows_ND[place_TK], grad_TD.unsqueeze(2)).squeeze(2)
        return d_rows, d_gates.to(gates_TK.dtype)


class Gather(torch.autograd.Function):
    """x_TD -> the rows of every choice, in the order of their experts."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, order_N: torch.Tensor, place_TK: torch.Tensor, sums: RoutedSums
    ) -> torch.Tensor:
        ctx.save_for_backward(place_TK)
        ctx.sums = sums
        return x_TD[order_N // place_TK.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.sums.forward(grads[0].contiguous(), ctx.saved_tensors[0], None), None, None, None


class Combine(torch.autograd.Function):
    """The gated sum of each token's rows."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: torch.Tensor, place_TK: torch.Tensor, gates_TK: torch.Tensor, sums: RoutedSums
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_ND, place_TK, gates_TK)
        ctx.sums = sums
        return sums.forward(rows_ND, place_TK, gates_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor, None]:
        d_rows, d_gates = ctx.sums.backward(grads[0].contiguous(), *ctx.saved_tensors)
        return d_rows, None, d_gates, None
