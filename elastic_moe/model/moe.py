"""Mixture-of-experts feed-forward: sigmoid router balanced by a bias, shared expert, sequence-wise balance loss.

Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2, equations 12 to 20, without node-limited routing; bias rule:
Wang et al. (arXiv 2408.15664). The bias steers which experts are chosen, never how much they weigh, and gets no
gradient: `optim.apply_bias` moves it once per step by the sign of the global load's deviation.

Shapes: B sequences, S positions, T = B * S tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts import ExpertBackend


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Routing(NamedTuple):
    """Attributes: expert_ids_TK int64; gates_TK fp32, their sum is `routed_scaling`; scores_TE fp32 before the bias."""

    expert_ids_TK: torch.Tensor
    gates_TK: torch.Tensor
    scores_TE: torch.Tensor


class Router(nn.Module):
    """Chooses K experts per token by sigmoid affinity plus bias; always fp32, as near ties decide discretely."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self._num_choices, self._scaling = cfg.experts_per_token, cfg.routed_scaling
        self.weight = nn.Parameter(torch.empty(cfg.num_experts, cfg.hidden_size))
        self.bias: torch.Tensor
        self.register_buffer("bias", torch.zeros(cfg.num_experts))
        nn.init.normal_(self.weight, std=cfg.init_std)

    def forward(self, x_TD: torch.Tensor) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = torch.sigmoid(F.linear(x_TD.float(), self.weight.float()))
            _, ids_TK = torch.topk(scores_TE.detach() + self.bias, self._num_choices, dim=-1, sorted=False)
            chosen_TK = scores_TE.gather(1, ids_TK)
            gates_TK = chosen_TK / (chosen_TK.sum(dim=-1, keepdim=True) + 1e-20) * self._scaling
        return Routing(ids_TK, gates_TK, scores_TE)


class MoEOutput(NamedTuple):
    """Attributes: y_BSD; balance_sum, the balance loss summed over sequences; load_E int64, tokens per expert."""

    y_BSD: torch.Tensor
    balance_sum: torch.Tensor
    load_E: torch.Tensor


def sequence_balance(scores_BSE: torch.Tensor, num_choices: int) -> torch.Tensor:
    """Equations 17 to 20 without the factor alpha, summed over sequences: 1 per sequence when balanced, more when not.

    Args:
        scores_BSE: sigmoid affinities; as in equation 18, the bias has no part in this.
        num_choices: experts per token.
    """
    batch, seq_len, num_experts = scores_BSE.shape
    top = scores_BSE.detach().topk(num_choices, dim=-1, sorted=False).indices.reshape(batch, seq_len * num_choices)
    counts_BE = torch.zeros((batch, num_experts), device=top.device)
    counts_BE.scatter_add_(1, top, torch.ones(top.shape, device=top.device))
    fraction_BE = counts_BE * (num_experts / (num_choices * seq_len))
    mean_BE = (scores_BSE / scores_BSE.sum(dim=-1, keepdim=True)).mean(dim=1)
    return (fraction_BE * mean_BE).sum()


class MoE(nn.Module):
    """Router and shared expert; the routed experts themselves are a backend's, passed at each call."""

    def __init__(self, cfg: ModelConfig, moe_layer: int) -> None:
        super().__init__()
        self._moe_layer, self._num_experts, self._num_choices = moe_layer, cfg.num_experts, cfg.experts_per_token
        self.router = Router(cfg)
        shared_hidden = cfg.num_shared_experts * cfg.expert_hidden
        self.shared = SwiGLU(cfg.hidden_size, shared_hidden) if shared_hidden else None

    def forward(self, x_BSD: torch.Tensor, experts: ExpertBackend) -> MoEOutput:
        batch, seq_len, width = x_BSD.shape
        x_TD = x_BSD.reshape(batch * seq_len, width)
        ids_TK, gates_TK, scores_TE = self.router(x_TD)
        y_BSD = experts(self._moe_layer, x_TD, ids_TK, gates_TK).view(batch, seq_len, width)
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(x_BSD)
        balance_sum = sequence_balance(scores_TE.view(batch, seq_len, self._num_experts), self._num_choices)
        return MoEOutput(y_BSD, balance_sum, torch.bincount(ids_TK.flatten(), minlength=self._num_experts))
