"""Rotary position embedding: tables of cosine and sine, and the rotation of channels by them.

Sources: RoPE, Su et al. 2021 (arXiv 2104.09864); YaRN, Peng et al. 2023 (arXiv 2309.00071), with `mscale` as in
DeepSeek-V2 (arXiv 2405.04434) and transformers.

Shapes: S positions, d rotary width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from elastic_moe.config.schema import ModelConfig

Tables = tuple[torch.Tensor, torch.Tensor]  # cosine and sine, each [S, d / 2]


def rope_tables(cfg: ModelConfig, positions: torch.Tensor, width: int, theta: float, yarn: bool) -> Tables:
    """Cosine and sine of every (position, frequency), fp32.

    Args:
        cfg: settings of YaRN.
        positions: int64 [S].
        width: rotary width d.
        theta: base of the frequencies.
        yarn: scale frequencies and tables by YaRN, where `rope_factor` is above 1.
    """
    device = positions.device
    frequency = theta ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    factor = 1.0
    if yarn and cfg.rope_factor > 1:
        frequency = _yarn(cfg, frequency, width, theta)
        factor = yarn_attention_factor(cfg)
    angles = torch.outer(positions.float(), frequency)
    return angles.cos() * factor, angles.sin() * factor


def _yarn(cfg: ModelConfig, frequency: torch.Tensor, width: int, theta: float) -> torch.Tensor:
    """Frequencies of YaRN: low ones divided by the factor, high ones kept, a ramp between (its section 3.2)."""

    def dimension(rotations: float) -> float:
        return width * math.log(cfg.rope_original_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(cfg.rope_beta_fast)), 0)
    high = min(math.ceil(dimension(cfg.rope_beta_slow)), width - 1)
    index = torch.arange(width // 2, device=frequency.device, dtype=torch.float32)
    ramp = ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return frequency / cfg.rope_factor * ramp + frequency * (1 - ramp)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 m ln(factor) + 1 (arXiv 2309.00071, equation 22); 1 where the factor does not exceed 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_attention_factor(cfg: ModelConfig) -> float:
    """Factor on cosine and sine. DeepSeek-V4 uses none."""
    if cfg.attention == "csa":
        return 1.0
    if cfg.rope_mscale and cfg.rope_mscale_all_dim:
        return yarn_mscale(cfg.rope_factor, cfg.rope_mscale) / yarn_mscale(cfg.rope_factor, cfg.rope_mscale_all_dim)
    return yarn_mscale(cfg.rope_factor)


def rotate(x: torch.Tensor, tables: Tables, interleave: bool) -> torch.Tensor:
    """Rotate each pair of channels by its position's angle. The dtype is kept; the rotation itself is fp32.

    This holds under autocast too, because in bf16 the angles of far positions lose their low bits.

    Args:
        x: [..., S, d].
        tables: of these positions and this width.
        interleave: pairs are (2i, 2i + 1) as in DeepSeek, else (i, i + d / 2) as in Llama.
    """
    return _Rotate.apply(x, *tables, interleave)


def _pairs(x: torch.Tensor, interleave: bool) -> tuple[torch.Tensor, ...]:
    """Views of the first and the second channel of each pair."""
    return x.unflatten(-1, (-1, 2)).unbind(-1) if interleave else x.chunk(2, dim=-1)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    out = torch.empty(x.shape, dtype=wide.dtype, device=x.device)
    (first, second), (out_first, out_second) = _pairs(wide, interleave), _pairs(out, interleave)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out.to(x.dtype)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation by the opposite angle (scaled alike, where YaRN scales)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleave = interleave
        return _rotated(x, cos, sin, interleave)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, -sin, ctx.interleave), None, None, None


def rotate_tail(x: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Rotate the last d channels of each head, in interleaved pairs; d is the width of the tables."""
    width = 2 * tables[0].shape[-1]
    return torch.cat((x[..., :-width], rotate(x[..., -width:], tables, interleave=True)), dim=-1)


def rotate_front(x: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Rotate the first d channels of each head, in pairs (i, i + d / 2); d is the width of the tables."""
    width = 2 * tables[0].shape[-1]
    if width == x.shape[-1]:
        return rotate(x, tables, interleave=False)
    return torch.cat((rotate(x[..., :width], tables, interleave=False), x[..., width:]), dim=-1)
