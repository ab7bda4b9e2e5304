"""mHC on CPUs: the four passes in blocks of tokens that stay in the cache.

The streams are the largest activation of a model (n times a hidden state). On a CPU their passes through memory are the
cost of mHC. Each pass here does all its work on a block of tokens while the block is in the cache. So a stream is read
from memory once or twice and written once.

Blocks are computed in fp32, for which CPUs have the faster small products. With bf16 streams the two products of the
gradient with the projection are bf16, like those of any other weight. The coefficients are small (24 numbers per token
for n = 4) and are made for all tokens at once. Their last axis is the token, so Sinkhorn's sums over n become sums of
long vectors.

Shapes: as in eager.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from elastic_moe.model.residual.eager import (
    EagerKernels,
    FourGradients,
    MixSettings,
    MixWeights,
    ReadOutput,
    Saved,
    alphas_gradient,
    expand_alphas,
)
from elastic_moe.model.residual.sinkhorn import iterate, iterate_backward

BLOCK_BYTES = 1 << 20  # of fp32 streams: about the size of a core's second-level cache
TOKEN_LAST = (0, 1)  # the axes (to, from) of matrices laid out [n, n, T]


def _blocks(x: torch.Tensor) -> Iterator[slice]:
    """Slices of the tokens of x, each about a cache's size for every thread."""
    size = max(1, BLOCK_BYTES * torch.get_num_threads() // (4 * x.shape[1] * x.shape[2]))
    for start in range(0, len(x), size):
        yield slice(start, min(start + size, len(x)))


class BlockedKernels(EagerKernels):
    """The passes of `EagerKernels`, block by block."""

    def read(
        self, x: torch.Tensor, proj: torch.Tensor, base: torch.Tensor, alphas: torch.Tensor, settings: MixSettings
    ) -> ReadOutput:
        n, width = settings.streams, x.shape[1] * x.shape[2]
        u, norm = x.new_empty((len(x), len(proj)), dtype=torch.float32), x.new_empty((len(x), 1), dtype=torch.float32)
        for block in _blocks(x):
            flat = x[block].flatten(1).float()
            torch.mm(flat, proj.t(), out=u[block])
            torch.linalg.vector_norm(flat, dim=1, keepdim=True, out=norm[block])
        r = torch.rsqrt(norm * norm / width + settings.norm_eps)
        z_pre, z_post, z_res = _coefficients(u, r, base, alphas, n)
        pre = z_pre.sigmoid() + settings.eps
        res = iterate(z_res, settings.iters, settings.eps, TOKEN_LAST)
        mixed, h = pre.t().contiguous().unsqueeze(1), x.new_empty((len(x), x.shape[2]))
        for block in _blocks(x):
            h[block] = torch.bmm(mixed[block], x[block].float()).squeeze(1)
        return h, 2 * z_post.sigmoid().t().contiguous(), res.permute(2, 0, 1).contiguous(), u, r

    def read_backward(
        self, x: torch.Tensor, grads: FourGradients, saved: Saved, weights: MixWeights, settings: MixSettings
    ) -> FourGradients:
        n = settings.streams
        (d_x, d_h, d_post, d_res), (u, r), (proj, base, alphas) = grads, saved, weights
        z_pre, z_post, z_res = _coefficients(u, r, base, alphas, n)
        pre, post = z_pre.sigmoid().t().contiguous(), z_post.sigmoid()
        d_z_post = 2 * d_post.t() * post * (1 - post)
        d_z_res = iterate_backward(d_res.permute(1, 2, 0).contiguous(), z_res, settings.iters, settings.eps, TOKEN_LAST)
        d_z = torch.cat((torch.empty_like(z_pre), d_z_post, d_z_res.flatten(0, 1))).t().contiguous()
        alphas_k = expand_alphas(alphas, n)
        d_proj, out = torch.zeros_like(proj), torch.empty_like(x)
        proj_as_x = proj.to(x.dtype)
        for block in _blocks(x):
            streams, into, own = x[block].float(), d_h[block].float().unsqueeze(1), pre[block]
            d_z[block, :n] = torch.bmm(into, streams.transpose(1, 2)).squeeze(1) * own * (1 - own)
            d_u = d_z[block] * alphas_k
            shrink = (d_u * u[block]).sum(dim=1) * r[block, 0] ** 3 / (n * x.shape[2])
            d_u = (d_u * r[block]).to(x.dtype)
            d_proj.add_(d_u.t() @ x[block].flatten(1))
            torch.addmm(d_x[block].flatten(1), d_u, proj_as_x, out=out[block].flatten(1))
            with _target(out[block]) as made:
                if made.dtype != x.dtype:
                    made.copy_(out[block])
                made.baddbmm_((own + settings.eps).unsqueeze(2), into)
                made.addcmul_(streams, shrink[:, None, None], value=-1)
        d_alphas = alphas_gradient(d_z, u, r, n)
        return out, d_proj, d_z.sum(dim=0), d_alphas

    def write(self, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        out, post = torch.empty_like(x), post.unsqueeze(2)
        for block in _blocks(x):
            with _target(out[block]) as made:
                torch.bmm(res[block], x[block].float(), out=made)
                made.baddbmm_(post[block], y[block].float().unsqueeze(1))
        return out

    def write_backward(
        self, grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor
    ) -> FourGradients:
        d_x, d_y, d_post, d_res = (torch.empty_like(t) for t in (x, y, post, res))
        back, rows = res.transpose(1, 2), post.unsqueeze(1)
        for block in _blocks(x):
            g = grad[block].float()
            with _target(d_x[block]) as made:
                torch.bmm(back[block], g, out=made)
            with _target(d_y[block].unsqueeze(1)) as made:
                torch.bmm(rows[block], g, out=made)
            torch.bmm(g, y[block].float().unsqueeze(2), out=d_post[block].unsqueeze(2))
            torch.bmm(g, x[block].float().transpose(1, 2), out=d_res[block])
        return d_x, d_y, d_post, d_res


@contextmanager
def _target(out: torch.Tensor) -> Iterator[torch.Tensor]:
    """Memory for fp32 results that belong into `out`: `out` itself, or a tensor that is then converted into it."""
    made = out if out.dtype == torch.float32 else torch.empty(out.shape)
    yield made
    if made is not out:
        out.copy_(made)


def _coefficients(
    u: torch.Tensor, r: torch.Tensor, base: torch.Tensor, alphas: torch.Tensor, n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits with the token as the last axis: pre [n, T], post [n, T], res [n, n, T]."""
    z = torch.addcmul(base[:, None], u.t().contiguous() * r.t(), expand_alphas(alphas, n)[:, None])
    pre, post, res = z.split([n, n, n * n])
    return pre, post, res.unflatten(0, (n, n))
