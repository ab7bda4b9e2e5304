"""mHC on CPUs: the four passes in blocks of tokens that stay in the cache.

The streams are the largest activation of a model (n times a hidden state), and on a CPU their passes through memory are what mHC costs. Each of the
passes here touches them block by block, with all that it does to a block while it is in the cache, so that a stream is read from memory once or twice and
written once. Blocks are worked on in fp32, for which CPUs have the faster small products; with bf16 streams the two products of the gradient with the
projection are bf16, like those of any other weight. The coefficients are small (24 numbers per token for n = 4) and are made for all tokens at once, laid out with the token last, where
Sinkhorn's sums over n become sums of long vectors.

Shapes: as in mhc.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from elastic_moe.model.residual.mhc import EagerKernels, MixSettings, gates_gradient, spread_gates
from elastic_moe.model.residual.sinkhorn import iterate, iterate_backward

BLOCK_BYTES = 1 << 20  # of fp32 streams: about what a core's second-level cache holds
TOKEN_LAST = (0, 1)  # the axes (to, from) of matrices laid out [n, n, T]


def _blocks(x: torch.Tensor) -> Iterator[slice]:
    """Slices of tokens."""
    size = max(1, BLOCK_BYTES * torch.get_num_threads() // (4 * x.shape[1] * x.shape[2]))
    for start in range(0, len(x), size):
        yield slice(start, min(start + size, len(x)))


class BlockedKernels(EagerKernels):
    """The same passes as EagerKernels, by blocks."""

    def read(
        self, x: torch.Tensor, proj: torch.Tensor, base: torch.Tensor, gates: torch.Tensor, settings: MixSettings
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        n, width = settings.streams, x.shape[1] * x.shape[2]
        u, norm = x.new_empty((len(x), len(proj)), dtype=torch.float32), x.new_empty((len(x), 1), dtype=torch.float32)
        for block in _blocks(x):
            flat = x[block].flatten(1).float()
            torch.mm(flat, proj.t(), out=u[block])
            torch.linalg.vector_norm(flat, dim=1, keepdim=True, out=norm[block])
        r = torch.rsqrt(norm * norm / width + settings.norm_eps)
        z_pre, z_post, z_res = _coefficients(u, r, base, gates, n)
        pre = z_pre.sigmoid() + settings.eps
        res = iterate(z_res, settings.iters, settings.eps, TOKEN_LAST)
        mixed, h = pre.t().contiguous().unsqueeze(1), x.new_empty((len(x), x.shape[2]))
        for block in _blocks(x):
            h[block] = torch.bmm(mixed[block], x[block].float()).squeeze(1)
        return h, 2 * z_post.sigmoid().t().contiguous(), res.permute(2, 0, 1).contiguous(), u, r

    def read_backward(
        self,
        x: torch.Tensor,
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        saved: tuple[torch.Tensor, torch.Tensor],
        weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        settings: MixSettings,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        n = settings.streams
        (d_x, d_h, d_post, d_res), (u, r), (proj, base, gates) = grads, saved, weights
        z_pre, z_post, z_res = _coefficients(u, r, base, gates, n)
        pre, post = z_pre.sigmoid().t().contiguous(), z_post.sigmoid()
        d_z_post = 2 * d_post.t() * post * (1 - post)
        d_z_res = iterate_backward(d_res.permute(1, 2, 0).contiguous(), z_res, settings.iters, settings.eps, TOKEN_LAST)
        d_z = torch.cat((torch.empty_like(z_pre), d_z_post, d_z_res.flatten(0, 1))).t().contiguous()
        spread = spread_gates(gates, n)
        d_proj, out = torch.zeros_like(proj), torch.empty_like(x)
        small = proj.to(x.dtype)
        for block in _blocks(x):
            streams, into, own = x[block].float(), d_h[block].float().unsqueeze(1), pre[block]
            d_z[block, :n] = torch.bmm(into, streams.transpose(1, 2)).squeeze(1) * own * (1 - own)
            d_u = d_z[block] * spread
            shrink = (d_u * u[block]).sum(dim=1) * r[block, 0] ** 3 / (n * x.shape[2])
            d_u = (d_u * r[block]).to(x.dtype)
            d_proj.add_(d_u.t() @ x[block].flatten(1))
            torch.addmm(d_x[block].flatten(1), d_u, small, out=out[block].flatten(1))
            with _target(out[block]) as made:
                if made.dtype != x.dtype:
                    made.copy_(out[block])
                made.baddbmm_((own + settings.eps).unsqueeze(2), into)
                made.addcmul_(streams, shrink[:, None, None], value=-1)
        d_gates = gates_gradient(d_z, u, r, n)
        return out, d_proj, d_z.sum(dim=0), d_gates

    def write(self, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        out, post = torch.empty_like(x), post.unsqueeze(2)
        for block in _blocks(x):
            with _target(out[block]) as made:
                torch.bmm(res[block], x[block].float(), out=made)
                made.baddbmm_(post[block], y[block].float().unsqueeze(1))
        return out

    def write_backward(
        self, grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
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
    """Where to make fp32 values that belong into `out`: there, or beside it when its type is another."""
    made = out if out.dtype == torch.float32 else torch.empty(out.shape)
    yield made
    if made is not out:
        out.copy_(made)


def _coefficients(
    u: torch.Tensor, r: torch.Tensor, base: torch.Tensor, gates: torch.Tensor, n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits with the token last: pre [n, T], post [n, T], res [n, n, T]."""
    z = torch.addcmul(base[:, None], u.t().contiguous() * r.t(), spread_gates(gates, n)[:, None])
    pre, post, res = z.split([n, n, n * n])
    return pre, post, res.unflatten(0, (n, n))
