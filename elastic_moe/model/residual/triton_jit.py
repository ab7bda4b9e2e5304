"""The Triton kernels of mHC; triton.py calls them.

They divide the work as the paper does (arXiv 2512.24880, section 4.3.1):

- (a) projection and norm, in one scan of the streams;
- (b, c) all coefficients of a token, Sinkhorn included, from its k logits; the backward pass computes Sinkhorn's
  iterates again on the chip;
- (d) the sub-layer's input;
- (e) the write, merged with the addition of the sub-layer's output.

In the backward pass, (e) reads the streams and their gradient once for all four gradients, and (a) and (d) share the
pass that writes the streams' gradient.

`*_ptr` are pointers to contiguous tensors, `tokens`, `width` and `k` their sizes, and capitals are compile-time sizes:
N streams, ROWS or SMALL tokens per program, PADDED coefficients, BLOCK channels, PRECISION of the products. N must be a
power of two.

Shapes: as in eager.py; `width` is C, or n C where streams are flattened.
"""

# ruff: noqa: PLR0913 - a kernel takes its pointers and sizes one by one
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton compiles these bodies; read as Python, static_range yields nothing and constants cannot be indexed.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def project(
    x_ptr, proj_ptr, u_ptr, r_ptr, tokens, width, eps, k,
    ROWS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(a) u = x proj^T and r = 1 / rms(x), for ROWS tokens."""
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
        acc += tl.dot(x, p, input_precision=PRECISION)
        square += tl.sum(x * x, axis=1)
    tl.store(r_ptr + row, 1.0 / tl.sqrt(square / width + eps), mask=row < tokens)
    tl.store(u_ptr + row[:, None] * k + column[None, :], acc, mask=(row[:, None] < tokens) & (column[None, :] < k))


@triton.jit
def _sums(m, rows):
    """What a step of Sinkhorn divides by, but for eps: sums [T, n] of the rows, or of the columns, of [T, to, from]."""
    if rows:  # noqa: SIM108 - Triton has no conditional expression here
        sums = tl.sum(m, axis=2)
    else:
        sums = tl.sum(m, axis=1)
    return sums


@triton.jit
def _over(sums, rows):
    """Sums [T, n] along the axis of [T, to, from] that they belong to."""
    return tl.where(rows, sums[:, :, None], sums[:, None, :])


@triton.jit
def _softmax_to(z, eps):
    """The softmax over `to`, with which Sinkhorn begins."""
    e = tl.exp(z - tl.max(z, axis=1, keep_dims=True))
    return e / tl.sum(e, axis=1, keep_dims=True)


@triton.jit
def _load_logits(u_ptr, base_ptr, alphas_ptr, r, token, inside, k, offset, N: tl.constexpr):
    """z [T, n] of the coefficients from `offset` on."""
    at = offset + tl.arange(0, N)
    u = tl.load(u_ptr + token[:, None] * k + at[None, :], mask=inside[:, None], other=0.0)
    return u * r[:, None] * tl.load(alphas_ptr + at)[None, :] + tl.load(base_ptr + at)[None, :]


@triton.jit
def _load_res_logits(u_ptr, base_ptr, alphas_ptr, r, token, inside, k, N: tl.constexpr):
    """z [T, to, from]."""
    at = 2 * N + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    u = tl.load(u_ptr + token[:, None, None] * k + at[None, :, :], mask=inside[:, None, None], other=0.0)
    return u * r[:, None, None] * tl.load(alphas_ptr + at)[None, :, :] + tl.load(base_ptr + at)[None, :, :]


@triton.jit
def coefficients(
    u_ptr,
    r_ptr,
    base_ptr,
    alphas_ptr,
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
    """(b, c) pre, post and res, for SMALL tokens."""
    token = tl.program_id(0) * SMALL + tl.arange(0, SMALL)
    inside = token < tokens
    r = tl.load(r_ptr + token, mask=inside, other=1.0)
    n = tl.arange(0, N)
    z = _load_logits(u_ptr, base_ptr, alphas_ptr, r, token, inside, k, 0, N)
    tl.store(pre_ptr + token[:, None] * N + n[None, :], 1.0 / (1.0 + tl.exp(-z)) + eps, mask=inside[:, None])
    z = _load_logits(u_ptr, base_ptr, alphas_ptr, r, token, inside, k, N, N)
    tl.store(post_ptr + token[:, None] * N + n[None, :], 2.0 / (1.0 + tl.exp(-z)), mask=inside[:, None])
    m = _softmax_to(_load_res_logits(u_ptr, base_ptr, alphas_ptr, r, token, inside, k, N), eps) + eps
    for step in range(steps):
        rows = step % 2 == 0
        m = m / _over(_sums(m, rows) + eps, rows)
    at = n[:, None] * N + n[None, :]
    tl.store(res_ptr + token[:, None, None] * N * N + at[None, :, :], m, mask=inside[:, None, None])


@triton.jit
def coefficients_backward(
    u_ptr,
    r_ptr,
    base_ptr,
    alphas_ptr,
    d_pre_ptr,
    d_post_ptr,
    d_res_ptr,
    d_z_ptr,
    sums_ptr,
    tokens,
    k,
    steps,
    eps,
    N: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Gradient of the logits.

    Sinkhorn is computed again, and the sums of each step, [steps, T, n], are left in memory. From the last iterate back
    to the first, each one is the next one times the sums that it was divided by.
    """
    token = tl.program_id(0) * SMALL + tl.arange(0, SMALL)
    inside = token < tokens
    r = tl.load(r_ptr + token, mask=inside, other=1.0)
    n = tl.arange(0, N)
    here = token[:, None] * N + n[None, :]
    s = 1.0 / (1.0 + tl.exp(-_load_logits(u_ptr, base_ptr, alphas_ptr, r, token, inside, k, 0, N)))
    d = tl.load(d_pre_ptr + here, mask=inside[:, None], other=0.0) * s * (1.0 - s)
    tl.store(d_z_ptr + token[:, None] * k + n[None, :], d, mask=inside[:, None])
    s = 1.0 / (1.0 + tl.exp(-_load_logits(u_ptr, base_ptr, alphas_ptr, r, token, inside, k, N, N)))
    d = 2.0 * tl.load(d_post_ptr + here, mask=inside[:, None], other=0.0) * s * (1.0 - s)
    tl.store(d_z_ptr + token[:, None] * k + N + n[None, :], d, mask=inside[:, None])
    soft = _softmax_to(_load_res_logits(u_ptr, base_ptr, alphas_ptr, r, token, inside, k, N), eps)
    at = n[:, None] * N + n[None, :]
    m = soft + eps
    for step in range(steps):
        rows = step % 2 == 0
        sums = _sums(m, rows) + eps
        tl.store(sums_ptr + (step * tokens + token[:, None]) * N + n[None, :], sums, mask=inside[:, None])
        m = m / _over(sums, rows)
    tl.debug_barrier()  # another thread may read what this one has stored
    grad = tl.load(d_res_ptr + token[:, None, None] * N * N + at[None, :, :], mask=inside[:, None, None], other=0.0)
    for back in range(steps):
        step = steps - 1 - back
        rows = step % 2 == 0
        sums = tl.load(sums_ptr + (step * tokens + token[:, None]) * N + n[None, :], mask=inside[:, None], other=1.0)
        divisor = _over(sums, rows)
        grad = (grad - _over(_sums(grad * m, rows), rows)) / divisor
        m = m * divisor
    grad = soft * (grad - tl.sum(grad * soft, axis=1, keep_dims=True))
    tl.store(d_z_ptr + token[:, None, None] * k + 2 * N + at[None, :, :], grad, mask=inside[:, None, None])


@triton.jit
def collapse(x_ptr, pre_ptr, h_ptr, width, N: tl.constexpr, BLOCK: tl.constexpr):
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
def write(x_ptr, y_ptr, post_ptr, res_ptr, out_ptr, width, N: tl.constexpr, BLOCK: tl.constexpr):
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
def write_backward(
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
def pre_backward(d_h_ptr, x_ptr, d_pre_ptr, width, N: tl.constexpr, BLOCK: tl.constexpr):
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
def read_backward(
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
    PRECISION: tl.constexpr,
):
    """out = d_x + pre d_h + d_u proj - shrink x, for ROWS tokens and BLOCK channels of one stream."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    blocks = tl.cdiv(width, BLOCK)
    stream = tl.program_id(1) // blocks
    at = (tl.program_id(1) % blocks) * BLOCK + tl.arange(0, BLOCK)
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
    acc = tl.dot(d_u, p, input_precision=PRECISION)
    acc += tl.load(d_x_ptr + here, mask=inside, other=0.0).to(tl.float32)
    d_h = tl.load(d_h_ptr + row[:, None] * width + at[None, :], mask=inside, other=0.0).to(tl.float32)
    acc += tl.load(pre_ptr + row * N + stream, mask=row < tokens, other=0.0)[:, None] * d_h
    x = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
    acc -= tl.load(shrink_ptr + row, mask=row < tokens, other=0.0)[:, None] * x
    tl.store(out_ptr + here, acc.to(out_ptr.dtype.element_ty), mask=inside)
