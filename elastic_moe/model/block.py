"""One transformer layer: attention and feed-forward around a residual. The feed-forward is dense or has experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.attention.compressed import CompressedAttention
from elastic_moe.model.attention.context import AttentionContext
from elastic_moe.model.attention.dense import Attention, GroupedQueryAttention, LatentAttention
from elastic_moe.model.backend import ExpertBackend
from elastic_moe.model.layers import RMSNorm, SwiGLU, compute_dtype
from elastic_moe.model.moe import MoE
from elastic_moe.model.recompute import part_of_layer
from elastic_moe.model.residual.connections import Residual, Segments, make_residual


class BlockOutput(NamedTuple):
    """One layer's output.

    Attributes:
        x: the residual after the layer.
        balance_loss: summed over sequences; None in a dense layer.
        index_loss: summed over tokens; None where attention has no indexer.
        router_z: z-loss of the router, summed over tokens; None in a dense layer.
        load_E: int64, tokens routed to each expert; None in a dense layer.
        maps: H_res of both sub-layers; empty without streams.
    """

    x: torch.Tensor
    balance_loss: torch.Tensor | None
    index_loss: torch.Tensor | None
    router_z: torch.Tensor | None
    load_E: torch.Tensor | None
    maps: list[torch.Tensor]


def make_attention(cfg: ModelConfig, layer: int) -> Attention:
    """The attention of a layer, of the kind `model.attention`."""
    kinds = {"gqa": GroupedQueryAttention, "mla": LatentAttention, "csa": CompressedAttention}
    return kinds[cfg.attention](cfg, layer)


class Block(nn.Module):
    """One transformer layer: `mlp` in the leading dense layers, `moe` in the others."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self._cfg = cfg
        self.attn_mix: Residual = make_residual(cfg, 2 * layer)
        self.attn_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.attn: Attention = make_attention(cfg, layer)
        self.ffn_mix: Residual = make_residual(cfg, 2 * layer + 1)
        self.ffn_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        dense = layer < cfg.num_dense_layers
        self.mlp = SwiGLU(cfg, cfg.dense_hidden) if dense else None
        self.moe = None if dense else MoE(cfg, layer - cfg.num_dense_layers)

    def forward(
        self,
        x: torch.Tensor,
        tokens_BS: torch.Tensor,
        context: AttentionContext,
        segments: Segments,
        experts: ExpertBackend,
    ) -> BlockOutput:
        x, h_BSD, attn_link = self.attn_mix.read(x, segments)
        y_BSD, index_loss = part_of_layer(self._cfg, self._attend, h_BSD, context)
        x = self.attn_mix.write(x, y_BSD, attn_link)
        x, h_BSD, ffn_link = self.ffn_mix.read(x, segments)
        balance_loss, load_E, router_z = None, None, None
        if self.moe is not None:
            y_BSD, balance_loss, load_E, router_z = self.moe(self.ffn_norm(h_BSD), tokens_BS, experts)
        else:
            y_BSD = part_of_layer(self._cfg, self._feed_forward, h_BSD)
        x = self.ffn_mix.write(x, y_BSD, ffn_link)
        maps = [self.attn_mix.residual_map(attn_link), self.ffn_mix.residual_map(ffn_link)]
        return BlockOutput(x, balance_loss, index_loss, router_z, load_E, [m for m in maps if m is not None])

    def _attend(self, h_BSD: torch.Tensor, context: AttentionContext) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Norm and attention."""
        normed_BSD = self.attn_norm(h_BSD)
        return self.attn(normed_BSD.to(compute_dtype(normed_BSD)), context)  # cast once for all products

    def _feed_forward(self, h_BSD: torch.Tensor) -> torch.Tensor:
        """Norm and dense feed-forward."""
        assert self.mlp is not None
        normed_BSD = self.ffn_norm(h_BSD)
        return self.mlp(normed_BSD.to(compute_dtype(normed_BSD)))
