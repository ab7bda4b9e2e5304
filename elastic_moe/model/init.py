"""Initial values: how a parameter is declared, and its tensor for a seed and a name.

A parameter's initial value is a pure function of (seed, name) and its specification. So any rank can make any part of
the model by itself, at any world size, and gets the same bits.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.types import ParamSpec

_ROWS_AT_ONCE = 4096  # rows of a hash layer's table drawn in one call


@dataclass(frozen=True, slots=True)
class Init:
    """A parameter's initial value and its optimizer; the fields are those of `types.ParamSpec`."""

    init: str = "normal"
    std: float = 0.02
    values: tuple[float, ...] = ()
    bound: int = 0
    optimizer: str = "adamw"
    decay: bool = True
    stacked: int = 1


def init_in(cfg: ModelConfig) -> Init:
    """Declaration of a matrix that reads the residual stream."""
    return Init(std=cfg.init_std)


def init_out(cfg: ModelConfig) -> Init:
    """Declaration of a projection back into the residual stream: GPT-2's depth scaling (Radford et al. 2019, 2.3)."""
    return Init(std=cfg.init_std / math.sqrt(2 * cfg.num_layers))


def constant(value: float) -> Init:
    """Declaration of zeros or ones, without weight decay."""
    return Init(init={0.0: "zeros", 1.0: "ones"}[value], decay=False)


def init_param(spec: ParamSpec, seed: int) -> torch.Tensor:
    """Initial fp32 value on the CPU. It depends on (seed, name) and the specification alone, not on the caller."""
    if spec.init == "zeros":
        return torch.zeros(spec.shape)
    if spec.init == "ones":
        return torch.ones(spec.shape)
    if spec.init == "values":
        return torch.tensor(spec.values, dtype=torch.float32).view(spec.shape)
    digest = hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if spec.init == "experts":
        rows, width = spec.shape
        sizes = [min(_ROWS_AT_ONCE, rows - start) for start in range(0, rows, _ROWS_AT_ONCE)]
        picks = [torch.rand((size, spec.bound), generator=generator).topk(width, dim=1).indices for size in sizes]
        return torch.cat(picks).float()
    assert spec.init == "normal", spec.init
    return torch.randn(spec.shape, generator=generator, dtype=torch.float32).mul_(spec.std)
