"""mHC on GPUs: the four passes with Triton kernels (triton_jit.py).

The plain torch form of the same passes is `eager.EagerKernels`, and the tests run both. n must be a power of two.

Shapes: as in eager.py.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton declares the compile-time arguments of a kernel as its own type, and is given plain integers.)

from __future__ import annotations

import torch
import triton

from elastic_moe.model.residual import triton_jit as jit
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

PADDED = 32  # coefficients in a product: Triton's products want powers of two, 16 at least
ROWS = 32  # tokens in a product
SMALL = 32  # tokens in a kernel of coefficients, which one warp computes


def _block(width: int) -> int:
    """Channels per program."""
    return min(triton.next_power_of_2(width), 1024)


def _precision(x: torch.Tensor) -> str:
    """Of the products: three TF32 products, as exact as fp32, for fp32 streams; else TF32, as in the paper."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


class TritonKernels(EagerKernels):
    """The passes of `EagerKernels` as Triton kernels."""

    def read(
        self, x: torch.Tensor, proj: torch.Tensor, base: torch.Tensor, alphas: torch.Tensor, settings: MixSettings
    ) -> ReadOutput:
        (tokens, n, width), k = x.shape, len(proj)
        x, new = x.contiguous(), {"device": x.device, "dtype": torch.float32}
        u, r = torch.empty((tokens, k), **new), torch.empty((tokens, 1), **new)
        pre, post, res = (torch.empty((tokens, *s), **new) for s in ((n,), (n,), (n, n)))
        jit.project[(triton.cdiv(tokens, ROWS),)](
            x,
            proj,
            u,
            r,
            tokens,
            n * width,
            settings.norm_eps,
            k,
            ROWS=ROWS,
            PADDED=max(PADDED, triton.next_power_of_2(k)),
            BLOCK=128,
            PRECISION=_precision(x),
        )
        jit.coefficients[(triton.cdiv(tokens, SMALL),)](
            u,
            r,
            base,
            expand_alphas(alphas, n),
            pre,
            post,
            res,
            tokens,
            k,
            2 * settings.iters - 1,
            settings.eps,
            N=n,
            SMALL=SMALL,
            num_warps=1,
        )
        h, block = x.new_empty((tokens, width)), _block(width)
        jit.collapse[(tokens, triton.cdiv(width, block))](x, pre, h, width, N=n, BLOCK=block)
        return h, post, res, u, r

    def read_backward(
        self, x: torch.Tensor, grads: FourGradients, saved: Saved, weights: MixWeights, settings: MixSettings
    ) -> FourGradients:
        (d_x, d_h, d_post, d_res), (u, r), (proj, base, alphas) = grads, saved, weights
        (tokens, n, width), k, x = x.shape, len(proj), x.contiguous()
        alphas_k = expand_alphas(alphas, n)
        d_pre, d_z, steps = torch.empty_like(d_post), torch.empty_like(u), 2 * settings.iters - 1
        sums = u.new_empty((steps, tokens, n))
        jit.pre_backward[(tokens,)](d_h, x, d_pre, width, N=n, BLOCK=_block(width))
        jit.coefficients_backward[(triton.cdiv(tokens, SMALL),)](
            u,
            r,
            base,
            alphas_k,
            d_pre,
            d_post,
            d_res,
            d_z,
            sums,
            tokens,
            k,
            steps,
            settings.eps,
            N=n,
            SMALL=SMALL,
            num_warps=1,
        )
        d_alphas = alphas_gradient(d_z, u, r, n)
        scaled = d_z * alphas_k
        shrink = (scaled * u).sum(dim=1) * r[:, 0] ** 3 / (n * width)
        d_u = scaled * r
        pre = (u[:, :n] * r * alphas[0] + base[:n]).sigmoid() + settings.eps
        out, block = torch.empty_like(x), min(triton.next_power_of_2(width), 128)
        jit.read_backward[(triton.cdiv(tokens, ROWS), n * triton.cdiv(width, block))](
            d_x, x, d_h, pre, d_u, proj, shrink, out, tokens, width, k,
            N=n, ROWS=ROWS, PADDED=max(PADDED, triton.next_power_of_2(k)), BLOCK=block, PRECISION=_precision(x),
        )  # fmt: skip
        d_proj = (d_u.t().to(x.dtype) @ x.flatten(1)).float()
        return out, d_proj, d_z.sum(dim=0), d_alphas

    def write(self, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        tokens, n, width = x.shape
        out, block = torch.empty_like(x, memory_format=torch.contiguous_format), _block(width)
        operands = (t.contiguous() for t in (x, y, post, res))
        jit.write[(tokens, triton.cdiv(width, block))](*operands, out, width, N=n, BLOCK=block)
        return out

    def write_backward(
        self, grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor
    ) -> FourGradients:
        tokens, n, width = x.shape
        operands = [t.contiguous() for t in (grad, x, y, post, res)]
        outs = [torch.empty_like(t) for t in operands[1:]]
        jit.write_backward[(tokens,)](*operands, *outs, width, N=n, BLOCK=_block(width))
        return outs[0], outs[1], outs[2], outs[3]
