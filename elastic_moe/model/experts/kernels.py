"""Choice of the kernels between the experts' products: Triton's on GPUs where it works, else plain torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from elastic_moe.model.experts.routed_sum import PlainSums, RoutedSums
from elastic_moe.model.has_triton import has_triton
from elastic_moe.model.layers import swiglu, swiglu_backward


class SwiGLUKernels(NamedTuple):
    """SwiGLU of rows whose gate and up lie side by side, [N, 2F].

    Attributes:
        forward: (gate_up_NG, limit) -> the value [N, F].
        backward: as `layers.swiglu_backward`.
    """

    forward: Callable[[torch.Tensor, float], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]


def _plain_swiglu(gate_up_NG: torch.Tensor, limit: float) -> torch.Tensor:
    gate, up = gate_up_NG.chunk(2, dim=1)
    return swiglu(gate, up, limit)


PLAIN = SwiGLUKernels(_plain_swiglu, swiglu_backward), PlainSums()


def swiglu_kernels(device: torch.device) -> SwiGLUKernels:
    """The SwiGLU for tensors on a device."""
    return _triton()[0] if has_triton(device) else PLAIN[0]


def routed_sums(device: torch.device) -> RoutedSums:
    """The sums over rows for tensors on a device."""
    return _triton()[1] if has_triton(device) else PLAIN[1]


@functools.cache
def _triton() -> tuple[SwiGLUKernels, RoutedSums]:
    from elastic_moe.model.experts import triton

    return SwiGLUKernels(triton.swiglu, triton.swiglu_backward), triton.TritonSums()
