"""Kernels of latent attention on GPUs, by Triton: heads made of a part without position and a rotated part.

Torch rotates, expands and concatenates in some twenty passes a layer; here each tensor is read and written once.

Shapes: B sequences, S positions, H heads, d width without position, r rotary width, W = d + r.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# ruff: noqa: PLR0913 - a kernel takes its pointers and sizes one by one
# (Triton compiles the kernels' bodies, and declares the compile-time arguments as its own type.)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable


@triton.jit
def _partners(j, ROPE: tl.constexpr, INTERLEAVE: tl.constexpr):
    """Of rotary channels: the other channel of the pair, the pair's index, and the sign of the other channel's part."""
    if INTERLEAVE:
        other, pair, sign = j ^ 1, j // 2, tl.where(j % 2 == 0, -1.0, 1.0)
    else:
        half: tl.constexpr = ROPE // 2
        other, pair, sign = (j + half) % ROPE, j % half, tl.where(j < half, -1.0, 1.0)
    return other, pair, sign


@triton.jit
def _join(
    plain_ptr, plain_b, plain_s, plain_h, turned_ptr, turned_b, turned_s, turned_h, cos_ptr, sin_ptr, out_ptr,
    positions, heads, way,
    PLAIN: tl.constexpr, ROPE: tl.constexpr, INTERLEAVE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = [plain | rotated], for all heads of a token; `way` is 1, or -1 to rotate back."""
    token = tl.program_id(0)
    sequence, position = (token // positions).to(tl.int64), token % positions
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    here, j = head < heads, at - PLAIN
    turns = (at >= PLAIN) & (at < PLAIN + ROPE)
    other, pair, sign = _partners(j, ROPE, INTERLEAVE)
    plain = plain_ptr + sequence * plain_b + position * plain_s + head * plain_h
    turned = turned_ptr + sequence * turned_b + position * turned_s + head * turned_h
    kept = tl.load(plain + at, mask=here & (at < PLAIN), other=0.0).to(tl.float32)
    x = tl.load(turned + j, mask=here & turns, other=0.0).to(tl.float32)
    y = tl.load(turned + other, mask=here & turns, other=0.0).to(tl.float32)
    table = position * (ROPE // 2) + pair
    cos, sin = tl.load(cos_ptr + table, mask=turns, other=0.0), tl.load(sin_ptr + table, mask=turns, other=0.0)
    value = tl.where(at < PLAIN, kept, x * cos + sign * way * y * sin)
    place = out_ptr + (token.to(tl.int64) * heads + head) * (PLAIN + ROPE) + at
    tl.store(place, value.to(out_ptr.dtype.element_ty), mask=here & (at < PLAIN + ROPE))


@triton.jit
def _shared_backward(
    grad_ptr, grad_b, grad_s, grad_h, cos_ptr, sin_ptr, out_ptr, positions, heads,
    PLAIN: tl.constexpr, ROPE: tl.constexpr, INTERLEAVE: tl.constexpr, HEADS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Gradient of the rotated part that all heads of a token share: summed over heads, and rotated back."""
    token = tl.program_id(0)
    sequence, position = (token // positions).to(tl.int64), token % positions
    head, j = tl.arange(0, HEADS)[:, None], tl.arange(0, TURNED)
    inside = j < ROPE
    other, pair, sign = _partners(j, ROPE, INTERLEAVE)
    grad = grad_ptr + sequence * grad_b + position * grad_s + head * grad_h + PLAIN
    mask = (head < heads) & inside[None, :]
    x = tl.sum(tl.load(grad + j[None, :], mask=mask, other=0.0).to(tl.float32), axis=0)
    y = tl.sum(tl.load(grad + other[None, :], mask=mask, other=0.0).to(tl.float32), axis=0)
    table = position * (ROPE // 2) + pair
    cos, sin = tl.load(cos_ptr + table, mask=inside, other=0.0), tl.load(sin_ptr + table, mask=inside, other=0.0)
    value = x * cos - sign * y * sin
    tl.store(out_ptr + token.to(tl.int64) * ROPE + j, value.to(out_ptr.dtype.element_ty), mask=inside)


def _joined(
    plain_BSHd: torch.Tensor, turned_BSHr: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], interleave: bool,
    way: float,
) -> torch.Tensor:  # fmt: skip
    """[B, S, H, d] and [B, S, H, r], whose last axes are contiguous -> [B, S, H, d + r]."""
    (batch, positions, heads, plain), rope = plain_BSHd.shape, turned_BSHr.shape[-1]
    out = plain_BSHd.new_empty((batch, positions, heads, plain + rope))
    if out.numel():
        _join[(batch * positions,)](
            plain_BSHd, *plain_BSHd.stride()[:3], turned_BSHr, *turned_BSHr.stride()[:3], *tables, out,
            positions, heads, way, PLAIN=plain, ROPE=rope, INTERLEAVE=interleave,
            HEADS=triton.next_power_of_2(heads), WIDTH=triton.next_power_of_2(plain + rope),
        )  # fmt: skip
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last axis is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


class TurnTail(torch.autograd.Function):
    """Heads [B, S, H, W] whose last channels are rotated by their position's angle."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleave = interleave
        return _turned_tail(x, (cos, sin), interleave, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned_tail(grads[0], (cos, sin), ctx.interleave, -1.0), None, None, None


def _turned_tail(
    x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], interleave: bool, way: float
) -> torch.Tensor:
    x, rope = _rows(x), 2 * tables[0].shape[-1]
    return _joined(x[..., :-rope], x[..., -rope:], tables, interleave, way)


class ExpandKeys(torch.autograd.Function):
    """Keys [B, S, H, d + r], and values [B, S, H, d + r] whose channels beyond their width are zero.

    Arguments: keys and values side by side [B, S, H, d + v]; the part that all heads share, [B, S, r], to be rotated.
    """

    @staticmethod
    def forward(
        ctx: Any, kv: torch.Tensor, shared: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plain: int,
        interleave: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        ctx.save_for_backward(cos, sin)
        ctx.rest = (kv.shape, plain, interleave)
        kv, shared = _rows(kv), _rows(shared)
        turned = shared.unsqueeze(2).expand(*kv.shape[:3], shared.shape[-1])
        keys = _joined(kv[..., :plain], turned, (cos, sin), interleave, 1.0)
        values = torch.nn.functional.pad(kv[..., plain:], (0, keys.shape[-1] - (kv.shape[-1] - plain)))
        return keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (cos, sin), (shape, plain, interleave) = ctx.saved_tensors, ctx.rest
        d_keys, d_values = _rows(grads[0]), grads[1]
        (batch, positions, heads, width), rope = shape, 2 * cos.shape[-1]
        d_kv = d_keys.new_empty(shape)
        d_kv[..., :plain].copy_(d_keys[..., :plain])
        d_kv[..., plain:].copy_(d_values[..., : width - plain])
        d_shared = d_keys.new_empty((batch, positions, rope))
        if d_shared.numel():
            _shared_backward[(batch * positions,)](
                d_keys, *d_keys.stride()[:3], cos, sin, d_shared, positions, heads, PLAIN=plain, ROPE=rope,
                INTERLEAVE=interleave, HEADS=triton.next_power_of_2(heads), TURNED=triton.next_power_of_2(rope),
            )  # fmt: skip
        return d_kv, d_shared, None, None, None, None
