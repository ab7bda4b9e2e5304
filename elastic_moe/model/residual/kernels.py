"""Choice of the kernels that mix the streams: plain torch, blocked for CPUs, compiled, or Triton's.

A kernel that fails is replaced by plain torch, with one warning.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from elastic_moe.model.residual.blocked import BlockedKernels
from elastic_moe.model.residual.eager import (
    EagerKernels,
    FourGradients,
    FusableKernels,
    Kernels,
    MixSettings,
    MixWeights,
    ReadOutput,
    Saved,
)

PASSES = ("read", "read_backward", "write", "write_backward")


class FallbackKernels:
    """`Kernels` that use fast passes until one of them fails, and plain torch from then on.

    Args:
        name: of the fast form, for the warning.
        fast: its passes, by the names in PASSES.
    """

    def __init__(self, name: str, fast: dict[str, Callable[..., Any]]) -> None:
        self._name, self._plain = name, EagerKernels()
        self._fast: dict[str, Callable[..., Any]] | None = fast

    def read(
        self, x: torch.Tensor, proj: torch.Tensor, base: torch.Tensor, alphas: torch.Tensor, settings: MixSettings
    ) -> ReadOutput:
        return self._run("read", x, proj, base, alphas, settings)

    def read_backward(
        self, x: torch.Tensor, grads: FourGradients, saved: Saved, weights: MixWeights, settings: MixSettings
    ) -> FourGradients:
        return self._run("read_backward", x, grads, saved, weights, settings)

    def write(self, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        return self._run("write", x, y, post, res)

    def write_backward(
        self, grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor
    ) -> FourGradients:
        return self._run("write_backward", grad, x, y, post, res)

    def _run(self, name: str, *args: Any) -> Any:
        plain = getattr(self._plain, name)
        if self._fast is None or args[0].numel() == 0:
            return plain(*args)
        try:
            return self._fast[name](*args)
        except Exception as error:  # noqa: BLE001 - a compiler or GPU may be missing; real faults repeat in plain torch
            self._fast = None
            warnings.warn(f"mHC runs without {self._name}: {str(error).splitlines()[0]}", stacklevel=2)
            return plain(*args)


@functools.cache
def compiled_kernels() -> Kernels:
    """`FusableKernels` through torch.compile, which compiles each pass when it is first used."""
    bodies = FusableKernels()
    return FallbackKernels(
        "torch.compile", {name: torch.compile(getattr(bodies, name), dynamic=True) for name in PASSES}
    )


@functools.cache
def triton_kernels() -> Kernels:
    """The Triton kernels; plain torch, with a warning, where Triton is not installed."""
    try:
        from elastic_moe.model.residual.triton import TritonKernels
    except ImportError as error:
        warnings.warn(f"mHC runs without Triton: {error}", stacklevel=2)
        return EagerKernels()
    kernels = TritonKernels()
    return FallbackKernels("Triton", {name: getattr(kernels, name) for name in PASSES})


def choose_kernels(fused: str, device: torch.device) -> Kernels:
    """The kernels for a value of `model.fused` on a device.

    "auto" is blocked on CPUs, where nothing measured was faster and compiling takes longer than many runs, and Triton's
    on GPUs, where they are the fastest and compile in seconds instead of a minute. "off" is blocked on CPUs and plain
    on GPUs.
    """
    if fused == "triton" or (fused == "auto" and device.type == "cuda"):
        return triton_kernels()
    if fused == "compile":
        return compiled_kernels()
    return BlockedKernels() if device.type == "cpu" else EagerKernels()
