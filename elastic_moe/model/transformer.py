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
from torch import nn

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.attention.context import AttentionContext, KVCache
from elastic_moe.model.backend import ExpertBackend
from elastic_moe.model.block import Block
from elastic_moe.model.head_loss import HeadLoss, head_loss
from elastic_moe.model.init import Init, init_in, init_param
from elastic_moe.model.layers import DeclaredModule, Embedding, Linear, RMSNorm
from elastic_moe.model.residual.connections import ReadOut, composite_gains, expand_streams
from elastic_moe.model.stack import LayerSums, Stack, StackOutput
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


class MTPOutput(NamedTuple):
    """The output of multi-token prediction: the loss of its logits, and that of its layer as in `StackOutput`."""

    loss: HeadLoss
    sums: LayerSums
    load_E: torch.Tensor


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
        x, sums, loads, maps = self._run(tokens_BS, context)
        head = self._head_loss(self.readout(x), self.norm, targets_BS)
        loss_sum = head.total + cfg.index_loss_weight * sums.index
        stats = dict.fromkeys(STATS, torch.zeros((), dtype=torch.float64, device=loss_sum.device))
        stats["z_sum"] = head.z_sum
        if self.mtp is not None:
            weight = cfg.mtp_weight if mtp_weight is None else mtp_weight
            mtp = self._predict_after_next(self.mtp, x, tokens_BS, targets_BS)
            loads.append(mtp.load_E)
            count = targets_BS[:, 1:].numel()
            per_target = targets_BS.numel() / max(count, 1)  # scales a sum over its targets to the number of all
            loss_sum = loss_sum + weight * per_target * mtp.loss.total + cfg.index_loss_weight * mtp.sums.index
            sums = LayerSums(*(own + more for own, more in zip(sums, mtp.sums, strict=True)))
            stats["mtp_sum"], stats["mtp_tokens"] = mtp.loss.ce_sum, torch.full_like(stats["mtp_tokens"], count)
        stats["index_sum"], stats["router_z_sum"] = sums.index, sums.router_z / cfg.num_moe_layers
        if gains and maps and len(tokens_BS):
            found = composite_gains([m.view(*tokens_BS.shape, *m.shape[-2:])[0] for m in maps])
            stats |= dict(zip(("gain_forward", "gain_backward", "gain_backward_min"), found, strict=True))
        loss_sum = loss_sum + cfg.seq_balance_weight * tokens_BS.shape[1] * sums.balance
        if cfg.router_z_loss:
            loss_sum = loss_sum + cfg.router_z_loss * sums.router_z
        values = torch.stack([value.detach().double() for value in stats.values()])
        return LossOutput(loss_sum, head.ce_sum, targets_BS.numel(), torch.stack(loads), values)

    def _documents(self, tokens_BS: torch.Tensor) -> torch.Tensor | None:
        """[B, S]: index of each token's document within its row. The token that ends a document belongs to it."""
        if not self._cfg.document_mask:
            return None
        ends = (tokens_BS == self._cfg.end_token).long()
        return ends.cumsum(dim=1) - ends

    def _head_loss(self, hidden: torch.Tensor, norm: nn.Module, targets_BS: torch.Tensor) -> HeadLoss:
        """Summed over the targets, fp32."""
        cfg, rows_ND = self._cfg, norm(hidden).flatten(0, 1)
        return head_loss(rows_ND, self.head.weight, targets_BS.flatten(), cfg.z_loss, cfg.logits_gib * 2**30)

    def _run(self, tokens_BS: torch.Tensor, context: AttentionContext) -> StackOutput:
        assert self.experts is not None, "Transformer.experts must be set before the model runs"
        x = expand_streams(self.embed(tokens_BS), self._cfg)
        blocks = cast("list[Block]", list(self.layers))
        return Stack(self._cfg, tokens_BS, context, self.experts).run(blocks, x)

    def _predict_after_next(
        self, mtp: MultiTokenPrediction, x: torch.Tensor, tokens_BS: torch.Tensor, targets_BS: torch.Tensor
    ) -> MTPOutput:
        """Predict the token after the next of every position but the last, from the residual x after the last layer."""
        following_BS, documents = targets_BS[:, :-1], self._documents(tokens_BS)
        if documents is not None:
            documents = documents[:, :-1]
        context = AttentionContext(self._cfg, following_BS.shape[1], x.device, documents)
        projected = mtp.project(x[:, :-1], self.embed(following_BS))
        assert self.experts is not None
        out = Stack(self._cfg, following_BS, context, self.experts).run([mtp.block], projected)
        loss = self._head_loss(mtp.readout(out.x), mtp.norm, targets_BS[:, 1:])
        return MTPOutput(loss, out.sums, out.loads[0])
