"""Whether Triton's kernels run here. Every caller has a form in plain torch for where they do not."""

from __future__ import annotations

import functools
import warnings

import torch


def has_triton(device: torch.device) -> bool:
    """Whether Triton compiles for a device. If a GPU is refused, one warning says why."""
    return device.type == "cuda" and _compiles()


@functools.cache
def _compiles() -> bool:
    try:
        from elastic_moe.model.triton_probe import probe

        probe(torch.device("cuda"))
    except Exception as error:  # noqa: BLE001 - a compiler may be missing; a fault of the GPU shows in plain torch too
        warnings.warn(f"Triton does not work here, and plain torch is used: {str(error).splitlines()[0]}", stacklevel=3)
        return False
    return True
