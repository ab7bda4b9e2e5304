"""AdamW on a GPU: one pass over memory, as a Triton kernel, with the bits of the loop on a CPU (`adamw_loop.py`).

Every operation rounds once: products and sums are not contracted to FMA (`enable_fp_fusion`), and division and square
root are the correctly rounded ones. So twins may lie on a GPU and on a CPU.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# (Triton compiles the kernel's body, and declares the compile-time arguments as its own type.)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

BLOCK = 1024  # elements of a program


@triton.jit
def _update(  # noqa: PLR0913 - a kernel takes its pointers and sizes one by one
    weight_ptr, m_ptr, v_ptr, grad_ptr, numel, keep, beta1, rest1, beta2, rest2, step_size, root_scale, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The factors are those of `adamw_loop.update`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    g = tl.load(grad_ptr + at, mask=inside, other=0.0)
    first = tl.load(m_ptr + at, mask=inside, other=0.0) * beta1 + g * rest1
    second = tl.load(v_ptr + at, mask=inside, other=0.0) * beta2 + (g * g) * rest2
    tl.store(m_ptr + at, first, mask=inside)
    tl.store(v_ptr + at, second, mask=inside)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0) * keep
    change = tl.div_rn(first * step_size, tl.sqrt_rn(second) * root_scale + eps)
    tl.store(weight_ptr + at, weight - change, mask=inside)


def update(tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> None:
    """One update in place.

    Args:
        tensors: weight, m, v and gradient; fp32 [n] each, contiguous and without overlap, on one device.
        factors: fp32 values, in the order of the kernel's arguments.
    """
    numel = len(tensors[0])
    if numel:
        _update[(triton.cdiv(numel, BLOCK),)](*tensors, numel, *factors, BLOCK=BLOCK, enable_fp_fusion=False)
