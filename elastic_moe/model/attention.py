"""Grouped-query causal attention with rotary positions.

Sources: GQA, Ainslie et al. 2023 (arXiv 2305.13245); RoPE, Su et al. 2021 (arXiv 2104.09864), in the half-split layout
of Llama and GLM (element i pairs with i + d/2), so weights map one to one onto those models.
Rotation runs in fp32 also under autocast: in bf16 angles of far positions lose their low bits.

Shapes: B sequences, S positions, D hidden, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from elastic_moe.config.schema import ModelConfig


def rope_tables(seq_len: int, head_dim: int, theta: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every (position, frequency), fp32 [S, d/2] each."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), theta**-exponents)
    return angles.cos(), angles.sin()


def apply_rope(x_BHSd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (i, i + d/2) of every head by its position's angle; dtype is kept."""
    first, second = x_BHSd.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BHSd.dtype)


class Attention(nn.Module):
    """Causal self-attention; `num_heads` must be a multiple of `num_kv_heads`."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        assert cfg.num_heads % cfg.num_kv_heads == 0, "num_heads must be a multiple of num_kv_heads"
        assert cfg.head_dim % 2 == 0, "head_dim must be even for rotary positions"
        self._heads, self._kv_heads, self._width = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.q = nn.Linear(cfg.hidden_size, cfg.num_heads * cfg.head_dim, bias=False)
        self.k = nn.Linear(cfg.hidden_size, cfg.num_kv_heads * cfg.head_dim, bias=False)
        self.v = nn.Linear(cfg.hidden_size, cfg.num_kv_heads * cfg.head_dim, bias=False)
        self.o = nn.Linear(cfg.num_heads * cfg.head_dim, cfg.hidden_size, bias=False)

    def forward(self, x_BSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, seq_len, _ = x_BSD.shape
        q_BHSd = self.q(x_BSD).view(batch, seq_len, self._heads, self._width).transpose(1, 2)
        k_BGSd = self.k(x_BSD).view(batch, seq_len, self._kv_heads, self._width).transpose(1, 2)
        v_BGSd = self.v(x_BSD).view(batch, seq_len, self._kv_heads, self._width).transpose(1, 2)
        out_BHSd = F.scaled_dot_product_attention(
            apply_rope(q_BHSd, cos, sin),
            apply_rope(k_BGSd, cos, sin),
            v_BGSd,
            is_causal=True,
            enable_gqa=self._heads != self._kv_heads,
        )
        return self.o(out_BHSd.transpose(1, 2).reshape(batch, seq_len, self._heads * self._width))
