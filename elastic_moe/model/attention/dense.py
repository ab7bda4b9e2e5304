"""Causal self-attention over whole sequences: grouped-query (GQA), and multi-head latent (MLA).

Sources: GQA, Ainslie et al. 2023 (arXiv 2305.13245), with the RMSNorm of queries and keys of Qwen3 (arXiv 2505.09388);
MLA, DeepSeek-V2 (arXiv 2405.04434, section 2.1) as in DeepSeek-V3 (arXiv 2412.19437, equations 1 to 11). DeepSeek-V4's
attention is in compressed.py.

Shapes: B sequences, S positions, L positions so far, D hidden, H heads, G key/value heads, d head width, v value width,
C latent, r rotary width.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.attention.context import AttentionContext, LayerCache
from elastic_moe.model.attention.rope import rotate, rotate_front, yarn_mscale
from elastic_moe.model.has_triton import has_triton
from elastic_moe.model.init import init_in, init_out
from elastic_moe.model.layers import Linear, RMSNorm

LATENT_EPS = 1e-6  # of the latents' norms: transformers uses this value, not the model's own


class Attention(Protocol):
    """One layer's attention."""

    def __call__(self, x_BSD: torch.Tensor, context: AttentionContext) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(y_BSD, the layer's own loss summed over tokens, or None where it has none)."""
        ...


def attend(
    q_BHSd: torch.Tensor, k_BGLd: torch.Tensor, v_BGLd: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Scaled dot-product attention: [B, H, S, width of v]. Values may be narrower than keys.

    The kernels that never form the matrix of scores need equal widths. So narrower values are padded with zeros, which
    needs less memory than the scores.

    Args:
        q_BHSd: queries.
        k_BGLd, v_BGLd: keys and values, shared by H / G heads each.
        mask: true where a query sees a key; None for plain causality.
        scale: factor on the scores.
    """
    width = v_BGLd.shape[-1]
    if width < q_BHSd.shape[-1]:
        v_BGLd = F.pad(v_BGLd, (0, q_BHSd.shape[-1] - width))
    grouped = q_BHSd.shape[1] != k_BGLd.shape[1]
    out = F.scaled_dot_product_attention(
        q_BHSd, k_BGLd, v_BGLd, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return out[..., :width]


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention: heads share keys and values in groups; `num_heads` is a multiple of `num_kv_heads`."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self._cfg, self._layer = cfg, layer
        width, bias = cfg.head_dim, cfg.attention_bias
        self.q = Linear(cfg.hidden_size, cfg.num_heads * width, init_in(cfg), bias)
        self.k = Linear(cfg.hidden_size, cfg.num_kv_heads * width, init_in(cfg), bias)
        self.v = Linear(cfg.hidden_size, cfg.num_kv_heads * width, init_in(cfg), bias)
        self.o = Linear(cfg.num_heads * width, cfg.hidden_size, init_out(cfg), bias and cfg.output_bias)
        self.q_norm = RMSNorm(width, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(self, x_BSD: torch.Tensor, context: AttentionContext) -> tuple[torch.Tensor, None]:
        cfg, cache = self._cfg, context.layer_cache(self._layer)
        heads = (-1, cfg.head_dim)
        tables = context.rope(cfg.rotated_dim, cfg.rope_theta, yarn=True)
        q_BHSd = rotate_front(self.q_norm(self.q(x_BSD).unflatten(-1, heads)).transpose(1, 2), tables)
        k_BGSd = rotate_front(self.k_norm(self.k(x_BSD).unflatten(-1, heads)).transpose(1, 2), tables)
        v_BSGd = self.v(x_BSD).unflatten(-1, heads)
        if cache is not None:
            k_BGSd = cache.extend("k", k_BGSd.transpose(1, 2)).transpose(1, 2)
            v_BSGd = cache.extend("v", v_BSGd)
        out_BHSd = attend(q_BHSd, k_BGSd, v_BSGd.transpose(1, 2), context.mask(), cfg.head_dim**-0.5)
        return self.o(out_BHSd.transpose(1, 2).flatten(2)), None


class LatentAttention(nn.Module):
    """Multi-head latent attention: the keys and values of all heads come from one latent per token.

    A head's query and key have a part without position (DeepSeek's `nope`) and a rotated part (`rope`). The rotated key
    is shared by all heads. The cache keeps the latent and the rotated key, `kv_latent + rope_dim` numbers per token.
    With a cache, queries are brought into the latent space and keys are never formed (the absorbed form:
    q . (W c) = (W^T q) . c).
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self._cfg, self._layer = cfg, layer
        heads, bias = cfg.num_heads, cfg.attention_bias
        query = heads * (cfg.head_dim + cfg.rope_dim)
        if cfg.query_latent:
            self.q_down = Linear(cfg.hidden_size, cfg.query_latent, init_in(cfg), bias)
            self.q_norm = RMSNorm(cfg.query_latent, LATENT_EPS)
            self.q_up = Linear(cfg.query_latent, query, init_in(cfg))
        else:
            self.q = Linear(cfg.hidden_size, query, init_in(cfg))
        self.kv_down = Linear(cfg.hidden_size, cfg.kv_latent + cfg.rope_dim, init_in(cfg), bias)
        self.kv_norm = RMSNorm(cfg.kv_latent, LATENT_EPS)
        self.kv_up = Linear(cfg.kv_latent, heads * (cfg.head_dim + cfg.value_dim), init_in(cfg))
        self.o = Linear(heads * cfg.value_dim, cfg.hidden_size, init_out(cfg), bias)
        self._scale = (cfg.head_dim + cfg.rope_dim) ** -0.5
        if cfg.rope_factor > 1 and cfg.rope_mscale_all_dim:
            self._scale *= yarn_mscale(cfg.rope_factor, cfg.rope_mscale_all_dim) ** 2

    def forward(self, x_BSD: torch.Tensor, context: AttentionContext) -> tuple[torch.Tensor, None]:
        cfg, cache = self._cfg, context.layer_cache(self._layer)
        query = self.q_up(self.q_norm(self.q_down(x_BSD))) if cfg.query_latent else self.q(x_BSD)
        q_BSHd = query.unflatten(-1, (cfg.num_heads, -1))
        latent_BSC, k_rope_BSr = self.kv_down(x_BSD).split([cfg.kv_latent, cfg.rope_dim], dim=-1)
        latent_BSC = self.kv_norm(latent_BSC)
        if cache is None and cfg.value_dim <= cfg.head_dim + cfg.rope_dim and has_triton(x_BSD.device):
            out_BHSv = self._expanded_by_triton(q_BSHd, latent_BSC, k_rope_BSr, context)
            return self.o(out_BHSv.transpose(1, 2).flatten(2)), None
        tables = context.rope(cfg.rope_dim, cfg.rope_theta, yarn=True)
        q_nope_BHSd, q_rope_BHSr = q_BSHd.transpose(1, 2).split([cfg.head_dim, cfg.rope_dim], dim=-1)
        q_rope_BHSr = rotate(q_rope_BHSr, tables, cfg.rope_interleave)
        k_rope_BSr = rotate(k_rope_BSr, tables, cfg.rope_interleave)
        if cache is None:
            out_BHSv = self._expanded(q_nope_BHSd, q_rope_BHSr, latent_BSC, k_rope_BSr, context)
        else:
            out_BHSv = self._absorbed(q_nope_BHSd, q_rope_BHSr, latent_BSC, k_rope_BSr, context, cache)
        return self.o(out_BHSv.transpose(1, 2).flatten(2)), None

    def _expanded_by_triton(
        self, q_BSHd: torch.Tensor, latent_BSC: torch.Tensor, k_rope_BSr: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """As `_expanded`, from queries and keys that are not rotated yet."""
        from elastic_moe.model.attention.triton import ExpandKeys, TurnTail

        cfg = self._cfg
        tables = context.rope(cfg.rope_dim, cfg.rope_theta, yarn=True)
        kv_BSHd = self.kv_up(latent_BSC).unflatten(-1, (cfg.num_heads, -1))
        q = TurnTail.apply(q_BSHd, *tables, cfg.rope_interleave)
        k, v = ExpandKeys.apply(kv_BSHd, k_rope_BSr, *tables, cfg.head_dim, cfg.rope_interleave)
        q_BHSd, k_BHSd, v_BHSd = (t.transpose(1, 2) for t in (q, k, v))
        out = attend(q_BHSd, k_BHSd, v_BHSd, context.mask(), self._scale)
        return out[..., : cfg.value_dim]

    def _expanded(
        self,
        q_nope_BHSd: torch.Tensor,
        q_rope_BHSr: torch.Tensor,
        latent_BSC: torch.Tensor,
        k_rope_BSr: torch.Tensor,
        context: AttentionContext,
    ) -> torch.Tensor:
        """Attention with keys and values formed for every head: cheaper where all positions are computed at once."""
        cfg = self._cfg
        kv_BHSd = self.kv_up(latent_BSC).unflatten(-1, (cfg.num_heads, -1)).transpose(1, 2)
        k_BHSd, v_BHSv = kv_BHSd.split([cfg.head_dim, cfg.value_dim], dim=-1)
        shared_BHSr = k_rope_BSr.unsqueeze(1).expand(-1, cfg.num_heads, -1, -1)
        q, k = torch.cat((q_nope_BHSd, q_rope_BHSr), dim=-1), torch.cat((k_BHSd, shared_BHSr), dim=-1)
        return attend(q, k, v_BHSv, context.mask(), self._scale)

    def _absorbed(
        self,
        q_nope_BHSd: torch.Tensor,
        q_rope_BHSr: torch.Tensor,
        latent_BSC: torch.Tensor,
        k_rope_BSr: torch.Tensor,
        context: AttentionContext,
        cache: LayerCache,
    ) -> torch.Tensor:
        """Attention in the latent space, with one key per position for all heads."""
        cfg = self._cfg
        latent_BLC, k_rope_BLr = cache.extend("latent", latent_BSC), cache.extend("key", k_rope_BSr)
        up_HdC = self.kv_up.weight.to(latent_BLC.dtype).view(cfg.num_heads, -1, cfg.kv_latent)
        for_keys_HdC, for_values_HvC = up_HdC.split([cfg.head_dim, cfg.value_dim], dim=1)
        q_BHSC = torch.cat((torch.einsum("bhsd,hdc->bhsc", q_nope_BHSd, for_keys_HdC), q_rope_BHSr), dim=-1)
        k_BGLC = torch.cat((latent_BLC, k_rope_BLr), dim=-1).unsqueeze(1)
        out_BHSC = attend(q_BHSC, k_BGLC, latent_BLC.unsqueeze(1), context.mask(), self._scale)
        return torch.einsum("bhsc,hvc->bhsv", out_BHSC, for_values_HvC)
