"""The smallest Triton kernel, to see whether one compiles and runs."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton declares the compile-time arguments of a kernel as its own type.)

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _store(out_ptr, value, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), value)


def probe(device: torch.device) -> None:
    """Raises whatever keeps a kernel from running."""
    out = torch.zeros(16, device=device)
    _store[(1,)](out, 2.0, BLOCK=16)
    if not bool((out == 2.0).all()):
        raise RuntimeError("a kernel computed wrong numbers")
