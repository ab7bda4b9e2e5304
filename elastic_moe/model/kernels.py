"""Which kernels mix the streams: plain torch, or its bodies through torch.compile."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from elastic_moe.model.mhc import EagerKernels, FusableKernels, Kernels


class CompiledKernels(FusableKernels):
    """The fusable bodies, each compiled once; what the compiler cannot do is done eagerly from then on, with one warning."""

    def __init__(self) -> None:
        for name in ("read", "read_backward", "write", "write_backward"):
            setattr(self, name, _compiled(getattr(FusableKernels(), name), getattr(EagerKernels(), name)))


def _compiled(body: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    fast: list[Callable[..., Any]] = [torch.compile(body, dynamic=True)]

    @functools.wraps(body)
    def run(*args: Any) -> Any:
        if args[0].numel() == 0:
            return instead(*args)
        try:
            return fast[0](*args)
        except Exception as error:  # noqa: BLE001 - a compiler that is missing or fails; the eager twin tells real faults
            if fast[0] is instead:
                raise
            warnings.warn(f"mHC runs without torch.compile: {str(error).splitlines()[0]}", stacklevel=2)
            fast[0] = instead
            return instead(*args)

    return run


@functools.cache
def _compiled_kernels() -> Kernels:
    return CompiledKernels()


def choose_kernels(fused: str, device: torch.device) -> Kernels:
    """The kernels for a setting of `model.fused` on a device; "auto" compiles on GPUs and not on CPUs, where compiling takes longer than many runs."""
    if fused == "compile" or (fused == "auto" and device.type == "cuda"):
        return _compiled_kernels()
    return EagerKernels()
