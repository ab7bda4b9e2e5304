"""Names, shapes and initial values of every parameter, without building the model.

Ownership, checkpoints and recovery deal in these names alone, so the list is a pure function of the configuration, and
a parameter's initial value is a pure function of (seed, name): any rank can make any piece of it, at any world size.
Standard deviations are GPT-2's (Radford et al. 2019, section 2.3): `init_std`, and `init_std / sqrt(2 * layers)` for
projections back into the residual stream.

Shapes: V vocabulary, D hidden, H query heads, G key/value heads, d head width, E experts, F expert hidden.
"""

from __future__ import annotations

import hashlib
import math

import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.types import ParamSpec


def param_specs(cfg: ModelConfig) -> tuple[ParamSpec, ...]:
    """Every parameter in model order: embedding, layers (attention, then feed-forward or MoE), final norm, head."""
    std, back_std = cfg.init_std, cfg.init_std / math.sqrt(2 * cfg.num_layers)
    d_model = cfg.hidden_size
    specs = [ParamSpec("embed.weight", (cfg.vocab_size, d_model), std=std)]
    for layer in range(cfg.num_layers):
        at = f"layers.{layer}"
        query, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        specs += [
            _norm(f"{at}.attn_norm.weight", d_model, layer),
            ParamSpec(f"{at}.attn.q.weight", (query, d_model), std=std, layer=layer),
            ParamSpec(f"{at}.attn.k.weight", (kv, d_model), std=std, layer=layer),
            ParamSpec(f"{at}.attn.v.weight", (kv, d_model), std=std, layer=layer),
            ParamSpec(f"{at}.attn.o.weight", (d_model, query), std=back_std, layer=layer),
            _norm(f"{at}.ffn_norm.weight", d_model, layer),
        ]
        if layer < cfg.num_dense_layers:
            specs += _swiglu(f"{at}.mlp", d_model, cfg.dense_hidden, layer, std, back_std)
        else:
            specs += _moe(cfg, layer, std, back_std)
    return (*specs, _norm("norm.weight", d_model, None), ParamSpec("head.weight", (cfg.vocab_size, d_model), std=std))


def _norm(name: str, width: int, layer: int | None) -> ParamSpec:
    return ParamSpec(name, (width,), init="ones", decay=False, layer=layer)


def _swiglu(at: str, d_model: int, hidden: int, layer: int, std: float, back_std: float) -> list[ParamSpec]:
    return [
        ParamSpec(f"{at}.gate.weight", (hidden, d_model), std=std, layer=layer),
        ParamSpec(f"{at}.up.weight", (hidden, d_model), std=std, layer=layer),
        ParamSpec(f"{at}.down.weight", (d_model, hidden), std=back_std, layer=layer),
    ]


def _moe(cfg: ModelConfig, layer: int, std: float, back_std: float) -> list[ParamSpec]:
    at, moe_layer = f"layers.{layer}.moe", layer - cfg.num_dense_layers
    d_model, hidden, num_experts = cfg.hidden_size, cfg.expert_hidden, cfg.num_experts
    specs = [
        ParamSpec(f"{at}.router.weight", (num_experts, d_model), std=std, layer=layer),
        ParamSpec(
            f"{at}.router.bias",
            (num_experts,),
            init="zeros",
            optimizer="bias",
            decay=False,
            layer=layer,
            moe_layer=moe_layer,
        ),
    ]
    if cfg.num_shared_experts:
        specs += _swiglu(f"{at}.shared", d_model, hidden * cfg.num_shared_experts, layer, std, back_std)
    shapes = (("gate", (hidden, d_model), std), ("up", (hidden, d_model), std), ("down", (d_model, hidden), back_std))
    for expert in range(num_experts):
        specs += [
            ParamSpec(
                f"{at}.experts.{expert}.{name}", shape, std=spread, layer=layer, expert=expert, moe_layer=moe_layer
            )
            for name, shape, spread in shapes
        ]
    return specs


def init_param(spec: ParamSpec, seed: int) -> torch.Tensor:
    """Initial fp32 value on the CPU; depends on (seed, name) and the spec alone, never on who asks or in what order."""
    if spec.init == "zeros":
        return torch.zeros(spec.shape)
    if spec.init == "ones":
        return torch.ones(spec.shape)
    assert spec.init == "normal", spec.init
    digest = hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(spec.shape, generator=generator, dtype=torch.float32).mul_(spec.std)
