"""Names, shapes and initial values of every parameter, without holding any.

Ownership, checkpoints and recovery deal in these names alone, so the list is a pure function of the configuration, and
a parameter's initial value is a pure function of (seed, name): any rank can make any piece of it, at any world size.
The list is read off the model itself, built on the meta device; the routed experts, which live outside it, are added
where their layer is.

Shapes: D hidden, F expert hidden, E experts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re

import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.layers import Layer, init_in, init_out
from elastic_moe.types import ParamSpec

_ROWS = 4096  # rows of an expert table made at once


def layer_path(cfg: ModelConfig, moe_layer: int) -> tuple[int, str]:
    """(layer index, name prefix) of a MoE layer; the last one may be that of the multi-token prediction."""
    layer = cfg.num_dense_layers + moe_layer
    return layer, f"layers.{layer}" if layer < cfg.num_layers else "mtp.block"


def expert_specs(cfg: ModelConfig, moe_layer: int) -> list[ParamSpec]:
    """Gate, up and down [F, D], [F, D], [D, F] of each routed expert of one MoE layer."""
    layer, at = layer_path(cfg, moe_layer)
    wide, back = (cfg.expert_hidden, cfg.hidden_size), (cfg.hidden_size, cfg.expert_hidden)
    kinds = (("gate", wide, init_in(cfg)), ("up", wide, init_in(cfg)), ("down", back, init_out(cfg)))
    return [
        ParamSpec(
            f"{at}.moe.experts.{expert}.{name}", shape, std=init.std, layer=layer, expert=expert, moe_layer=moe_layer
        )
        for expert in range(cfg.num_experts)
        for name, shape, init in kinds
    ]


def param_specs(cfg: ModelConfig) -> tuple[ParamSpec, ...]:
    """Every parameter and persistent buffer in model order."""
    from elastic_moe.model.transformer import Transformer  # which initialises itself with this module

    with torch.device("meta"):
        model = Transformer(cfg)
    specs: list[ParamSpec] = []
    for path, module in model.named_modules():
        moe_layer = getattr(module, "moe_layer", None)
        if moe_layer is not None:
            specs += expert_specs(cfg, moe_layer)
        if isinstance(module, Layer):
            layer = _layer_of(cfg, path)
            for name, init in module.inits.items():
                shape = tuple(getattr(module, name).shape)
                index = None if layer is None or init.optimizer == "adamw" else layer - cfg.num_dense_layers
                specs.append(
                    ParamSpec(f"{path}.{name}", shape, **dataclasses.asdict(init), layer=layer, moe_layer=index)
                )
    return tuple(specs)


def _layer_of(cfg: ModelConfig, path: str) -> int | None:
    if path.startswith("mtp."):
        return cfg.num_layers
    found = re.match(r"layers\.(\d+)\.", path)
    return int(found[1]) if found else None


def init_param(spec: ParamSpec, seed: int) -> torch.Tensor:
    """Initial fp32 value on the CPU; depends on (seed, name) and the spec alone, never on who asks or in what order."""
    if spec.init == "zeros":
        return torch.zeros(spec.shape)
    if spec.init == "ones":
        return torch.ones(spec.shape)
    if spec.init == "values":
        return torch.tensor(spec.values, dtype=torch.float32).view(spec.shape)
    digest = hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if spec.init == "experts":
        rows, width = spec.shape
        sizes = [min(_ROWS, rows - start) for start in range(0, rows, _ROWS)]
        picks = [torch.rand((size, spec.bound), generator=generator).topk(width, dim=1).indices for size in sizes]
        return torch.cat(picks).float()
    assert spec.init == "normal", spec.init
    return torch.randn(spec.shape, generator=generator, dtype=torch.float32).mul_(spec.std)
