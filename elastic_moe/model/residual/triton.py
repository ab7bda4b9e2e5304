"""mHC on GPUs: the four passes as Triton kernels.

Cut as in the paper (arXiv 2512.24880, section 4.3.1): (a) projection and norm in one scan of the streams; (b, c) all coefficients of a token, Sinkhorn
included, from 24 numbers, and backward with the iterates made again on the chip; (d) the sub-layer's input; (e) the write, with the merge. Backward,
(e) reads the streams and their gradient once for all four gradients; (a) and (d) share the pass that writes the streams' gradient.

The plain torch form of the same passes is `mhc.EagerKernels`, and the tests run both. Shapes: as in mhc.py; n must be a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elastic_moe.model.residual.mhc import EagerKernels, MixSettings, gates_gradient, spread_gates

PADDED = 32  # coefficients in a product: Triton's products want powers of two, 16 at least
ROWS = 16  # tokens in a product
SMALL = 32  # tokens in a kernel of coefficients


@triton.jit
def _project(
    x_ptr, proj_ptr, u_ptr, r_ptr, tokens, width, eps, k, ROWS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """(a) u = x proj^T and r = 1 / rms(x)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    acc = tl.zeros((ROWS, PADDED), dtype=tl.float32)
    square = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = (row[:, None] < tokens) & (at[None, :] < width)
        x = tl.load(x_ptr + row[:, None] * width + at[None, :], mask=inside, other=0.0).to(tl.float32)
        p = tl.load(
            proj_ptr + column[None, :] * width + at[:, None],
            mask=(column[None, :] < k) & (at[:, None] < width),
            other=0.0,
        )
        acc += tl.dot(x, p, input_precision="tf32")
        square += tl.sum(x * x, axis=1)
    tl.store(r_ptr + row, 1.0 / tl.sqrt(square / width + eps), mask=row < tokens)
    tl.store(u_ptr + row[:, None] * k + column[None, :], acc, mask=(row[:, None] < tokens) & (column[None, :] < k))


@triton.jit
def _normalize(m, eps, rows):
    """One step of Sinkhorn: rows or columns of [T, to, from]."""
    if rows:  # noqa: SIM108 - not Python
        m = m / (tl.sum(m, axis=2, keep_dims=True) + eps)
    else:
        m = m / (tl.sum(m, axis=1, keep_dims=True) + eps)
    return m


@triton.jit
def _first(z, eps):
    """The softmax over `to` with which Sinkhorn begins."""
    e = tl.exp(z - tl.max(z, axis=1, keep_dims=True))
    return e / tl.sum(e, axis=1, keep_dims=True)


@triton.jit
def _load_logits(u_ptr, base_ptr, spread_ptr, r, token, inside, k, offset, N: tl.constexpr):
    """z [T, n] of the coefficients from `offset` on."""
    at = offset + tl.arange(0, N)
    u = tl.load(u_ptr + token[:, None] * k + at[None, :], mask=inside[:, None], other=0.0)
    return u * r[:, None] * tl.load(spread_ptr + at)[None, :] + tl.load(base_ptr + at)[None, :]


@triton.jit
def _load_res_logits(u_ptr, base_ptr, spread_ptr, r, token, inside, k, N: tl.constexpr):
    """z [T, to, from]."""
    at = 2 * N + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    u = tl.load(u_ptr + token[:, None, None] * k + at[None, :, :], mask=inside[:, None, None], other=0.0)
    return u * r[:, None, None] * tl.load(spread_ptr + at)[None, :, :] + tl.load(base_ptr + at)[None, :, :]


@triton.jit
def _coefficients(
    u_ptr,
    r_ptr,
    base_ptr,
    spread_ptr,
    pre_ptr,
    post_ptr,
    res_ptr,
    tokens,
    k,
    steps,
    eps,
    N: tl.constexpr,
    SMALL: tl.constexpr,
):
    """(b, c) pre, post and res of each token."""
    token = tl.program_id(0) * SMALL + tl.arange(0, SMALL)
    inside = token < tokens
    r = tl.load(r_ptr + token, mask=inside, other=1.0)
    n = tl.arange(0, N)
    z = _load_logits(u_ptr, base_ptr, spread_ptr, r, token, inside, k, 0, N)
    tl.store(pre_ptr + token[:, None] * N + n[None, :], 1.0 / (1.0 + tl.exp(-z)) + eps, mask=inside[:, None])
    z = _load_logits(u_ptr, base_ptr, spread_ptr, r, token, inside, k, N, N)
    tl.store(post_ptr + token[:, None] * N + n[None, :], 2.0 / (1.0 + tl.exp(-z)), mask=inside[:, None])
    m = _first(_load_res_logits(u_ptr, base_ptr, spread_ptr, r, token, inside, k, N), eps) + eps
    for step in range(steps):
        m = _normalize(m, eps, step % 2 == 0)
    at = n[:, None] * N + n[None, :]
    tl.store(res_ptr + token[:, None, None] * N * N + at[None, :, :], m, mask=inside[:, None, None])


@triton.jit
def _coefficients_backward(
    u_ptr,
    r_ptr,
    base_ptr,
    spread_ptr,
    d_pre_ptr,
    d_post_ptr,
    d_res_ptr,
    d_z_ptr,
    tokens,
    k,
    steps,
    eps,
    N: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Gradient of the logits; each of Sinkhorn's iterates is made again from the first, which costs less than memory would."""
    token = tl.program_id(0) * SMALL + tl.arange(0, SMALL)
    inside = token < tokens
    r = tl.load(r_ptr + token, mask=inside, other=1.0)
    n = tl.arange(0, N)
    here = token[:, None] * N + n[None, :]
    s = 1.0 / (1.0 + tl.exp(-_load_logits(u_ptr, base_ptr, spread_ptr, r, token, inside, k, 0, N)))
    d = tl.load(d_pre_ptr + here, mask=inside[:, None], other=0.0) * s * (1.0 - s)
    tl.store(d_z_ptr + token[:, None] * k + n[None, :], d, mask=inside[:, None])
    s = 1.0 / (1.0 + tl.exp(-_load_logits(u_ptr, base_ptr, spread_ptr, r, token, inside, k, N, N)))
    d = 2.0 * tl.load(d_post_ptr + here, mask=inside[:, None], other=0.0) * s * (1.0 - s)
    tl.store(d_z_ptr + token[:, None] * k + N + n[None, :], d, mask=inside[:, None])
    soft = _first(_load_res_logits(u_ptr, base_ptr, spread_ptr, r, token, inside, k, N), eps)
    at = n[:, None] * N + n[None, :]
    grad = tl.load(d_res_ptr + token[:, None, None] * N * N + at[None, :, :], mask=inside[:, None, None], other=0.0)
    for back in range(steps):
        last = steps - 1 - back
        m = soft + eps
        for step in range(last):
            m = _normalize(m, eps, step % 2 == 0)
        if last % 2 == 0:
            total = tl.sum(m, axis=2, keep_dims=True) + eps
            grad = (grad - tl.sum(grad * m / total, axis=2, keep_dims=True)) / total
        else:
            total = tl.sum(m, axis=1, keep_dims=True) + eps
            grad = (grad - tl.sum(grad * m / total, axis=1, keep_dims=True)) / total
    grad = soft * (grad - tl.sum(grad * soft, axis=1, keep_dims=True))
    tl.store(d_z_ptr + token[:, None, None] * k + 2 * N + at[None, :, :], grad, mask=inside[:, None, None])


@triton.jit
def _collapse(x_ptr, pre_ptr, h_ptr, width, N: tl.constexpr, BLOCK: tl.constexpr):
    """(d) h = pre x, of one token."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (token * N + n[:, None]) * width + at[None, :], mask=at[None, :] < width, other=0.0).to(
        tl.float32
    )
    h = tl.sum(tl.load(pre_ptr + token * N + n)[:, None] * x, axis=0)
    tl.store(h_ptr + token * width + at, h.to(h_ptr.dtype.element_ty), mask=at < width)


@triton.jit
def _write(x_ptr, y_ptr, post_ptr, res_ptr, out_ptr, width, N: tl.constexpr, BLOCK: tl.constexpr):
    """(e) out = res x + post y, of one token."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + token * width + at, mask=at < width, other=0.0).to(tl.float32)
    acc = tl.load(post_ptr + token * N + n)[:, None] * y[None, :]
    for j in tl.static_range(N):
        x = tl.load(x_ptr + (token * N + j) * width + at, mask=at < width, other=0.0).to(tl.float32)
        acc += tl.load(res_ptr + (token * N + n) * N + j)[:, None] * x[None, :]
    out = out_ptr + (token * N + n[:, None]) * width + at[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=at[None, :] < width)


@triton.jit
def _write_backward(
    g_ptr,
    x_ptr,
    y_ptr,
    post_ptr,
    res_ptr,
    d_x_ptr,
    d_y_ptr,
    d_post_ptr,
    d_res_ptr,
    width,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of x, y, post and res of one token, in one scan."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N)
    post = tl.load(post_ptr + token * N + n)
    d_post = tl.zeros((N,), dtype=tl.float32)
    d_res = tl.zeros((N, N), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        streams = (token * N + n[:, None]) * width + at[None, :]
        g = tl.load(g_ptr + streams, mask=inside[None, :], other=0.0).to(tl.float32)
        y = tl.load(y_ptr + token * width + at, mask=inside, other=0.0).to(tl.float32)
        d_post += tl.sum(g * y[None, :], axis=1)
        d_y = tl.sum(post[:, None] * g, axis=0)
        tl.store(d_y_ptr + token * width + at, d_y.to(d_y_ptr.dtype.element_ty), mask=inside)
        for j in tl.static_range(N):
            x = tl.load(x_ptr + (token * N + j) * width + at, mask=inside, other=0.0).to(tl.float32)
            d_res += tl.where(n[None, :] == j, tl.sum(g * x[None, :], axis=1)[:, None], 0.0)
            d_x = tl.sum(tl.load(res_ptr + (token * N + n) * N + j)[:, None] * g, axis=0)
            tl.store(d_x_ptr + (token * N + j) * width + at, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
    tl.store(d_post_ptr + token * N + n, d_post)
    tl.store(d_res_ptr + token * N * N + n[:, None] * N + n[None, :], d_res)


@triton.jit
def _pre_backward(d_h_ptr, x_ptr, d_pre_ptr, width, N: tl.constexpr, BLOCK: tl.constexpr):
    """d_pre = <d_h, x> of one token."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N)
    acc = tl.zeros((N,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        x = tl.load(x_ptr + (token * N + n[:, None]) * width + at[None, :], mask=inside[None, :], other=0.0).to(
            tl.float32
        )
        d_h = tl.load(d_h_ptr + token * width + at, mask=inside, other=0.0).to(tl.float32)
        acc += tl.sum(x * d_h[None, :], axis=1)
    tl.store(d_pre_ptr + token * N + n, acc)


@triton.jit
def _read_backward(
    d_x_ptr,
    x_ptr,
    d_h_ptr,
    pre_ptr,
    d_u_ptr,
    proj_ptr,
    shrink_ptr,
    out_ptr,
    tokens,
    width,
    k,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = d_x + pre d_h + d_u proj - shrink x, of one stream's piece of some tokens."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pieces = tl.cdiv(width, BLOCK)
    stream = tl.program_id(1) // pieces
    at = (tl.program_id(1) % pieces) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    rows_in, at_in = row[:, None] < tokens, at[None, :] < width
    inside = rows_in & at_in
    here = (row[:, None] * N + stream) * width + at[None, :]
    d_u = tl.load(d_u_ptr + row[:, None] * k + column[None, :], mask=rows_in & (column[None, :] < k), other=0.0)
    p = tl.load(
        proj_ptr + column[:, None] * (N * width) + stream * width + at[None, :],
        mask=(column[:, None] < k) & at_in,
        other=0.0,
    )
    acc = tl.dot(d_u, p, input_precision="tf32")
    acc += tl.load(d_x_ptr + here, mask=inside, other=0.0).to(tl.float32)
    d_h = tl.load(d_h_ptr + row[:, None] * width + at[None, :], mask=inside, other=0.0).to(tl.float32)
    acc += tl.load(pre_ptr + row * N + stream, mask=row < tokens, other=0.0)[:, None] * d_h
    x = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
    acc -= tl.load(shrink_ptr + row, mask=row < tokens, other=0.0)[:, None] * x
    tl.store(out_ptr + here, acc.to(out_ptr.dtype.element_ty), mask=inside)


def _block(width: int) -> int:
    return min(triton.next_power_of_2(width), 1024)


class TritonKernels(EagerKernels):
    """The passes of EagerKernels as Triton kernels."""

    def read(
        self, x: torch.Tensor, proj: torch.Tensor, base: torch.Tensor, gates: torch.Tensor, settings: MixSettings
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        (tokens, n, width), k = x.shape, len(proj)
        x, new = x.contiguous(), {"device": x.device, "dtype": torch.float32}
        u, r = torch.empty((tokens, k), **new), torch.empty((tokens, 1), **new)
        pre, post, res = (torch.empty((tokens, *s), **new) for s in ((n,), (n,), (n, n)))
        _project[(triton.cdiv(tokens, ROWS),)](
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
            BLOCK=64,
        )
        _coefficients[(triton.cdiv(tokens, SMALL),)](
            u,
            r,
            base,
            spread_gates(gates, n),
            pre,
            post,
            res,
            tokens,
            k,
            2 * settings.iters - 1,
            settings.eps,
            N=n,
            SMALL=SMALL,
        )
        h, block = x.new_empty((tokens, width)), _block(width)
        _collapse[(tokens, triton.cdiv(width, block))](x, pre, h, width, N=n, BLOCK=block)
        return h, post, res, u, r

    def read_backward(
        self,
        x: torch.Tensor,
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        saved: tuple[torch.Tensor, torch.Tensor],
        weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        settings: MixSettings,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        (d_x, d_h, d_post, d_res), (u, r), (proj, base, gates) = grads, saved, weights
        (tokens, n, width), k, x, spread = x.shape, len(proj), x.contiguous(), spread_gates(gates, settings.streams)
        d_pre, d_z = torch.empty_like(d_post), torch.empty_like(u)
        _pre_backward[(tokens,)](d_h, x, d_pre, width, N=n, BLOCK=_block(width))
        _coefficients_backward[(triton.cdiv(tokens, SMALL),)](
            u,
            r,
            base,
            spread,
            d_pre,
            d_post,
            d_res,
            d_z,
            tokens,
            k,
            2 * settings.iters - 1,
            settings.eps,
            N=n,
            SMALL=SMALL,
        )
        d_gates = gates_gradient(d_z, u, r, n)
        scaled = d_z * spread
        shrink = (scaled * u).sum(dim=1) * r[:, 0] ** 3 / (n * width)
        d_u = scaled * r
        pre = (u[:, :n] * r * gates[0] + base[:n]).sigmoid() + settings.eps
        out, block = torch.empty_like(x), min(triton.next_power_of_2(width), 128)
        _read_backward[(triton.cdiv(tokens, ROWS), n * triton.cdiv(width, block))](
            d_x, x, d_h, pre, d_u, proj, shrink, out, tokens, width, k,
            N=n, ROWS=ROWS, PADDED=max(PADDED, triton.next_power_of_2(k)), BLOCK=block,
        )  # fmt: skip
        d_proj = (d_u.t().to(x.dtype) @ x.flatten(1)).float()
        return out, d_proj, d_z.sum(dim=0), d_gates

    def write(self, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        tokens, n, width = x.shape
        out, block = torch.empty_like(x, memory_format=torch.contiguous_format), _block(width)
        operands = (t.contiguous() for t in (x, y, post, res))
        _write[(tokens, triton.cdiv(width, block))](*operands, out, width, N=n, BLOCK=block)
        return out

    def write_backward(
        self, grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, n, width = x.shape
        operands = [t.contiguous() for t in (grad, x, y, post, res)]
        outs = [torch.empty_like(t) for t in operands[1:]]
        _write_backward[(tokens,)](*operands, *outs, width, N=n, BLOCK=_block(width))
        return outs[0], outs[1], outs[2], outs[3]
