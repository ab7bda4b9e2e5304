"""Attention of a model of elastic_moe for transformers: grouped-query, or multi-head latent. See modeling_elastic_moe.

Shapes: B sequences, S positions, D hidden, H heads, d head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

LATENT_EPS = 1e-6


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_tables(c: Any, positions_BS: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, each [B, 1, S, width / 2]."""
    index = torch.arange(width // 2, device=positions_BS.device, dtype=torch.float32)
    frequency, factor = c.rope_theta ** -(2 * index / width), 1.0
    if c.rope_factor > 1:

        def channel(rotations: float) -> float:
            return width * math.log(c.rope_original_len / (rotations * 2 * math.pi)) / (2 * math.log(c.rope_theta))

        low = max(math.floor(channel(c.rope_beta_fast)), 0)
        high = min(math.ceil(channel(c.rope_beta_slow)), width - 1)
        ramp = ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        frequency = frequency / c.rope_factor * ramp + frequency * (1 - ramp)
        factor = yarn_mscale(c.rope_factor)
        if c.rope_mscale and c.rope_mscale_all_dim:
            factor = yarn_mscale(c.rope_factor, c.rope_mscale) / yarn_mscale(c.rope_factor, c.rope_mscale_all_dim)
    angles = positions_BS[:, None, :, None].float() * frequency
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], interleave: bool) -> torch.Tensor:
    """Rotate the first channels of [B, H, S, d], as many as the tables have."""
    cos, sin = tables
    turned, rest = x[..., : 2 * cos.shape[-1]].float(), x[..., 2 * cos.shape[-1] :]
    first, second = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleave else turned.chunk(2, dim=-1)
    a, b = first * cos - second * sin, second * cos + first * sin
    out = torch.stack((a, b), dim=-1).flatten(-2) if interleave else torch.cat((a, b), dim=-1)
    return torch.cat((out.to(x.dtype), rest), dim=-1)


class GroupedQueryAttention(nn.Module):
    def __init__(self, c: Any, layer: int) -> None:
        super().__init__()
        self.c, self.layer, bias = c, layer, c.attention_bias
        self.q = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=bias)
        self.k = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=bias)
        self.v = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=bias)
        self.o = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=bias and c.output_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.rotated, self.scale = int(c.head_dim * c.rope_fraction), c.head_dim**-0.5

    def heads(self, x_BSD: torch.Tensor, positions_BS: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tables, split = rope_tables(self.c, positions_BS, self.rotated), (-1, self.c.head_dim)
        q = self.q_norm(self.q(x_BSD).unflatten(-1, split)).transpose(1, 2)
        k = self.k_norm(self.k(x_BSD).unflatten(-1, split)).transpose(1, 2)
        v = self.v(x_BSD).unflatten(-1, split).transpose(1, 2)
        return rotate(q, tables, False), rotate(k, tables, False), v


class LatentAttention(nn.Module):
    def __init__(self, c: Any, layer: int) -> None:
        super().__init__()
        self.c, self.layer, bias = c, layer, c.attention_bias
        query = c.num_heads * (c.head_dim + c.rope_dim)
        if c.query_latent:
            self.q_down = nn.Linear(c.hidden_size, c.query_latent, bias=bias)
            self.q_norm = RMSNorm(c.query_latent, LATENT_EPS)
            self.q_up = nn.Linear(c.query_latent, query, bias=False)
        else:
            self.q = nn.Linear(c.hidden_size, query, bias=False)
        self.kv_down = nn.Linear(c.hidden_size, c.kv_latent + c.rope_dim, bias=bias)
        self.kv_norm = RMSNorm(c.kv_latent, LATENT_EPS)
        self.kv_up = nn.Linear(c.kv_latent, c.num_heads * (c.head_dim + c.value_dim), bias=False)
        self.o = nn.Linear(c.num_heads * c.value_dim, c.hidden_size, bias=bias)
        self.scale = (c.head_dim + c.rope_dim) ** -0.5
        if c.rope_factor > 1 and c.rope_mscale_all_dim:
            self.scale *= yarn_mscale(c.rope_factor, c.rope_mscale_all_dim) ** 2

    def heads(self, x_BSD: torch.Tensor, positions_BS: torch.Tensor) -> tuple[torch.Tensor, ...]:
        c, tables = self.c, rope_tables(self.c, positions_BS, self.c.rope_dim)
        query = self.q_up(self.q_norm(self.q_down(x_BSD))) if c.query_latent else self.q(x_BSD)
        q_nope, q_rope = query.unflatten(-1, (c.num_heads, -1)).transpose(1, 2).split([c.head_dim, c.rope_dim], dim=-1)
        latent, k_rope = self.kv_down(x_BSD).split([c.kv_latent, c.rope_dim], dim=-1)
        kv = self.kv_up(self.kv_norm(latent)).unflatten(-1, (c.num_heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([c.head_dim, c.value_dim], dim=-1)
        q_rope = rotate(q_rope, tables, c.rope_interleave)
        k_rope = rotate(k_rope.unsqueeze(1), tables, c.rope_interleave).expand(-1, c.num_heads, -1, -1)
        return torch.cat((q_nope, q_rope), dim=-1), torch.cat((k_nope, k_rope), dim=-1), v
