"""The MoE language model: blocks of attention and feed-forward around a residual, first dense ones, then mixtures of experts.

The routed experts live in a backend outside the module tree, so this module's parameters are exactly those every rank
has in full, and a new generation exchanges the backend without touching the model. Losses are sums, never means: the
global token count divides once, when the update is applied, so nothing depends on who computed which share.

Multi-token prediction: DeepSeek-V3 (arXiv 2412.19437, section 2.2) at depth 1: the hidden state and the embedding of the next token, both
normalised, are projected together, pass one more block, and the shared head predicts the token after the next. With streams the
projection works on each stream, as the block continues them (so do implementations of V4; the reports do not say).

Shapes: B sequences, S positions, D hidden, V vocabulary, L MoE layers, E experts, n streams.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.attention.compressed import CompressedAttention
from elastic_moe.model.attention.context import Context, KVCache
from elastic_moe.model.attention.dense import GroupedQueryAttention, LatentAttention
from elastic_moe.model.backend import ExpertBackend
from elastic_moe.model.init import Init, init_in, init_param
from elastic_moe.model.layers import Embedding, Layer, Linear, RMSNorm, SwiGLU
from elastic_moe.model.moe import MoE
from elastic_moe.model.residual.connections import ReadOut, Segments, composite_gains, expand_streams, make_residual
from elastic_moe.types import ModelStats, ParamSpec

STATS = tuple(item.name for item in fields(ModelStats))


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Sums over the tokens of one micro-batch; all zero for an empty one.

    Attributes:
        loss_sum: what to differentiate: cross-entropy plus the weighted other losses, per token.
        ce_sum: cross-entropy alone, detached, fp32.
        num_tokens: number of targets.
        load_LE: int64, tokens routed to each expert of each MoE layer.
        stats: fp64, the values of `ModelStats` in its order; the gains are 0 unless watched.
    """

    loss_sum: torch.Tensor
    ce_sum: torch.Tensor
    num_tokens: int
    load_LE: torch.Tensor
    stats: torch.Tensor


class BlockOutput(NamedTuple):
    """Attributes: x, the residual; balance and index, the losses; load_E, or None in a dense layer; maps, H_res of both sub-layers."""

    x: torch.Tensor
    balance: torch.Tensor | None
    index: torch.Tensor | None
    load_E: torch.Tensor | None
    maps: list[torch.Tensor]


def make_attention(cfg: ModelConfig, layer: int) -> GroupedQueryAttention | LatentAttention | CompressedAttention:
    kinds = {"gqa": GroupedQueryAttention, "mla": LatentAttention, "v4": CompressedAttention}
    return kinds[cfg.attention](cfg, layer)


class Block(nn.Module):
    """One transformer layer: `mlp` in the leading dense layers, `moe` in the others."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_mix = make_residual(cfg, 2 * layer)
        self.attn_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.attn = make_attention(cfg, layer)
        self.ffn_mix = make_residual(cfg, 2 * layer + 1)
        self.ffn_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        dense = layer < cfg.num_dense_layers
        self.mlp = SwiGLU(cfg, cfg.dense_hidden) if dense else None
        self.moe = None if dense else MoE(cfg, layer - cfg.num_dense_layers)

    def forward(
        self, x: torch.Tensor, tokens_BS: torch.Tensor, context: Context, segments: Segments, experts: ExpertBackend
    ) -> BlockOutput:
        x, h_BSD, attn_link = self.attn_mix.read(x, segments)
        y_BSD, index = self.attn(self.attn_norm(h_BSD), context)
        x = self.attn_mix.write(x, y_BSD, attn_link)
        x, h_BSD, ffn_link = self.ffn_mix.read(x, segments)
        h_BSD = self.ffn_norm(h_BSD)
        balance, load_E = None, None
        if self.moe is not None:
            y_BSD, balance, load_E = self.moe(h_BSD, tokens_BS, experts)
        else:
            assert self.mlp is not None
            y_BSD = self.mlp(h_BSD)
        x = self.ffn_mix.write(x, y_BSD, ffn_link)
        maps = [self.attn_mix.residual_map(attn_link), self.ffn_mix.residual_map(ffn_link)]
        return BlockOutput(x, balance, index, load_E, [m for m in maps if m is not None])


class NextPrediction(nn.Module):
    """Multi-token prediction of depth 1: hidden states and next tokens -> hidden states for the token after the next."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self._cfg = cfg
        self.hidden_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.embed_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.proj = Linear(2 * cfg.hidden_size, cfg.hidden_size, init_in(cfg))
        self.block = Block(cfg, cfg.num_layers)
        self.readout = ReadOut(cfg)
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)

    def join(self, x: torch.Tensor, next_BSD: torch.Tensor) -> torch.Tensor:
        """The block's input, with streams like x."""
        embedded = self.embed_norm(next_BSD)
        if self._cfg.has_streams:
            embedded = embedded.unsqueeze(2).expand(x.shape)
        hidden = self.hidden_norm(x)
        return self.proj(torch.cat((hidden, embedded.to(hidden.dtype)), dim=-1)).to(x.dtype)


class Transformer(nn.Module):
    """The model without its routed experts.

    Args:
        cfg: shape.
        experts: backend of the routed experts; may be set later, and exchanged between steps, by assigning `experts`.
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
        self.mtp = NextPrediction(cfg) if cfg.mtp_depth else None

    def __setattr__(self, name: str, value: object) -> None:
        if name == "experts":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, cast(Any, value))

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set every parameter and buffer to its initial value, `init_param(spec, seed)`."""
        for path, module in self.named_modules():
            if isinstance(module, Layer):
                for name, init in module.inits.items():
                    tensor = getattr(module, name)
                    spec = ParamSpec(
                        f"{path}.{name}", tuple(tensor.shape), init.init, init.std, init.values, init.bound
                    )
                    tensor.copy_(init_param(spec, seed))

    def forward(self, tokens_BS: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Logits [B, S, V]; with a cache, of tokens that follow those it was filled with."""
        x, *_ = self._run(tokens_BS, Context(self._cfg, tokens_BS.shape[1], tokens_BS.device, None, cache))
        if cache is not None:
            cache.length += tokens_BS.shape[1]
        return self.head(self.norm(self.readout(x)))

    def loss(
        self, tokens_BS: torch.Tensor, targets_BS: torch.Tensor, mtp_weight: float | None = None, watch: bool = False
    ) -> LossOutput:
        """Unnormalised loss of one micro-batch; B may be 0, and still calls the backend of every layer, both ways.

        Args:
            mtp_weight: of the multi-token prediction; `cfg.mtp_weight` when not given.
            watch: compute the composite gains of the first sequence.
        """
        cfg = self._cfg
        context = Context(cfg, tokens_BS.shape[1], tokens_BS.device, self._documents(tokens_BS))
        x, balance, index, loads, maps = self._run(tokens_BS, context)
        ce_sum = self._cross_entropy(self.readout(x), self.norm, targets_BS)
        loss_sum = ce_sum + cfg.index_loss_weight * index
        stats = torch.zeros(len(STATS), dtype=torch.float64)
        if self.mtp is not None:
            weight = cfg.mtp_weight if mtp_weight is None else mtp_weight
            mtp_sum, mtp_balance, mtp_index, load_E = self._next_prediction(x, tokens_BS, targets_BS)
            balance = balance + mtp_balance
            loads.append(load_E)
            count = targets_BS[:, 1:].numel()
            per_target = targets_BS.numel() / max(count, 1)  # the mean over its own targets, times the step's
            loss_sum = loss_sum + weight * per_target * mtp_sum + cfg.index_loss_weight * mtp_index
            index = index + mtp_index
            stats[0], stats[1] = float(mtp_sum.detach()), count
        stats[2] = float(index.detach())
        if watch and maps and len(tokens_BS):
            stats[3:] = composite_gains([m.view(*tokens_BS.shape, *m.shape[-2:])[0] for m in maps])
        loss_sum = loss_sum + cfg.seq_balance_weight * tokens_BS.shape[1] * balance
        return LossOutput(loss_sum, ce_sum.detach(), targets_BS.numel(), torch.stack(loads), stats)

    def _documents(self, tokens_BS: torch.Tensor) -> torch.Tensor | None:
        """Index of each token's document within its row; the token that ends a document belongs to it."""
        if not self._cfg.document_mask:
            return None
        ends = (tokens_BS == self._cfg.end_token).long()
        return ends.cumsum(dim=1) - ends

    def _cross_entropy(self, hidden: torch.Tensor, norm: nn.Module, targets_BS: torch.Tensor) -> torch.Tensor:
        logits_BSV = self.head(norm(hidden))
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), reduction="sum")

    def _run(
        self, tokens_BS: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """(residual after the last layer, balance loss and indexers' loss summed over layers, load and maps by layer)."""
        balance = torch.zeros((), device=tokens_BS.device)
        index = torch.zeros((), device=tokens_BS.device)
        loads, maps = [], []
        segments = Segments(self._cfg, tokens_BS.device)
        x = expand_streams(self.embed(tokens_BS), self._cfg)
        for block in self.layers:
            out = cast(BlockOutput, block(x, tokens_BS, context, segments, self.experts))
            x = out.x
            if out.balance is not None and out.load_E is not None:
                balance = balance + out.balance
                loads.append(out.load_E)
            if out.index is not None:
                index = index + out.index
            maps += out.maps
        return x, balance, index, loads, maps

    def _next_prediction(
        self, x: torch.Tensor, tokens_BS: torch.Tensor, targets_BS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(cross-entropy sum, balance loss, indexer's loss, load) of the multi-token prediction."""
        assert self.mtp is not None
        following_BS, documents = targets_BS[:, :-1], self._documents(tokens_BS)
        if documents is not None:
            documents = documents[:, :-1]
        context = Context(self._cfg, following_BS.shape[1], x.device, documents)
        joined = self.mtp.join(x[:, :-1], self.embed(following_BS))
        segments = Segments(self._cfg, x.device)
        out = cast(BlockOutput, self.mtp.block(joined, following_BS, context, segments, self.experts))
        ce_sum = self._cross_entropy(self.mtp.readout(out.x), self.mtp.norm, targets_BS[:, 1:])
        assert out.balance is not None and out.load_E is not None
        zero = torch.zeros((), device=x.device)
        return ce_sum, out.balance, zero if out.index is None else out.index, out.load_E
