"""Mixture-of-experts feed-forward: router, shared expert, sequence-wise balance loss.

Source: DeepSeekMoE, Dai et al. 2024 (arXiv 2401.06066), as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2, equations
12 to 20).

Shapes: B sequences, S positions, T = B * S tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.backend import ExpertBackend
from elastic_moe.model.experts.grouped import count_of
from elastic_moe.model.layers import SwiGLU, compute_dtype
from elastic_moe.model.recompute import part_of_layer
from elastic_moe.model.router import Router


class MoEOutput(NamedTuple):
    """Attributes: y_BSD; balance_loss, summed over sequences; load_E int64, tokens per expert; z_sum of the router."""

    y_BSD: torch.Tensor
    balance_loss: torch.Tensor
    load_E: torch.Tensor
    z_sum: torch.Tensor


def sequence_balance(scores_BSE: torch.Tensor, num_choices: int) -> torch.Tensor:
    """Equations 17 to 20 without the factor alpha, summed over sequences: 1 per balanced sequence, more otherwise.

    Args:
        scores_BSE: affinities; as in equation 18, without the bias and the groups.
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
    """Router and shared expert. The backend of the routed experts is an argument of each call.

    Args:
        cfg: the model's shape.
        moe_layer: index among the MoE layers.
    """

    def __init__(self, cfg: ModelConfig, moe_layer: int) -> None:
        super().__init__()
        self._cfg, self.moe_layer = cfg, moe_layer
        self.router = Router(cfg, hashed=moe_layer < cfg.num_hash_layers)
        self.shared = SwiGLU(cfg, cfg.num_shared_experts * cfg.expert_hidden) if cfg.num_shared_experts else None

    def forward(self, x_BSD: torch.Tensor, tokens_BS: torch.Tensor, experts: ExpertBackend) -> MoEOutput:
        cfg = self._cfg
        x_TD = x_BSD.flatten(0, 1)
        ids_TK, gates_TK, scores_TE, z_sum = self.router(x_TD, tokens_BS.flatten())
        x_TD = x_TD.to(compute_dtype(x_TD))  # once for all experts, behind the router, which computes in fp32
        y_BSD = experts(self.moe_layer, x_TD, ids_TK, gates_TK).view(x_BSD.shape)
        if self.shared is not None:
            y_BSD = y_BSD + part_of_layer(cfg, self.shared, x_TD).view(x_BSD.shape)
        load_E = count_of(ids_TK.flatten(), cfg.num_experts)
        if self.router.hashed or not cfg.seq_balance_weight:
            return MoEOutput(y_BSD, scores_TE.new_zeros(()), load_E, z_sum)
        balance = sequence_balance(scores_TE.unflatten(0, x_BSD.shape[:2]), cfg.experts_per_token)
        return MoEOutput(y_BSD, balance, load_E, z_sum)
