"""The MoE language model: blocks of attention and feed-forward around a residual, first dense ones, then MoE ones.

The routed experts are in a backend outside the module tree. So this module's parameters are exactly those that every
rank has in full, and a new generation replaces the backend without touching the model. Losses are sums, never means.
The global token count divides once, when the update is applied, so nothing depends on which rank computed which part.

Multi-token prediction is that of DeepSeek-V3 (arXiv 2412.19437, section 2.2) at depth 1. The hidden state and the
embedding of the next token, both normalised, are projected together and pass one more block. The shared head then
predicts the token after the next. With streams the projection works on each stream, because the block continues them
(so do implementations of DeepSeek-V4; the reports do not say).

Shapes: B sequences, S positions, D hidden, V vocabulary, L MoE layers, E experts, n streams.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.attention.compressed import CompressedAttention
from elastic_moe.model.attention.context import AttentionContext, KVCache
from elastic_moe.model.attention.dense import Attention, GroupedQueryAttention, LatentAttention
from elastic_moe.model.backend import ExpertBackend
from elastic_moe.model.init import Init, init_in, init_param
from elastic_moe.model.layers import DeclaredModule, Embedding, Linear, RMSNorm, SwiGLU, compute_dtype
from elastic_moe.model.moe import MoE
from elastic_moe.model.residual.connections import (
    ReadOut,
    Residual,
    Segments,
    composite_gains,
    expand_streams,
    make_residual,
)
from elastic_moe.types import ModelStats, ParamSpec

STATS = tuple(item.name for item in fields(ModelStats))


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Sums over the tokens of one micro-batch; all zero for an empty one.

    Attributes:
        loss_sum: the value to differentiate: cross-entropy plus the other losses, weighted, all summed over tokens.
        ce_sum: cross-entropy alone, detached, fp32.
        num_tokens: number of targets.
        load_LE: int64, tokens routed to each expert of each MoE layer.
        stats: fp64, the values of `ModelStats` in its order; the gains are 0 unless asked for.

    All are on the device of the model, which nothing waits for.
    """

    loss_sum: torch.Tensor
    ce_sum: torch.Tensor
    num_tokens: int
    load_LE: torch.Tensor
    stats: torch.Tensor


class BlockOutput(NamedTuple):
    """One layer's output.

    Attributes:
        x: the residual after the layer.
        balance_loss: summed over sequences; None in a dense layer.
        index_loss: summed over tokens; None where attention has no indexer.
        load_E: int64, tokens routed to each expert; None in a dense layer.
        maps: H_res of both sub-layers; empty without streams.
    """

    x: torch.Tensor
    balance_loss: torch.Tensor | None
    index_loss: torch.Tensor | None
    load_E: torch.Tensor | None
    maps: list[torch.Tensor]


class StackOutput(NamedTuple):
    """The output of all layers: as `BlockOutput`, with losses summed over layers, loads and maps in their order."""

    x: torch.Tensor
    balance_loss: torch.Tensor
    index_loss: torch.Tensor
    loads: list[torch.Tensor]
    maps: list[torch.Tensor]


class MTPOutput(NamedTuple):
    """The output of multi-token prediction: the sum of its cross-entropy, and the rest as in `BlockOutput`."""

    ce_sum: torch.Tensor
    balance_loss: torch.Tensor
    index_loss: torch.Tensor
    load_E: torch.Tensor


def make_attention(cfg: ModelConfig, layer: int) -> Attention:
    """The attention of a layer, of the kind `model.attention`."""
    kinds = {"gqa": GroupedQueryAttention, "mla": LatentAttention, "csa": CompressedAttention}
    return kinds[cfg.attention](cfg, layer)


class Block(nn.Module):
    """One transformer layer: `mlp` in the leading dense layers, `moe` in the others."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
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
        normed_BSD = self.attn_norm(h_BSD)
        y_BSD, index_loss = self.attn(normed_BSD.to(compute_dtype(normed_BSD)), context)  # once for all products
        x = self.attn_mix.write(x, y_BSD, attn_link)
        x, h_BSD, ffn_link = self.ffn_mix.read(x, segments)
        h_BSD = self.ffn_norm(h_BSD)
        balance_loss, load_E = None, None
        if self.moe is not None:
            y_BSD, balance_loss, load_E = self.moe(h_BSD, tokens_BS, experts)
        else:
            assert self.mlp is not None
            y_BSD = self.mlp(h_BSD.to(compute_dtype(h_BSD)))
        x = self.ffn_mix.write(x, y_BSD, ffn_link)
        maps = [self.attn_mix.residual_map(attn_link), self.ffn_mix.residual_map(ffn_link)]
        return BlockOutput(x, balance_loss, index_loss, load_E, [m for m in maps if m is not None])


class MultiTokenPrediction(nn.Module):
    """Multi-token prediction of depth 1: hidden states and next tokens -> hidden states of the tokens after them."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self._cfg = cfg
        self.hidden_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.embed_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.proj = Linear(2 * cfg.hidden_size, cfg.hidden_size, init_in(cfg))
        self.block = Block(cfg, cfg.num_layers)
        self.readout = ReadOut(cfg)
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)

    def project(self, x: torch.Tensor, next_BSD: torch.Tensor) -> torch.Tensor:
        """The block's input, of the shape of x, from x and the embedding of the next token."""
        embedded = self.embed_norm(next_BSD)
        if self._cfg.has_streams:
            embedded = embedded.unsqueeze(2).expand(x.shape)
        hidden = self.hidden_norm(x)
        return self.proj(torch.cat((hidden, embedded.to(hidden.dtype)), dim=-1)).to(x.dtype)


class Transformer(nn.Module):
    """The model without its routed experts.

    Args:
        cfg: the model's shape.
        experts: backend of the routed experts. It may be set later, and replaced between steps.
    """

    experts: ExpertBackend | None  # kept out of the module tree, even where the backend is a module itself

    def __init__(self, cfg: ModelConfig, experts: ExpertBackend | None = None) -> None:
        super().__init__()
        self._cfg = cfg
        self.experts = experts
        self.embed = Embedding(cfg.vocab_size, cfg.hidden_size, Init(std=cfg.init_std))
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        self.readout = ReadOut(cfg)
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.head = Linear(cfg.hidden_size, cfg.vocab_size, Init(std=cfg.init_std))
        self.mtp = MultiTokenPrediction(cfg) if cfg.mtp_depth else None

    def __setattr__(self, name: str, value: object) -> None:
        if name == "experts":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, cast(Any, value))

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set every parameter and buffer to its initial value, that of `init_param` for this seed."""
        for path, module in self.named_modules():
            if isinstance(module, DeclaredModule):
                for name, init in module.inits.items():
                    tensor = getattr(module, name)
                    spec = ParamSpec(f"{path}.{name}", tuple(tensor.shape), **asdict(init))
                    tensor.copy_(init_param(spec, seed))

    def forward(self, tokens_BS: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Logits [B, S, V]. With a cache, the tokens follow those of its earlier calls, and are added to it."""
        context = AttentionContext(self._cfg, tokens_BS.shape[1], tokens_BS.device, None, cache)
        x = self._run(tokens_BS, context).x
        if cache is not None:
            cache.length += tokens_BS.shape[1]
        return self.head(self.norm(self.readout(x)))

    def loss(
        self, tokens_BS: torch.Tensor, targets_BS: torch.Tensor, mtp_weight: float | None = None, gains: bool = False
    ) -> LossOutput:
        """Unnormalised loss of one micro-batch. An empty one (B = 0) calls the backend of every layer too, both ways.

        Args:
            tokens_BS: int64.
            targets_BS: int64, the next token of each position.
            mtp_weight: weight of the multi-token prediction; None for `cfg.mtp_weight`.
            gains: compute the composite gains of the first sequence.
        """
        cfg = self._cfg
        context = AttentionContext(cfg, tokens_BS.shape[1], tokens_BS.device, self._documents(tokens_BS))
        x, balance_loss, index_loss, loads, maps = self._run(tokens_BS, context)
        ce_sum = self._cross_entropy(self.readout(x), self.norm, targets_BS)
        loss_sum = ce_sum + cfg.index_loss_weight * index_loss
        stats = torch.zeros(len(STATS), dtype=torch.float64, device=ce_sum.device)
        if self.mtp is not None:
            weight = cfg.mtp_weight if mtp_weight is None else mtp_weight
            mtp = self._predict_after_next(self.mtp, x, tokens_BS, targets_BS)
            balance_loss = balance_loss + mtp.balance_loss
            loads.append(mtp.load_E)
            count = targets_BS[:, 1:].numel()
            per_target = targets_BS.numel() / max(
                count, 1
            )  # scales a sum over its targets to the number of all targets
            loss_sum = loss_sum + weight * per_target * mtp.ce_sum + cfg.index_loss_weight * mtp.index_loss
            index_loss = index_loss + mtp.index_loss
            stats[0], stats[1] = mtp.ce_sum.detach(), count
        stats[2] = index_loss.detach()
        if gains and maps and len(tokens_BS):
            stats[3:] = composite_gains([m.view(*tokens_BS.shape, *m.shape[-2:])[0] for m in maps])
        loss_sum = loss_sum + cfg.seq_balance_weight * tokens_BS.shape[1] * balance_loss
        return LossOutput(loss_sum, ce_sum.detach(), targets_BS.numel(), torch.stack(loads), stats)

    def _documents(self, tokens_BS: torch.Tensor) -> torch.Tensor | None:
        """[B, S]: index of each token's document within its row. The token that ends a document belongs to it."""
        if not self._cfg.document_mask:
            return None
        ends = (tokens_BS == self._cfg.end_token).long()
        return ends.cumsum(dim=1) - ends

    def _cross_entropy(self, hidden: torch.Tensor, norm: nn.Module, targets_BS: torch.Tensor) -> torch.Tensor:
        """Summed over the targets, fp32."""
        logits_BSV = self.head(norm(hidden))
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), reduction="sum")

    def _run(self, tokens_BS: torch.Tensor, context: AttentionContext) -> StackOutput:
        assert self.experts is not None, "Transformer.experts must be set before the model runs"
        balance_loss = torch.zeros((), device=tokens_BS.device)
        index_loss = torch.zeros((), device=tokens_BS.device)
        loads: list[torch.Tensor] = []
        maps: list[torch.Tensor] = []
        segments = Segments(self._cfg, tokens_BS.device)
        x = expand_streams(self.embed(tokens_BS), self._cfg)
        for block in self.layers:
            out = cast(BlockOutput, block(x, tokens_BS, context, segments, self.experts))
            x = out.x
            if out.balance_loss is not None and out.load_E is not None:
                balance_loss = balance_loss + out.balance_loss
                loads.append(out.load_E)
            if out.index_loss is not None:
                index_loss = index_loss + out.index_loss
            maps += out.maps
        return StackOutput(x, balance_loss, index_loss, loads, maps)

    def _predict_after_next(
        self, mtp: MultiTokenPrediction, x: torch.Tensor, tokens_BS: torch.Tensor, targets_BS: torch.Tensor
    ) -> MTPOutput:
        """Predict the token after the next of every position but the last, from the residual x after the last layer."""
        following_BS, documents = targets_BS[:, :-1], self._documents(tokens_BS)
        if documents is not None:
            documents = documents[:, :-1]
        context = AttentionContext(self._cfg, following_BS.shape[1], x.device, documents)
        projected = mtp.project(x[:, :-1], self.embed(following_BS))
        segments = Segments(self._cfg, x.device)
        out = cast(BlockOutput, mtp.block(projected, following_BS, context, segments, self.experts))
        ce_sum = self._cross_entropy(mtp.readout(out.x), mtp.norm, targets_BS[:, 1:])
        assert out.balance_loss is not None
        assert out.load_E is not None
        index_loss = torch.zeros((), device=x.device) if out.index_loss is None else out.index_loss
        return MTPOutput(ce_sum, out.balance_loss, index_loss, out.load_E)
