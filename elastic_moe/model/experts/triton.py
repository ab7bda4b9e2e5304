"""Kernels of the routed experts on GPUs, by Triton: SwiGLU of sorted rows, and the sums that bring rows to tokens.

Each reads and writes its tensors once. The plain torch forms are `layers.swiglu`, `layers.swiglu_backward` and
`routed_sum.PlainSums`, and the tests run both.

Shapes: N = T * K rows in the order of their experts, T tokens, K experts per token, D hidden, F expert hidden.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# (Triton compiles the kernels' bodies, and declares the compile-time arguments as its own type.)

from __future__ import annotations

import torch
import triton
import triton.language as tl


def _block(width: int) -> int:
    """Channels per program."""
    return min(triton.next_power_of_2(width), 1024)


@triton.jit
def _load_gate_up(gate_up_ptr, at, width, inside, limit, LIMITED: tl.constexpr):
    """Gate and up of a row's channels, clamped, and whether they were inside the limit."""
    gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + width + at, mask=inside, other=0.0).to(tl.float32)
    gate_in, up_in = gate == gate, up == up
    if LIMITED:
        gate_in, up_in = gate <= limit, tl.abs(up) <= limit
        gate, up = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit)
    return gate, up, gate_in, up_in


@triton.jit
def _swiglu(gate_up_ptr, out_ptr, width, limit, LIMITED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate, up, _, _ = _load_gate_up(gate_up_ptr + row * 2 * width, at, width, inside, limit, LIMITED)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    grad_ptr, gate_up_ptr, out_ptr, d_gate_up_ptr, width, limit, LIMITED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate, up, gate_in, up_in = _load_gate_up(gate_up_ptr + row * 2 * width, at, width, inside, limit, LIMITED)
    grad = tl.load(grad_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    act = gate * sigmoid
    d_gate = tl.where(gate_in, grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), 0.0)
    d_up = tl.where(up_in, grad * act, 0.0)
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * width + at, (act * up).to(kind), mask=inside)
    tl.store(d_gate_up_ptr + row * 2 * width + at, d_gate.to(kind), mask=inside)
    tl.store(d_gate_up_ptr + row * 2 * width + width + at, d_up.to(kind), mask=inside)


@triton.jit
def _routed_sum(rows_ptr, place_ptr, gates_ptr, out_ptr, width, choices, GATED: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(choices):
        row = tl.load(place_ptr + token * choices + choice)
        values = tl.load(rows_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            values *= tl.load(gates_ptr + token * choices + choice)
        total += values
    tl.store(out_ptr + token * width + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _routed_sum_backward(  # noqa: PLR0913 - a kernel takes its pointers and sizes one by one
    grad_ptr, rows_ptr, place_ptr, gates_ptr, d_rows_ptr, d_gates_ptr, width, choices, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    for choice in range(choices):
        row = tl.load(place_ptr + token * choices + choice)
        gate = tl.load(gates_ptr + token * choices + choice)
        products = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < width
            grad = tl.load(grad_ptr + token * width + at, mask=inside, other=0.0).to(tl.float32)
            products += grad * tl.load(rows_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_rows_ptr + row * width + at, (gate * grad).to(d_rows_ptr.dtype.element_ty), mask=inside)
        tl.store(d_gates_ptr + token * choices + choice, tl.sum(products, axis=0))


def swiglu(gate_up_NG: torch.Tensor, limit: float) -> torch.Tensor:
    """As `layers.swiglu` of gate and up side by side, [N, 2F]; each value is rounded once."""
    num, width = gate_up_NG.shape[0], gate_up_NG.shape[1] // 2
    out, block = gate_up_NG.new_empty((num, width)), _block(width)
    if num:
        grid = (num, triton.cdiv(width, block))
        _swiglu[grid](gate_up_NG, out, width, limit, LIMITED=limit > 0, BLOCK=block)
    return out


def swiglu_backward(grad_NF: torch.Tensor, gate_up_NG: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `layers.swiglu_backward`."""
    (num, width), block = grad_NF.shape, _block(grad_NF.shape[1])
    out, d_gate_up = torch.empty_like(grad_NF), torch.empty_like(gate_up_NG)
    if num:
        grid = (num, triton.cdiv(width, block))
        _swiglu_backward[grid](grad_NF, gate_up_NG, out, d_gate_up, width, limit, LIMITED=limit > 0, BLOCK=block)
    return out, d_gate_up


class TritonSums:
    """`routed_sum.RoutedSums` by Triton."""

    def forward(self, rows_ND: torch.Tensor, place_TK: torch.Tensor, gates_TK: torch.Tensor | None) -> torch.Tensor:
        (tokens, choices), width = place_TK.shape, rows_ND.shape[1]
        out, block = rows_ND.new_empty((tokens, width)), _block(width)
        if tokens:
            grid, gated = (tokens, triton.cdiv(width, block)), gates_TK is not None
            _routed_sum[grid](rows_ND, place_TK, gates_TK, out, width, choices, GATED=gated, BLOCK=block)
        return out

    def backward(
        self, grad_TD: torch.Tensor, rows_ND: torch.Tensor, place_TK: torch.Tensor, gates_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (tokens, width), choices = grad_TD.shape, place_TK.shape[1]
        d_rows, d_gates = torch.empty_like(rows_ND), torch.empty_like(gates_TK)
        if tokens:
            args = (grad_TD, rows_ND, place_TK, gates_TK, d_rows, d_gates)
            _routed_sum_backward[(tokens,)](*args, width, choices, BLOCK=_block(width))
        return d_rows, d_gates
