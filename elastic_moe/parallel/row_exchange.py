"""The ways of the rows of one layer, to their slots and back, as autograd functions.

The backward pass of a way is the inverse permutation and the other way's exchange. The experts' own backward pass lies
between the two, and is measured there.

Shapes: T tokens, K experts per token, N = T * K rows sent, M rows computed here, D hidden.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.function import once_differentiable

from elastic_moe.parallel.transport import Transport


@dataclass(frozen=True)
class Route:
    """How the rows of one layer travel. Row n of the N is choice n % K of token n // K.

    Attributes:
        order_N, undo_N: rows in the order they are sent, by destination slot, and the inverse permutation.
        by_slot_M, by_source_M: from arrival order to slot order, and back.
        sent, arrived: rows to and from each rank.
        rows_RR: rows from each rank to each other, where the transport asks for them.
        num_choices: K.
        watch: measures the experts' backward pass.
    """

    order_N: torch.Tensor
    undo_N: torch.Tensor
    by_slot_M: torch.Tensor
    by_source_M: torch.Tensor
    sent: list[int]
    arrived: list[int]
    rows_RR: NDArray[np.int64] | None
    num_choices: int
    watch: BackwardWatch


def finish_own_work(tensor: torch.Tensor) -> None:
    """Wait for a GPU's own work: a rank's time in it is not to count as waiting for others."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


class BackwardWatch:
    """Measures the backward passes of a rank's experts: they lie between the ways of the rows' gradients.

    Args:
        exact: wait for a GPU's own work, so that all of it is counted.

    Attributes:
        seconds: of all passes since it was made.
    """

    def __init__(self, exact: bool) -> None:
        self.seconds, self._since_s, self._exact = 0.0, 0.0, exact

    def begin(self) -> None:
        """The gradients of the outputs are here."""
        self._since_s = time.perf_counter()

    def end(self, grad_MD: torch.Tensor) -> None:
        """The gradients of the rows are computed, or on a GPU soon."""
        if self._exact:
            finish_own_work(grad_MD)
        self.seconds += time.perf_counter() - self._since_s


def _dispatch(transport: Transport, rows_ND: torch.Tensor, route: Route) -> torch.Tensor:
    """Rows in sending order -> rows in slot order at their slots."""
    return transport(rows_ND, route.sent, route.arrived, route.rows_RR)[route.by_slot_M]


def _combine(transport: Transport, rows_MD: torch.Tensor, route: Route) -> torch.Tensor:
    """Rows in slot order -> rows in (token, choice) order at their origin."""
    back_RR = None if route.rows_RR is None else route.rows_RR.T
    return transport(rows_MD[route.by_source_M], route.arrived, route.sent, back_RR)[route.undo_N]


class ToSlots(torch.autograd.Function):
    """x_TD -> rows in slot order.

    `anchor` requires a gradient, so that every rank joins the backward collectives or none.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, anchor: torch.Tensor, transport: Transport, route: Route) -> torch.Tensor:
        ctx.transport, ctx.route = transport, route
        return _dispatch(transport, x_TD[route.order_N // route.num_choices], route)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        ctx.route.watch.end(grad_MD)
        grad_ND = _combine(ctx.transport, grad_MD, ctx.route)
        return grad_ND.view(-1, ctx.route.num_choices, grad_ND.shape[1]).sum(dim=1), None, None, None


class FromSlots(torch.autograd.Function):
    """Rows in slot order -> rows in (token, choice) order at their origin."""

    @staticmethod
    def forward(ctx: Any, y_MD: torch.Tensor, transport: Transport, route: Route) -> torch.Tensor:
        ctx.transport, ctx.route = transport, route
        return _combine(transport, y_MD, route)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        finish_own_work(grad_ND)
        grad_MD = _dispatch(ctx.transport, grad_ND[ctx.route.order_N], ctx.route)
        ctx.route.watch.begin()
        return grad_MD, None, None
