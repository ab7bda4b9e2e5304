"""The MoE language model: pre-norm blocks of attention and feed-forward, first dense ones, then mixtures of experts.

The routed experts live in a backend outside the module tree, so this module's parameters are exactly those every rank
has in full, and a new generation exchanges the backend without touching the model. Losses are sums, never means: the
global token count divides once, when the update is applied, so nothing depends on who computed which share.

Shapes: B sequences, S positions, D hidden, V vocabulary, L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.attention import Attention, rope_tables
from elastic_moe.model.experts import ExpertBackend
from elastic_moe.model.moe import MoE, MoEOutput, SwiGLU
from elastic_moe.model.params import init_param, param_specs


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Sums over the tokens of one micro-batch; all zero for an empty one.

    Attributes:
        loss_sum: what to differentiate: cross-entropy plus the weighted balance loss, per token.
        ce_sum: cross-entropy alone, detached, fp32.
        num_tokens: number of targets.
        load_LE: int64, tokens routed to each expert of each MoE layer.
    """

    loss_sum: torch.Tensor
    ce_sum: torch.Tensor
    num_tokens: int
    load_LE: torch.Tensor


class Block(nn.Module):
    """One transformer layer: `mlp` in the leading dense layers, `moe` in the others."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(cfg.hidden_size, eps=cfg.norm_eps)
        self.attn = Attention(cfg)
        self.ffn_norm = nn.RMSNorm(cfg.hidden_size, eps=cfg.norm_eps)
        dense = layer < cfg.num_dense_layers
        self.mlp = SwiGLU(cfg.hidden_size, cfg.dense_hidden) if dense else None
        self.moe = None if dense else MoE(cfg, layer - cfg.num_dense_layers)

    def forward(
        self, x_BSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, experts: ExpertBackend
    ) -> tuple[torch.Tensor, MoEOutput | None]:
        """The residual stream after this layer, and what the MoE says of its balance where there is one."""
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD), cos, sin)
        h_BSD = self.ffn_norm(x_BSD)
        if self.moe is not None:
            out = self.moe(h_BSD, experts)
            return x_BSD + out.y_BSD, out
        assert self.mlp is not None
        return x_BSD + self.mlp(h_BSD), None


class Transformer(nn.Module):
    """The model without its routed experts.

    Args:
        cfg: shape.
        experts: backend of the routed experts; may be set later, and exchanged between steps, by assigning `experts`.
    """

    experts: Any  # an ExpertBackend, kept out of the module tree even where it is a module itself

    def __init__(self, cfg: ModelConfig, experts: ExpertBackend | None = None) -> None:
        super().__init__()
        self._cfg = cfg
        self.experts = experts
        self.embed = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        self.norm = nn.RMSNorm(cfg.hidden_size, eps=cfg.norm_eps)
        self.head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "experts":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, cast(Any, value))

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set every parameter and buffer to its initial value, `init_param(spec, seed)`."""
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        for spec in param_specs(self._cfg):
            if spec.expert is None:
                tensors[spec.name].copy_(init_param(spec, seed))

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V]."""
        return self._run(tokens_BS)[0]

    def loss(self, tokens_BS: torch.Tensor, targets_BS: torch.Tensor) -> LossOutput:
        """Unnormalised loss of one micro-batch; B may be 0, and still calls the backend of every layer, both ways."""
        logits_BSV, balance_sum, load_LE = self._run(tokens_BS)
        ce_sum = F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), reduction="sum")
        per_token = self._cfg.seq_balance_weight * tokens_BS.shape[1]
        return LossOutput(ce_sum + per_token * balance_sum, ce_sum.detach(), targets_BS.numel(), load_LE)

    def _run(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logits, balance loss summed over sequences and layers, load)."""
        cfg = self._cfg
        cos, sin = rope_tables(tokens_BS.shape[1], cfg.head_dim, cfg.rope_theta, tokens_BS.device)
        x_BSD = self.embed(tokens_BS)
        balance_sum = torch.zeros((), device=tokens_BS.device)
        loads = [torch.zeros((0, cfg.num_experts), dtype=torch.int64, device=tokens_BS.device)]
        for block in self.layers:
            x_BSD, out = block(x_BSD, cos, sin, self.experts)
            if out is not None:
                balance_sum = balance_sum + out.balance_sum
                loads.append(out.load_E.unsqueeze(0))
        return self.head(self.norm(x_BSD)), balance_sum, torch.cat(loads)
