"""Which kernels mix the streams: plain torch, blocked for CPUs, compiled, or Triton's. What does not work here is done without, with one warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from elastic_moe.model.residual.blocked import BlockedKernels
from elastic_moe.model.residual.mhc import EagerKernels, FusableKernels, Kernels

PASSES = ("read", "read_backward", "write", "write_backward")


class FallbackKernels:
    """Kernels that hand over to plain torch, for good, the first time one of them fails.

    Args:
        what: their name, for the warning.
        fast: the passes by name.
    """

    def __init__(self, what: str, fast: dict[str, Callable[..., Any]]) -> None:
        self._what, self._plain = what, EagerKernels()
        self._fast: dict[str, Callable[..., Any]] | None = fast
        self.read, self.read_backward, self.write, self.write_backward = (
            functools.partial(self._run, name) for name in PASSES
        )

    def _run(self, name: str, *args: Any) -> Any:
        plain = getattr(self._plain, name)
        if self._fast is None or args[0].numel() == 0:
            return plain(*args)
        try:
            return self._fast[name](*args)
        except Exception as error:  # noqa: BLE001 - no compiler, no GPU, a shape they do not take; plain torch tells real faults
            self._fast = None
            warnings.warn(f"mHC runs without {self._what}: {str(error).splitlines()[0]}", stacklevel=2)
            return plain(*args)


@functools.cache
def compiled_kernels() -> Kernels:
    """The fusable bodies through torch.compile, compiled when first used."""
    bodies = FusableKernels()
    return FallbackKernels(
        "torch.compile", {name: torch.compile(getattr(bodies, name), dynamic=True) for name in PASSES}
    )


@functools.cache
def triton_kernels() -> Kernels:
    """The Triton kernels, or plain torch where Triton is not installed."""
    try:
        from elastic_moe.model.residual.triton import TritonKernels
    except ImportError as error:
        warnings.warn(f"mHC runs without Triton: {error}", stacklevel=2)
        return EagerKernels()
    kernels = TritonKernels()
    return FallbackKernels("Triton", {name: getattr(kernels, name) for name in PASSES})


def choose_kernels(fused: str, device: torch.device) -> Kernels:
    """The kernels for a setting of `model.fused` on a device.

    "auto" is blocked on CPUs, where nothing measured faster and compiling takes longer than many runs, and compiled on GPUs; "off" is
    blocked on CPUs and plain on GPUs.
    """
    if fused == "triton":
        return triton_kernels()
    if fused == "compile" or (fused == "auto" and device.type == "cuda"):
        return compiled_kernels()
    return BlockedKernels() if device.type == "cpu" else EagerKernels()
