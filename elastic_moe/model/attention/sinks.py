"""Attention with a sink: one more logit per head in the softmax's denominator, with no value behind it.

Source: gpt-oss (arXiv 2508.10925) and DeepSeek-V4 (arXiv 2606.19348); the logit is learned.

Fused kernels have no sink, but they can compute one. Let lse be the log-sum-exp of a row's scores, s the sink, and
lse' = log(exp(lse) + exp(s)). The weights p_j = exp(score_j - lse') are the kernel's own, scaled by exp(lse - lse').
So the forward pass scales the kernel's output. The kernel's backward pass forms p from the log-sum-exp it is given, and
subtracts (grad . output). So it is exact when it is given lse' and the scaled output. The sink's gradient is
-exp(s - lse') (grad . output).

Shapes: B sequences, H heads, S queries, L keys, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _FlashWithSink(torch.autograd.Function):
    """(output, lse') of attention whose keys are its values."""

    @staticmethod
    def forward(
        ctx: Any, q_BHSd: torch.Tensor, k_BLd: torch.Tensor, sink_H: torch.Tensor, bias: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k_BHLd = k_BLd.unsqueeze(1).expand(-1, q_BHSd.shape[1], -1, -1)
        out, lse = _FORWARD(q_BHSd, k_BHLd, k_BHLd, 0.0, False, attn_mask=bias, scale=scale)
        full = torch.logaddexp(lse, sink_H.to(lse.dtype)[:, None])
        out = out * (lse - full).exp().unsqueeze(-1).to(out.dtype)
        ctx.save_for_backward(q_BHSd, k_BLd, sink_H, bias, out, full)
        ctx.scale = scale
        ctx.mark_non_differentiable(full)
        return out, full

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_BHSd, k_BLd, sink_H, bias, out, full = ctx.saved_tensors
        grad = grads[0].contiguous()
        k_BHLd = k_BLd.unsqueeze(1).expand(-1, q_BHSd.shape[1], -1, -1)
        dq, dk, dv = _BACKWARD(grad, q_BHSd, k_BHLd, k_BHLd, out, full, 0.0, False, attn_mask=bias, scale=ctx.scale)
        weight_BHS = (sink_H.to(full.dtype)[:, None] - full).exp()
        along_BHS = (grad * out).sum(dim=-1, dtype=full.dtype)
        return dq, (dk + dv).sum(dim=1), -(weight_BHS * along_BHS).sum(dim=(0, 2)).to(sink_H.dtype), None, None


def sink_attention(
    q_BHSd: torch.Tensor, k_BLd: torch.Tensor, sink_H: torch.Tensor, seen: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all heads to one key per position, which is also the value, with a sink per head.

    Args:
        q_BHSd: queries.
        k_BLd: keys and values.
        sink_H: the sink's logit of each head.
        seen: bool [B or 1, 1, S, L]; every query sees at least one key.
        scale: factor on the scores.

    Returns:
        Output [B, H, S, d]; log of the softmax's denominator [B, H, S], without a gradient.
    """
    if q_BHSd.is_cuda or q_BHSd.numel() == 0:
        return sink_attention_plain(q_BHSd, k_BLd, sink_H, seen, scale)
    bias = torch.zeros(seen.shape, dtype=q_BHSd.dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
    return _FlashWithSink.apply(q_BHSd, k_BLd.to(q_BHSd.dtype), sink_H, bias.expand(len(q_BHSd), -1, -1, -1), scale)


def sink_attention_plain(
    q_BHSd: torch.Tensor, k_BLd: torch.Tensor, sink_H: torch.Tensor, seen: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slow twin of `sink_attention`, and its form on GPUs and for empty batches: it forms all scores."""
    scores = torch.einsum("bhsd,bld->bhsl", q_BHSd, k_BLd.to(q_BHSd.dtype)).float() * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    sink = sink_H.float()[None, :, None, None].expand(*scores.shape[:3], 1)
    logits = torch.cat((scores, sink), dim=-1)
    weights = logits.softmax(dim=-1)[..., :-1].to(q_BHSd.dtype)
    return torch.einsum("bhsl,bld->bhsd", weights, k_BLd.to(q_BHSd.dtype)), logits.logsumexp(dim=-1).detach()
