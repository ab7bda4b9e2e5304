"""Cross-entropy of the head's logits, and their z-loss; large logits are never in memory as a whole.

The logits [N, V] are the largest tensor of a model with a large vocabulary, and plain torch has three of their size:
them, their logarithms after the softmax, and the gradient. `_ChunkedLoss` forms the logits of some rows at a time, and
makes from them at once the gradients of the hidden states and of the head, which are far smaller. So it has the same
products as the plain form and computes none of them twice. (The idea is that of Liger-Kernel's fused linear cross-
entropy, Hsu et al., arXiv 2410.10989, section 3.2.) Chunks depend on shapes alone, so the sums have the same order on
any rank.

The z-loss is z_weight * (log Z)^2 per target, with Z the sum of the exponentials of the logits. It keeps log Z near 0
(PaLM, Chowdhery et al., arXiv 2204.02311, section 5).

Shapes: N targets, D hidden, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from elastic_moe.model.layers import compute_dtype

FEWEST_ROWS = {"cpu": 256, "cuda": 1024}  # of a chunk: products of fewer rows read the head's weight too often


class HeadLoss(NamedTuple):
    """Sums over the targets.

    Attributes:
        total: the value to differentiate: cross-entropy plus the weighted z-loss.
        ce_sum: cross-entropy in nats, detached.
        z_sum: squares of log Z, detached; 0 if the z-loss has no weight.
    """

    total: torch.Tensor
    ce_sum: torch.Tensor
    z_sum: torch.Tensor


def head_loss(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, z_weight: float, max_bytes: float
) -> HeadLoss:
    """Loss of the head's logits, `hidden @ weight^T`. Under autocast the products run in autocast's dtype.

    Args:
        hidden_ND: hidden states; N may be 0.
        weight_VD: the head's weight.
        targets_N: int64.
        z_weight: weight of the z-loss.
        max_bytes: fp32 logits that may be formed at once; more are computed in chunks; 0 for no limit.
    """
    rows = chunk_rows(max_bytes, weight_VD.shape[0], hidden_ND.device.type)
    if not rows or len(hidden_ND) <= rows:
        return _whole(F.linear(hidden_ND, weight_VD).float(), targets_N, z_weight)
    dtype = compute_dtype(hidden_ND)
    grads = torch.is_grad_enabled()
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return HeadLoss(*_ChunkedLoss.apply(hidden_ND.to(dtype), weight_VD, targets_N, z_weight, rows, grads))


def chunk_rows(max_bytes: float, vocabulary: int, kind: str) -> int:
    """Rows whose fp32 logits fit into so many bytes, but no fewer than a device of this kind needs; 0 for no limit."""
    return max(FEWEST_ROWS.get(kind, 1024), int(max_bytes // (4 * vocabulary))) if max_bytes else 0


def _whole(logits_NV: torch.Tensor, targets_N: torch.Tensor, z_weight: float) -> HeadLoss:
    """The plain form."""
    total = F.cross_entropy(logits_NV, targets_N, reduction="sum")
    ce_sum, z_sum = total.detach(), torch.zeros_like(total.detach())
    if z_weight:
        squares = logits_NV.logsumexp(dim=1).square().sum()
        total, z_sum = total + z_weight * squares, squares.detach()
    return HeadLoss(total, ce_sum, z_sum)


class _ChunkedLoss(torch.autograd.Function):
    """The loss chunk by chunk; the gradients are made in the forward pass if `grads`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        z_weight: float,
        rows: int,
        grads: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Arguments: hidden states in the compute dtype, the others as in `head_loss`, rows of a chunk."""
        weight = weight_VD.to(hidden_ND.dtype)
        d_hidden_ND = torch.empty_like(hidden_ND) if grads else None
        d_weight_VD = torch.zeros_like(weight_VD) if grads else None
        sums = torch.zeros(2, device=hidden_ND.device)
        logits_RV = hidden_ND.new_empty((min(rows, len(hidden_ND)), len(weight)))
        for part in _parts(len(hidden_ND), rows):
            x, targets = hidden_ND[part], targets_N[part].unsqueeze(1)
            logits = torch.mm(x, weight.t(), out=logits_RV[: len(x)]).float()
            log_p = logits.log_softmax(dim=1)
            at_target = log_p.gather(1, targets)
            log_z = logits.gather(1, targets) - at_target
            sums += torch.stack((-at_target.sum(), log_z.square().sum()))
            if d_hidden_ND is None or d_weight_VD is None:
                continue
            d_logits = log_p.exp_()
            if z_weight:
                d_logits.mul_(1.0 + 2.0 * z_weight * log_z)
            d_logits.scatter_(1, targets, d_logits.gather(1, targets) - 1.0)
            d_logits = d_logits.to(x.dtype)
            torch.mm(d_logits, weight, out=d_hidden_ND[part])
            if d_weight_VD.dtype == x.dtype:
                d_weight_VD.addmm_(d_logits.t(), x)
            else:
                d_weight_VD.add_(d_logits.t() @ x)
        ctx.grads = (d_hidden_ND, d_weight_VD)
        ce_sum, z_sum = sums[0].clone(), sums[1].clone() if z_weight else torch.zeros_like(sums[1])
        ctx.mark_non_differentiable(ce_sum, z_sum)
        return ce_sum + z_weight * z_sum, ce_sum, z_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden_ND, d_weight_VD = ctx.grads
        ctx.grads = None  # they are given away, and written to
        return d_hidden_ND.mul_(grads[0]), d_weight_VD.mul_(grads[0]), None, None, None, None


def _parts(num: int, rows: int) -> Iterator[slice]:
    """Slices of at most `rows` of so many targets."""
    for start in range(0, num, rows):
        yield slice(start, min(start + rows, num))
