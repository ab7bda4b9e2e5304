"""The four passes of mHC in plain torch, and the interface that every form of them implements.

Forward, `read` makes a sub-layer's input and the coefficients from the streams, and `write` makes the streams after the
sub-layer. Each has its backward pass. `EagerKernels` is the slow, obvious form that the others are tested against;
`FusableKernels` is written for a compiler. Other forms: blocked.py (CPUs) and triton.py (GPUs).

Names: u = X proj^T, and r = 1 / rms(X), the reciprocal norm of a token's streams together. The logits are
z = alpha r u + base, with one factor alpha for each part (the paper's alpha_pre, alpha_post and alpha_res; in
checkpoints the parameter is called `gates`).

Shapes: T tokens, n streams, C hidden, k = 2n + n^2 coefficients, laid out [pre (n) | post (n) | res (n^2, row by row)].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from elastic_moe.model.residual.sinkhorn import iterate, iterate_backward

ReadOutput = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # h, post, res, u, r
Saved = tuple[torch.Tensor, torch.Tensor]  # u, r
MixWeights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # proj, base, alphas
FourGradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class MixSettings:
    """Constants of the mix.

    Attributes:
        streams: n.
        iters: iterations of Sinkhorn.
        eps: added to H_pre, and in Sinkhorn to the first softmax and to every sum.
        norm_eps: added to the mean square under the norm's root.
    """

    streams: int
    iters: int
    eps: float
    norm_eps: float


class Kernels(Protocol):
    """One way to compute the four passes of a sub-layer's mix. Streams may be of any float type; the rest is fp32."""

    def read(
        self, x: torch.Tensor, proj: torch.Tensor, base: torch.Tensor, alphas: torch.Tensor, settings: MixSettings
    ) -> ReadOutput:
        """Make a sub-layer's input and coefficients.

        Args:
            x: streams [T, n, C].
            proj: [k, n C].
            base: [k].
            alphas: [3], the factors of pre, post and res.
            settings: constants.

        Returns:
            h [T, C] in the dtype of x, post [T, n], res [T, n, n], and for the backward pass u [T, k] and r [T, 1].
        """
        ...

    def read_backward(
        self, x: torch.Tensor, grads: FourGradients, saved: Saved, weights: MixWeights, settings: MixSettings
    ) -> FourGradients:
        """Backward pass of `read`.

        Args:
            x: streams [T, n, C].
            grads: gradients of (the streams passed on, h, post, res).
            saved: (u, r) from `read`.
            weights: (proj, base, alphas).
            settings: constants.

        Returns:
            Gradients of (x, proj, base, alphas); that of x includes the gradient of the streams passed on.
        """
        ...

    def write(self, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        """Streams after the sub-layer, res x + post y: [T, n, C], from the sub-layer's output y [T, C]."""
        ...

    def write_backward(
        self, grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor
    ) -> FourGradients:
        """Gradients of (x, y, post, res), given the gradient of the result of `write`."""
        ...


def _logits(u: torch.Tensor, r: torch.Tensor, base: torch.Tensor, alphas: torch.Tensor, n: int) -> torch.Tensor:
    """z [T, k]."""
    return u * r * expand_alphas(alphas, n) + base


def expand_alphas(alphas: torch.Tensor, n: int) -> torch.Tensor:
    """[k]: each of the three factors, repeated over its part of the coefficients."""
    return torch.cat((alphas[0].expand(n), alphas[1].expand(n), alphas[2].expand(n * n)))


def alphas_gradient(d_z: torch.Tensor, u: torch.Tensor, r: torch.Tensor, n: int) -> torch.Tensor:
    """Gradient [3] of the factors, given the gradient of the logits."""
    by_coefficient = (d_z * u * r).sum(dim=0)
    parts = (by_coefficient[:n], by_coefficient[n : 2 * n], by_coefficient[2 * n :])
    return torch.stack([part.sum() for part in parts])


class EagerKernels:
    """`Kernels` in plain torch, with batched products."""

    def collapse(self, pre: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[T, n], [T, n, C] -> [T, C]: the weighted sum of the streams."""
        return torch.bmm(pre.to(x.dtype).unsqueeze(1), x).squeeze(1)

    def mix(self, res: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[T, n, n], [T, n, C] -> [T, n, C]."""
        return torch.bmm(res.to(x.dtype), x)

    def inner(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[T, i, C], [T, j, C] -> fp32 [T, i, j]: inner products over C."""
        return torch.bmm(a, b.transpose(1, 2)).float()

    def read(
        self, x: torch.Tensor, proj: torch.Tensor, base: torch.Tensor, alphas: torch.Tensor, settings: MixSettings
    ) -> ReadOutput:
        n = settings.streams
        flat = x.flatten(1).float()
        u = F.linear(flat, proj)
        r = torch.rsqrt(flat.square().mean(dim=1, keepdim=True) + settings.norm_eps)
        z_pre, z_post, z_res = _logits(u, r, base, alphas, n).split([n, n, n * n], dim=1)
        pre = z_pre.sigmoid() + settings.eps
        res = iterate(z_res.unflatten(1, (n, n)), settings.iters, settings.eps)
        return self.collapse(pre, x), 2 * z_post.sigmoid(), res, u, r

    def read_backward(
        self, x: torch.Tensor, grads: FourGradients, saved: Saved, weights: MixWeights, settings: MixSettings
    ) -> FourGradients:
        n = settings.streams
        (d_x, d_h, d_post, d_res), (u, r), (proj, base, alphas) = grads, saved, weights
        z_pre, z_post, z_res = _logits(u, r, base, alphas, n).split([n, n, n * n], dim=1)
        pre, post = z_pre.sigmoid(), z_post.sigmoid()
        d_pre = self.inner(d_h.unsqueeze(1), x).squeeze(1)
        d_z = torch.cat(
            (
                d_pre * pre * (1 - pre),
                2 * d_post * post * (1 - post),
                iterate_backward(d_res, z_res.unflatten(1, (n, n)), settings.iters, settings.eps).flatten(1),
            ),
            dim=1,
        )
        d_base = d_z.sum(dim=0)
        d_alphas = alphas_gradient(d_z, u, r, n)
        d_z = d_z * expand_alphas(alphas, n)
        d_u = d_z * r
        d_r = (d_z * u).sum(dim=1, keepdim=True)
        flat = x.flatten(1).float()
        d_proj = d_u.t() @ flat
        d_flat = d_u @ proj - flat * (d_r * r * r * r / flat.shape[1])
        d_pre_x = (pre + settings.eps).to(x.dtype).unsqueeze(2) * d_h.unsqueeze(1)
        return d_x + d_flat.view(x.shape).to(x.dtype) + d_pre_x, d_proj, d_base, d_alphas

    def write(self, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(post.to(x.dtype).unsqueeze(2) * y.unsqueeze(1), res.to(x.dtype), x)

    def write_backward(
        self, grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor
    ) -> FourGradients:
        d_post = self.inner(grad, y.unsqueeze(1)).squeeze(2)
        return self.mix(res.transpose(1, 2), grad), self.collapse(post, grad), d_post, self.inner(grad, x)


class FusableKernels(EagerKernels):
    """The same as sums over products, which a compiler turns into loops that read each stream once."""

    def collapse(self, pre: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (pre.unsqueeze(2) * x.float()).sum(dim=1).to(x.dtype)

    def mix(self, res: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (res.unsqueeze(3) * x.float().unsqueeze(1)).sum(dim=2).to(x.dtype)

    def inner(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.float().unsqueeze(2) * b.float().unsqueeze(1)).sum(dim=3)

    def write(self, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        mixed = (res.unsqueeze(3) * x.float().unsqueeze(1)).sum(dim=2)
        return (mixed + post.unsqueeze(2) * y.float().unsqueeze(1)).to(x.dtype)
