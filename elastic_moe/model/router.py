"""The router: which experts a token goes to, and the weight of each.

Sources: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): sigmoid affinity, a balancing bias that affects the choice and
not the weight (Wang et al., arXiv 2408.15664), node-limited groups; DeepSeek-V4 (arXiv 2606.19348, section 2.1):
sqrt(softplus) affinity, and leading layers whose experts are looked up by token id; softmax affinity as in Qwen3
(arXiv 2505.09388) and DeepSeek-V2 (arXiv 2405.04434).

The z-loss of the logits keeps them small (ST-MoE, Zoph et al., arXiv 2202.08906, equation 5).

The bias gets no gradient: `optim.apply_bias` moves it once per step by the sign of the global load's deviation.

Shapes: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.init import Init, init_in
from elastic_moe.model.layers import DeclaredModule


class Routing(NamedTuple):
    """The routing of some tokens.

    Attributes:
        expert_ids_TK: int64.
        gates_TK: fp32, the weight of each expert.
        scores_TE: fp32, before the bias.
        z_sum: squares of the log-sum-exp of the logits, summed over tokens; 0 without `model.router_z_loss`.
    """

    expert_ids_TK: torch.Tensor
    gates_TK: torch.Tensor
    scores_TE: torch.Tensor
    z_sum: torch.Tensor


def affinity(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """Scores of all experts from the router's logits; `kind` is a value of `model.router_score`."""
    if kind == "sigmoid":
        return logits.sigmoid()
    if kind == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    assert kind == "softmax", kind
    return logits.softmax(dim=-1)


def limit_to_best_groups(choice_TE: torch.Tensor, num_groups: int, kept: int) -> torch.Tensor:
    """Scores with -inf for the experts outside the best groups; a group's score is the sum of its two best experts."""
    grouped = choice_TE.unflatten(-1, (num_groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(kept, dim=-1, sorted=False).indices
    kept_TG = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=best.device).scatter_(1, best, True)
    return grouped.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).flatten(-2)


class Router(DeclaredModule):
    """Chooses K experts per token. It computes in fp32 always, because a near tie changes the choice.

    Args:
        cfg: the model's shape.
        hashed: experts are looked up by token id; the gates are still learned.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    table: torch.Tensor

    def __init__(self, cfg: ModelConfig, hashed: bool) -> None:
        super().__init__()
        self._cfg, self.hashed = cfg, hashed
        self.declare("weight", (cfg.num_experts, cfg.hidden_size), init_in(cfg))
        if hashed:  # ids as floats, exact below 2^24, so that the table is transferred like any other state
            rows = Init(init="experts", bound=cfg.num_experts, optimizer="frozen", decay=False)
            self.declare("table", (cfg.vocab_size, cfg.experts_per_token), rows)
        else:
            self.declare("bias", (cfg.num_experts,), Init(init="zeros", optimizer="bias", decay=False))

    def forward(self, x_TD: torch.Tensor, tokens_T: torch.Tensor) -> Routing:
        cfg = self._cfg
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            scores_TE = affinity(logits_TE, cfg.router_score)
            squares = logits_TE.logsumexp(dim=1).square().sum() if cfg.router_z_loss else logits_TE.new_zeros(())
            ids_TK = self.table[tokens_T].long() if self.hashed else self._choose(scores_TE.detach())
            gates_TK = scores_TE.gather(1, ids_TK)
            if cfg.normalize_gates:
                gates_TK = gates_TK / (gates_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(ids_TK, gates_TK * cfg.routed_scaling, scores_TE, squares)

    def _choose(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """Ids [T, K] of the experts with the highest biased scores, within the best groups."""
        cfg, choice_TE = self._cfg, scores_TE + self.bias
        if cfg.groups_per_token < cfg.num_groups:
            choice_TE = limit_to_best_groups(choice_TE, cfg.num_groups, cfg.groups_per_token)
        return choice_TE.topk(cfg.experts_per_token, dim=-1, sorted=False).indices
