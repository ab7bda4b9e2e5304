"""Manifold-constrained hyper-connections: the arithmetic, forward and backward, with the streams kept only where asked.

Source: mHC (arXiv 2512.24880): equations 7 to 9, the order of operations of section 4.3.1 (the norm's division after the product), and the
recomputation of section 4.3.2. One sub-layer F of n streams X is

    h = H_pre X,   X' = H_res X + H_post^T F(h)          H_pre = sigmoid(.) [n], H_post = 2 sigmoid(.) [n], H_res = sinkhorn(.) [n, n]

`_Read` makes h and the coefficients, `_Write` makes X'. Both need X again in the backward pass. They ask a `Segment` for it, which keeps the streams before its
first sub-layer, and each sub-layer's output and coefficients, and makes the streams in between again: n + 2n + n^2 small numbers and one C-wide
vector per token and sub-layer, in place of n C-wide ones. F is never run again.

The streams' gradient passes from `_Write` through `_Read` (its first output is X itself), so it is summed where it is formed.
The passes are a `Kernels`: plain torch and a form that compilers fuse are here, others in blocked.py and mhc_triton.py, and kernels.py chooses.

Shapes: T tokens, n streams, C hidden, k = 2n + n^2 coefficients, laid out [pre (n) | post (n) | res (n^2, row by row)].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from elastic_moe.model.residual.sinkhorn import iterate, iterate_backward


@dataclass(frozen=True, slots=True)
class MixSettings:
    """Attributes: streams n; Sinkhorn iterations; eps beside H_pre and in Sinkhorn; eps of the norm."""

    streams: int
    iters: int
    eps: float
    norm_eps: float


class Kernels(Protocol):
    """One way to compute the four passes of a sub-layer's mix."""

    def read(
        self, x: torch.Tensor, proj: torch.Tensor, base: torch.Tensor, gates: torch.Tensor, settings: MixSettings
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def read_backward(
        self,
        x: torch.Tensor,
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        saved: tuple[torch.Tensor, torch.Tensor],
        weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        settings: MixSettings,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def write(self, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor) -> torch.Tensor: ...

    def write_backward(
        self, grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]: ...


def _logits(u: torch.Tensor, r: torch.Tensor, base: torch.Tensor, gates: torch.Tensor, n: int) -> torch.Tensor:
    """z_Tk = u / norm, scaled by each part's gate, plus the static part."""
    return u * r * spread_gates(gates, n) + base


def spread_gates(gates: torch.Tensor, n: int) -> torch.Tensor:
    """The three gates, each repeated over its part of the coefficients."""
    return torch.cat((gates[0].expand(n), gates[1].expand(n), gates[2].expand(n * n)))


def gates_gradient(d_z: torch.Tensor, u: torch.Tensor, r: torch.Tensor, n: int) -> torch.Tensor:
    """Gradient of the three gates, from that of the logits."""
    by_gate = (d_z * u * r).sum(dim=0)
    return torch.stack((by_gate[:n].sum(), by_gate[n : 2 * n].sum(), by_gate[2 * n :].sum()))


class EagerKernels:
    """Plain torch, with batched products."""

    def collapse(self, pre: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[T, n], [T, n, C] -> [T, C]: the weighted sum of the streams."""
        return torch.bmm(pre.to(x.dtype).unsqueeze(1), x).squeeze(1)

    def mix(self, res: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[T, n, n], [T, n, C] -> [T, n, C]."""
        return torch.bmm(res.to(x.dtype), x)

    def along(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[T, i, C], [T, j, C] -> fp32 [T, i, j]: inner products over C."""
        return torch.bmm(a, b.transpose(1, 2)).float()

    def read(
        self, x: torch.Tensor, proj: torch.Tensor, base: torch.Tensor, gates: torch.Tensor, settings: MixSettings
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """X [T, n, C] -> h [T, C], post [T, n], res [T, n, n], and to save: u [T, k] and 1 / norm [T, 1]; all but h fp32."""
        n = settings.streams
        flat = x.flatten(1).float()
        u = F.linear(flat, proj)
        r = torch.rsqrt(flat.square().mean(dim=1, keepdim=True) + settings.norm_eps)
        z_pre, z_post, z_res = _logits(u, r, base, gates, n).split([n, n, n * n], dim=1)
        pre = z_pre.sigmoid() + settings.eps
        res = iterate(z_res.unflatten(1, (n, n)), settings.iters, settings.eps)
        return self.collapse(pre, x), 2 * z_post.sigmoid(), res, u, r

    def read_backward(
        self,
        x: torch.Tensor,
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        saved: tuple[torch.Tensor, torch.Tensor],
        weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        settings: MixSettings,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of (X, proj, base, gates), from those of (X passed on, h, post, res)."""
        n = settings.streams
        (d_x, d_h, d_post, d_res), (u, r), (proj, base, gates) = grads, saved, weights
        z_pre, z_post, z_res = _logits(u, r, base, gates, n).split([n, n, n * n], dim=1)
        pre, post = z_pre.sigmoid(), z_post.sigmoid()
        d_pre = self.along(d_h.unsqueeze(1), x).squeeze(1)
        d_z = torch.cat(
            (
                d_pre * pre * (1 - pre),
                2 * d_post * post * (1 - post),
                iterate_backward(d_res, z_res.unflatten(1, (n, n)), settings.iters, settings.eps).flatten(1),
            ),
            dim=1,
        )
        d_base = d_z.sum(dim=0)
        d_gates = gates_gradient(d_z, u, r, n)
        d_z = d_z * spread_gates(gates, n)
        d_u = d_z * r
        d_r = (d_z * u).sum(dim=1, keepdim=True)
        flat = x.flatten(1).float()
        d_proj = d_u.t() @ flat
        d_flat = d_u @ proj - flat * (d_r * r * r * r / flat.shape[1])
        d_pre_x = (pre + settings.eps).to(x.dtype).unsqueeze(2) * d_h.unsqueeze(1)
        return d_x + d_flat.view(x.shape).to(x.dtype) + d_pre_x, d_proj, d_base, d_gates

    def write(self, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        """X' [T, n, C] = res X + post y."""
        return torch.baddbmm(post.to(x.dtype).unsqueeze(2) * y.unsqueeze(1), res.to(x.dtype), x)

    def write_backward(
        self, grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of (X, y, post, res)."""
        d_post = self.along(grad, y.unsqueeze(1)).squeeze(2)
        return self.mix(res.transpose(1, 2), grad), self.collapse(post, grad), d_post, self.along(grad, x)


class FusableKernels(EagerKernels):
    """The same as sums over products, which a compiler turns into loops that read each stream once."""

    def collapse(self, pre: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (pre.unsqueeze(2) * x.float()).sum(dim=1).to(x.dtype)

    def mix(self, res: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (res.unsqueeze(3) * x.float().unsqueeze(1)).sum(dim=2).to(x.dtype)

    def along(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.float().unsqueeze(2) * b.float().unsqueeze(1)).sum(dim=3)

    def write(self, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        mixed = (res.unsqueeze(3) * x.float().unsqueeze(1)).sum(dim=2)
        return (mixed + post.unsqueeze(2) * y.float().unsqueeze(1)).to(x.dtype)


class Segment:
    """Consecutive sub-layers whose streams are kept once, before the first, and made again in the backward pass.

    Args:
        kernels: make the streams again.
        length: sub-layers; with one, nothing is made again.
    """

    def __init__(self, kernels: Kernels, length: int) -> None:
        self._kernels, self._length = kernels, length
        self._first: torch.Tensor | None = None
        self._links: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._made: dict[int, torch.Tensor] = {}
        self._entered = 0

    @property
    def is_full(self) -> bool:
        return self._entered == self._length

    def enter(self, x: torch.Tensor) -> int:
        """Begin the next sub-layer with these streams. Returns its index."""
        if self._entered == 0:
            self._first = x
        self._entered += 1
        return self._entered - 1

    def leave(self, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor) -> None:
        """End the sub-layer with its output and coefficients."""
        self._links.append((y, post, res))

    def streams(self, index: int) -> torch.Tensor:
        """The streams before a sub-layer. The first call makes those of all sub-layers of the segment."""
        assert self._first is not None
        if index == 0:
            return self._first
        if index not in self._made:
            x = self._first
            for at, link in enumerate(self._links[:index]):
                x = self._kernels.write(x, *link)
                self._made[at + 1] = x
        return self._made[index]

    def done(self, index: int) -> None:
        """The backward pass needs these streams no more."""
        self._made.pop(index, None)


class Weights(NamedTuple):
    """Attributes: proj [k, n C], base [k], gates [3]; fp32."""

    proj: torch.Tensor
    base: torch.Tensor
    gates: torch.Tensor


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        proj: torch.Tensor,
        base: torch.Tensor,
        gates: torch.Tensor,
        settings: MixSettings,
        kernels: Kernels,
        segment: Segment,
        index: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        h, post, res, u, r = kernels.read(x, proj, base, gates, settings)
        ctx.save_for_backward(proj, base, gates, u, r)
        ctx.rest = (settings, kernels, segment, index)
        return x.view_as(x), h, post, res

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        proj, base, gates, u, r = ctx.saved_tensors
        settings, kernels, segment, index = ctx.rest
        d_x, d_h, d_post, d_res = (grad.contiguous() for grad in grads)
        out = kernels.read_backward(
            segment.streams(index), (d_x, d_h, d_post, d_res), (u, r), (proj, base, gates), settings
        )
        segment.done(index)
        return *out, None, None, None, None


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor,
        post: torch.Tensor,
        res: torch.Tensor,
        kernels: Kernels,
        segment: Segment,
        index: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(y, post, res)
        ctx.rest = (kernels, segment, index)
        return kernels.write(x, y, post, res)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, post, res = ctx.saved_tensors
        kernels, segment, index = ctx.rest
        out = kernels.write_backward(grads[0].contiguous(), segment.streams(index), y, post, res)
        return *out, None, None, None


class Link(NamedTuple):
    """What a sub-layer's write needs from its read: coefficients, and where the streams are kept."""

    post: torch.Tensor
    res: torch.Tensor
    segment: Segment
    index: int


def read(
    x: torch.Tensor, weights: Weights, settings: MixSettings, kernels: Kernels, segment: Segment
) -> tuple[torch.Tensor, torch.Tensor, Link]:
    """Streams [T, n, C] -> (the same streams, h [T, C], link). Use the streams returned, not those passed."""
    index = segment.enter(x.detach())
    x, h, post, res = _Read.apply(x, *weights, settings, kernels, segment, index)
    return x, h, Link(post, res, segment, index)


def write(x: torch.Tensor, y: torch.Tensor, link: Link, kernels: Kernels) -> torch.Tensor:
    """Streams after the sub-layer whose output is y [T, C]."""
    y = y.to(x.dtype)
    link.segment.leave(y.detach(), link.post.detach(), link.res.detach())
    return _Write.apply(x, y, link.post, link.res, kernels, link.segment, link.index)


def best_segment(num_sublayers: int, streams: int) -> int:
    """Sub-layers per segment that keep the least: about sqrt(n L / (n + 2)) (section 4.3.2)."""

    def kept(length: int) -> int:
        return streams * math.ceil(num_sublayers / length) + (streams + 2) * length

    return min(range(1, num_sublayers + 1), key=kept)
