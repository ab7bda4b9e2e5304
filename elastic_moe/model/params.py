"""Names, shapes and initial values of every parameter, without holding any.

Ownership, checkpoints and recovery deal in these names alone, so the list is a pure function of the configuration, and
a parameter's initial value is a pure function of (seed, name): any rank can make any piece of it, at any world size.
The list is read off the model itself, built on the meta device; the routed experts, which live outside it, are added
where their layer is.

Shapes: D hidden, F expert hidden, E experts.
"""

from __future__ import annotations

import dataclasses
import re

import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts.specs import expert_specs
from elastic_moe.model.layers import Layer
from elastic_moe.model.transformer import Transformer
from elastic_moe.types import ParamSpec


def param_specs(cfg: ModelConfig) -> tuple[ParamSpec, ...]:
    """Every parameter and persistent buffer in model order."""
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
