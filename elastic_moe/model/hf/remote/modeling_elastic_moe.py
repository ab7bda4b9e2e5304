"""A model of elastic_moe for transformers: AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True).

`elastic-moe export` writes this file beside the weights of a model that no family of transformers can express:
residual streams (HC, mHC) with grouped-query or latent attention, for example. It needs torch and transformers alone.
config.json has the model's shape under the names of elastic_moe's configuration (`shape`), and the tensors have
elastic_moe's names, so that training can go on from the directory. The weights of a multi-token prediction (`mtp.`) are
not used here.

Shapes: B sequences, S positions, L positions so far, D hidden, H heads, n residual streams, T tokens, E experts.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_elastic_moe import GroupedQueryAttention, LatentAttention, RMSNorm


class ElasticMoeConfig(PretrainedConfig):
    """The shape, and what transformers itself asks for."""

    model_type = "elastic_moe"

    def __init__(self, shape: dict[str, Any] | None = None, **settings: Any) -> None:
        self.shape = dict(shape or {})
        self.vocab_size = self.shape.get("vocab_size", 0)
        self.hidden_size = self.shape.get("hidden_size", 0)
        self.num_hidden_layers = self.shape.get("num_layers", 0)
        self.num_attention_heads = self.shape.get("num_heads", 0)
        settings.setdefault("tie_word_embeddings", False)
        super().__init__(**settings)


class SwiGLU(nn.Module):
    def __init__(self, c: Any, hidden: int) -> None:
        super().__init__()
        self.limit = c.swiglu_limit
        self.gate = nn.Linear(c.hidden_size, hidden, bias=False)
        self.up = nn.Linear(c.hidden_size, hidden, bias=False)
        self.down = nn.Linear(hidden, c.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(swiglu(self.gate(x), self.up(x), self.limit))


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return F.silu(gate) * up


class Expert(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.limit = c.swiglu_limit
        self.gate = nn.Parameter(torch.empty(c.expert_hidden, c.hidden_size))
        self.up = nn.Parameter(torch.empty(c.expert_hidden, c.hidden_size))
        self.down = nn.Parameter(torch.empty(c.hidden_size, c.expert_hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(swiglu(F.linear(x, self.gate), F.linear(x, self.up), self.limit), self.down)


class Router(nn.Module):
    table: torch.Tensor
    bias: torch.Tensor

    def __init__(self, c: Any, hashed: bool) -> None:
        super().__init__()
        self.c, self.hashed = c, hashed
        self.weight = nn.Parameter(torch.empty(c.num_experts, c.hidden_size))
        if hashed:
            self.register_buffer("table", torch.zeros(c.vocab_size, c.experts_per_token, dtype=torch.long))
        else:
            self.register_buffer("bias", torch.zeros(c.num_experts))

    def forward(self, x_TD: torch.Tensor, tokens_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and gates of each token's experts, [T, K] each."""
        c, logits = self.c, F.linear(x_TD.float(), self.weight.float())
        if c.router_score == "softmax":
            scores = logits.softmax(dim=-1)
        else:
            scores = logits.sigmoid() if c.router_score == "sigmoid" else F.softplus(logits).sqrt()
        ids = self.table[tokens_T].long() if self.hashed else self.choose(scores.detach() + self.bias)
        gates = scores.gather(1, ids)
        if c.normalize_gates:
            gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
        return ids, gates * c.routed_scaling

    def choose(self, choice_TE: torch.Tensor) -> torch.Tensor:
        c = self.c
        if c.groups_per_token < c.num_groups:
            grouped = choice_TE.unflatten(-1, (c.num_groups, -1))
            best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(c.groups_per_token, dim=-1).indices
            kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=best.device).scatter_(1, best, True)
            choice_TE = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
        return choice_TE.topk(c.experts_per_token, dim=-1).indices


class MoE(nn.Module):
    def __init__(self, c: Any, moe_layer: int) -> None:
        super().__init__()
        self.router = Router(c, moe_layer < c.num_hash_layers)
        self.experts = nn.ModuleList(Expert(c) for _ in range(c.num_experts))
        self.shared = SwiGLU(c, c.num_shared_experts * c.expert_hidden) if c.num_shared_experts else None

    def forward(self, x_BSD: torch.Tensor, tokens_BS: torch.Tensor) -> torch.Tensor:
        x_TD = x_BSD.flatten(0, 1)
        ids, gates = self.router(x_TD, tokens_BS.flatten())
        y_TD = torch.zeros_like(x_TD)
        for expert in ids.unique().tolist():
            token, choice = (ids == expert).nonzero(as_tuple=True)
            out = self.experts[expert](x_TD[token]) * gates[token, choice, None]
            y_TD.index_add_(0, token, out.to(y_TD.dtype))
        y_BSD = y_TD.view(x_BSD.shape)
        return y_BSD if self.shared is None else y_BSD + self.shared(x_BSD)


class PlainResidual(nn.Module):
    def read(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x, None

    def write(self, x: torch.Tensor, y_BSD: torch.Tensor, link: None) -> torch.Tensor:
        return x + y_BSD


class Streams(nn.Module):
    """What HC and mHC share: streams [B, S, n, D], of which a sub-layer reads a mixture and writes to all."""

    def write(self, x: torch.Tensor, y_BSD: torch.Tensor, link: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        post, res = (t.to(x.dtype) for t in link)
        return res @ x + post.unsqueeze(-1) * y_BSD.unsqueeze(-2)

    def collapse(self, pre: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (pre.to(x.dtype).unsqueeze(-2) @ x).squeeze(-2)


class HyperConnection(Streams):
    """Hyper-connections (arXiv 2409.19606)."""

    pre_proj: nn.Parameter
    post_proj: nn.Parameter
    res_proj: nn.Parameter
    pre_bias: nn.Parameter
    post_bias: nn.Parameter
    res_bias: nn.Parameter
    gates: nn.Parameter

    def __init__(self, c: Any) -> None:
        super().__init__()
        n, width, self.eps = c.num_streams, c.hidden_size, c.norm_eps
        shapes = {"pre_proj": (1, width), "post_proj": (1, width), "res_proj": (n, width)}
        shapes |= {"pre_bias": (n,), "post_bias": (n,), "res_bias": (n, n), "gates": (3,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def read(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        seen = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        pre, post, res = (F.linear(seen, p.float()).tanh() for p in (self.pre_proj, self.post_proj, self.res_proj))
        pre = self.gates[0] * pre.squeeze(-1) + self.pre_bias
        post = self.gates[1] * post.squeeze(-1) + self.post_bias
        return self.collapse(pre, x), (post, self.gates[2] * res.transpose(-1, -2) + self.res_bias)


class ManifoldHyperConnection(Streams):
    """mHC (arXiv 2512.24880, equations 7 to 9): H_res is made doubly stochastic by Sinkhorn's iterations."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        n = c.num_streams
        self.c = c
        self.proj = nn.Parameter(torch.empty(2 * n + n * n, n * c.hidden_size))
        self.base, self.gates = nn.Parameter(torch.empty(2 * n + n * n)), nn.Parameter(torch.empty(3))

    def read(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        c, n, flat = self.c, self.c.num_streams, x.flatten(-2).float()
        r = torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + c.norm_eps)
        alphas = self.gates.float().repeat_interleave(torch.tensor([n, n, n * n], device=x.device))
        z = F.linear(flat, self.proj.float()) * r * alphas + self.base.float()
        pre, post, res = z.split([n, n, n * n], dim=-1)
        matrix = res.unflatten(-1, (n, n)).softmax(dim=-2) + c.mix_eps
        for axis in [-1, *([-2, -1] * (c.sinkhorn_iters - 1))]:
            matrix = matrix / (matrix.sum(dim=axis, keepdim=True) + c.mix_eps)
        return self.collapse(pre.sigmoid() + c.mix_eps, x), (2 * post.sigmoid(), matrix)


class ReadOut(nn.Module):
    """Streams to hidden state: their mean, or a learned mixture."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c, n = c, c.num_streams
        if c.residual != "plain" and c.readout == "learned":
            self.proj = nn.Parameter(torch.empty(n, n * c.hidden_size))
            self.base, self.gate = nn.Parameter(torch.empty(n)), nn.Parameter(torch.empty(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.c.residual == "plain":
            return x
        if self.c.readout == "mean":
            return x.mean(dim=2)
        seen = F.rms_norm(x.flatten(2).float(), (x.shape[2] * x.shape[3],), None, self.c.norm_eps)
        weights = (F.linear(seen, self.proj.float()) * self.gate + self.base).sigmoid() + self.c.mix_eps
        return (weights.unsqueeze(-1) * x).sum(dim=2).to(x.dtype)


class Block(nn.Module):
    def __init__(self, c: Any, layer: int) -> None:
        super().__init__()
        kinds: dict[str, Any] = {"hc": HyperConnection, "mhc": ManifoldHyperConnection}
        self.attn_mix = kinds[c.residual](c) if c.residual in kinds else PlainResidual()
        self.ffn_mix = kinds[c.residual](c) if c.residual in kinds else PlainResidual()
        self.attn_norm, self.ffn_norm = (RMSNorm(c.hidden_size, c.norm_eps) for _ in range(2))
        self.attn = GroupedQueryAttention(c, layer) if c.attention == "gqa" else LatentAttention(c, layer)
        dense = layer < c.num_dense_layers
        self.mlp = SwiGLU(c, c.dense_hidden) if dense else None
        self.moe = None if dense else MoE(c, layer - c.num_dense_layers)

    def forward(self, x: torch.Tensor, tokens_BS: torch.Tensor, positions: Any, mask: Any, cache: Any) -> torch.Tensor:
        attn = self.attn
        h_BSD, link = self.attn_mix.read(x)
        q, k, v = attn.heads(self.attn_norm(h_BSD), positions)
        if cache is not None:
            k, v = cache.update(k, v, attn.layer)
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attn.scale, enable_gqa=grouped)
        x = self.attn_mix.write(x, attn.o(y.transpose(1, 2).flatten(2)), link)
        h_BSD, link = self.ffn_mix.read(x)
        h_BSD = self.ffn_norm(h_BSD)
        y_BSD = self.moe(h_BSD, tokens_BS) if self.moe is not None else self.mlp(h_BSD)  # type: ignore[misc]
        return self.ffn_mix.write(x, y_BSD, link)


class ElasticMoeForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. The loss is the mean cross-entropy, without the balance loss of training."""

    config_class = ElasticMoeConfig
    base_model_prefix = ""
    _no_split_modules = ["Block"]  # noqa: RUF012 - as transformers declares it
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"^mtp\."]  # noqa: RUF012

    def __init__(self, config: ElasticMoeConfig) -> None:
        super().__init__(config)
        c = SimpleNamespace(**config.shape)
        self.streams = 0 if c.residual == "plain" else c.num_streams
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_layers))
        self.readout, self.norm = ReadOut(c), RMSNorm(c.hidden_size, c.norm_eps)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V]. Tokens of a padded batch have the positions that the mask gives them."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        index = torch.arange(start + input_ids.shape[1], device=input_ids.device)
        query = index[start:, None]
        seen, positions = (index <= query)[None, None], index[None, start:].expand(input_ids.shape)
        if attention_mask is not None:
            seen = (seen & attention_mask[:, None, None, :].bool()) | (index == query)
            positions = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, start:]
        x = self.embed(input_ids)
        if self.streams:
            x = x.unsqueeze(2).expand(-1, -1, self.streams, -1)
        for block in self.layers:
            x = block(x, input_ids, positions, seen, past_key_values)
        hidden = self.norm(self.readout(x))
        logits = self.head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
