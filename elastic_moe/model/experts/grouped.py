"""Arithmetic of the routed experts: SwiGLU over rows that are sorted by slot, and the weighted sum of the outputs.

A slot is a place for the weights of one expert. The caller decides which expert each slot holds.

The backward pass is written out, because the one that autograd derives moves the largest tensors too often. Each
`W[e]` would write a whole zero tensor [S, F, D], and the gradient of a stack would be made first and added afterwards.

Shapes: N routed rows, S slots, T tokens, K experts per token, D hidden, F expert hidden.
G = 2F: the rows of an expert's gate matrix, then those of its up matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from elastic_moe.model.experts.kernels import swiglu_kernels
from elastic_moe.model.layers import compute_dtype, swiglu


def grouped_swiglu(
    x_ND: torch.Tensor,
    counts_S: torch.Tensor,
    w_gate_up_SGD: torch.Tensor,
    w_down_SDF: torch.Tensor,
    limit: float = 0.0,
    direct: bool = False,
    remake: bool = False,
) -> torch.Tensor:
    """Slot s's SwiGLU on its rows of x, `down(silu(gate(x)) * up(x))`.

    Args:
        x_ND: rows sorted by slot.
        counts_S: int64 rows per slot, summing to N; zeros are fine. On a GPU they are best there: nothing waits then.
        w_gate_up_SGD, w_down_SDF: the slots' weights.
        limit: clamp of the SwiGLU's inputs; 0 for none.
        direct: the backward pass adds the weights' gradients to their `grad`, which must exist, and returns none to
            autograd. A stack of experts is the largest tensor of a layer; it is then written once, not three times.
        remake: the backward pass makes the products of gate and up again, which are then not kept.

    Returns:
        y_ND in the dtype of x. Under autocast the products run in autocast's dtype.
    """
    dtype, x = x_ND.dtype, x_ND.to(compute_dtype(x_ND))
    grad_sums = (w_gate_up_SGD.grad, w_down_SDF.grad) if direct else None
    with torch.autocast(x_ND.device.type, enabled=False):
        out = _GroupedSwiGLU.apply(x, counts_S, w_gate_up_SGD, w_down_SDF, limit, grad_sums, remake)
    return out.to(dtype)


class _Products:
    """Products of the slots' rows and weights: one call of `grouped_mm` where it applies, else a loop over the slots.

    On CPUs `grouped_mm` is such a loop itself. Our loop costs no more, and it can add to existing gradients. On GPUs
    `grouped_mm` is one kernel. Its conditions were found by measurement: bf16, and strides in multiples of 16 bytes.

    Attributes:
        swiglu: what is between the products.
    """

    def __init__(self, x_ND: torch.Tensor, counts_S: torch.Tensor, width: int) -> None:
        rows_fit = all(n * x_ND.element_size() % 16 == 0 for n in (x_ND.shape[1], width))
        self._grouped = x_ND.is_cuda and x_ND.dtype == torch.bfloat16 and rows_fit and len(x_ND) > 0
        self._offs = counts_S.to(x_ND.device).cumsum(0).to(torch.int32) if self._grouped else None
        self._counts: list[int] = [] if self._grouped else counts_S.tolist()
        self.swiglu = swiglu_kernels(x_ND.device)

    def rows(self, x: torch.Tensor, w_SKN: torch.Tensor) -> torch.Tensor:
        """[N, K], [S, K, N'] -> [N, N']."""
        if self._grouped:
            return F.grouped_mm(x.contiguous(), w_SKN, offs=self._offs)
        out = x.new_empty((len(x), w_SKN.shape[2]))
        for slot, (rows, target) in busy_slots(self._counts, x, out):
            torch.mm(rows, w_SKN[slot], out=target)
        return out

    def weights(self, a: torch.Tensor, b: torch.Tensor, to_SMK: torch.Tensor) -> None:
        """Add a^T b of each slot's rows, [N, M] and [N, K], to [S, M, K]."""
        if self._grouped:
            to_SMK.add_(F.grouped_mm(a.contiguous().t(), b.contiguous(), offs=self._offs))
            return
        for slot, (a_rows, b_rows) in busy_slots(self._counts, a, b):
            add_product(to_SMK[slot], a_rows, b_rows)


class _GroupedSwiGLU(torch.autograd.Function):
    """`grouped_swiglu` with x in the compute dtype; `grad_sums` are the tensors that get the weights' gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        counts_S: torch.Tensor,
        w_gate_up_SGD: torch.Tensor,
        w_down_SDF: torch.Tensor,
        limit: float,
        grad_sums: tuple[torch.Tensor, ...] | None,
        remake: bool,
    ) -> torch.Tensor:
        w_gate_up, w_down = w_gate_up_SGD.to(x_ND.dtype), w_down_SDF.to(x_ND.dtype)
        products = _Products(x_ND, counts_S, w_down.shape[2])
        gate_up_NG = products.rows(x_ND, w_gate_up.transpose(1, 2))
        y_ND = products.rows(products.swiglu.forward(gate_up_NG, limit), w_down.transpose(1, 2))
        ctx.save_for_backward(x_ND, None if remake else gate_up_NG, w_gate_up_SGD, w_down_SDF)
        ctx.rest = (products, limit, grad_sums)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_ND, gate_up_NG, *weights = ctx.saved_tensors
        products, limit, grad_sums = ctx.rest
        w_gate_up, w_down = (w.to(x_ND.dtype) for w in weights)
        if gate_up_NG is None:
            gate_up_NG = products.rows(x_ND, w_gate_up.transpose(1, 2))
        totals = [torch.zeros_like(w) for w in weights] if grad_sums is None else grad_sums
        d_y = grads[0].contiguous()
        hidden, d_gate_up = products.swiglu.backward(products.rows(d_y, w_down), gate_up_NG, limit)
        products.weights(d_gate_up, x_ND, totals[0])
        products.weights(d_y, hidden, totals[1])
        returned = (None, None) if grad_sums is not None else totals
        return products.rows(d_gate_up, w_gate_up), None, *returned, None, None, None


def count_of(ids_N: torch.Tensor, num: int) -> torch.Tensor:
    """How often each number below `num` is among the ids: int64 [num], on their device, without waiting for it."""
    if ids_N.device.type == "cpu":
        return torch.bincount(ids_N, minlength=num)
    return torch.zeros(num, dtype=torch.int64, device=ids_N.device).scatter_add_(0, ids_N, torch.ones_like(ids_N))


def busy_slots(counts: list[int], *tensors: torch.Tensor) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """Yield (slot, its rows of each tensor) for every slot that has rows; the tensors are sorted by slot."""
    for slot, rows in enumerate(zip(*(t.split(counts) for t in tensors), strict=True)):
        if counts[slot]:
            yield slot, rows


def add_product(total_MK: torch.Tensor, a_NM: torch.Tensor, b_NK: torch.Tensor) -> None:
    """total += a^T b, without a temporary where the types agree."""
    if total_MK.dtype == a_NM.dtype:
        total_MK.addmm_(a_NM.t(), b_NK)
    else:
        total_MK.add_(a_NM.t() @ b_NK)


def weighted_sum(y_TKD: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
    """Each token's expert outputs, weighted by its gates: [T, D] in the dtype of y, summed in fp32.

    The sum is a batched product, so no second tensor of the size of y is made.
    """
    with torch.autocast(y_TKD.device.type, enabled=False):
        return torch.bmm(gates_TK.to(y_TKD.dtype).unsqueeze(1), y_TKD).squeeze(1)


def loop_swiglu(
    x_ND: torch.Tensor,
    counts_S: torch.Tensor,
    w_gate_up_SGD: torch.Tensor,
    w_down_SDF: torch.Tensor,
    limit: float = 0.0,
) -> torch.Tensor:
    """Slow twin of `grouped_swiglu`: one slot after another, for any shape, dtype and number of slots (0 too)."""
    if w_down_SDF.shape[0] == 0:
        return x_ND.clone()  # no slots, hence no rows; the result stays in the graph
    outputs = []
    for slot, x in enumerate(x_ND.split(counts_S.tolist())):
        gate, up = F.linear(x, w_gate_up_SGD[slot]).chunk(2, dim=1)
        outputs.append(F.linear(swiglu(gate, up, limit), w_down_SDF[slot]))
    return torch.cat(outputs)
