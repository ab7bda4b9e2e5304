"""The list of all parameters: names, shapes and initial values, without holding any.

Ownership, checkpoints and recovery use these names alone, so the list is a pure function of the configuration. It is
read from the model itself, built on the meta device. The routed experts, which are outside the model, are added where
their layer is.
"""

from __future__ import annotations

import dataclasses
import math
import re

import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts.specs import expert_specs
from elastic_moe.model.layers import DeclaredModule, Linear
from elastic_moe.model.transformer import Transformer
from elastic_moe.types import RULE_FACTS, ParamSpec


def param_specs(cfg: ModelConfig, optimizer: str = "adamw", base_width: int = 0) -> tuple[ParamSpec, ...]:
    """The specification of every parameter and persistent buffer, in the order of the model.

    Args:
        cfg: the model's shape.
        optimizer: `optim.name`. Muon is for the matrices of the layers; embedding, head, norms, biases and gating
            factors are AdamW's in any case (DeepSeek-V4's report).
        base_width: `optim.base_width`; see `_scaled`.
    """
    with torch.device("meta"):
        model = Transformer(cfg)
    specs: list[ParamSpec] = []
    for path, module in model.named_modules():
        moe_layer = getattr(module, "moe_layer", None)
        if moe_layer is not None:
            specs += expert_specs(cfg, moe_layer)
        if isinstance(module, DeclaredModule):
            layer = _layer_of(cfg, path)
            for name, init in module.inits.items():
                shape = tuple(getattr(module, name).shape)
                index = (
                    None if layer is None or RULE_FACTS[init.optimizer].has_gradient else layer - cfg.num_dense_layers
                )
                specs.append(
                    ParamSpec(f"{path}.{name}", shape, **dataclasses.asdict(init), layer=layer, moe_layer=index)
                )
    ruled = [dataclasses.replace(s, optimizer=optimizer) if _is_matrix(s) else s for s in specs]
    return tuple(_scaled(s, base_width / cfg.hidden_size) for s in ruled) if base_width else tuple(ruled)


def _scaled(spec: ParamSpec, ratio: float) -> ParamSpec:
    """The parameter of a model whose hidden size is 1 / ratio of the one for which its settings were found.

    Matrices of the layers and the head read inputs that grow with the width. So their updates by AdamW, whose
    elements have the size of the learning rate, shrink with it, and the initial values of the layers with its root;
    the logits begin smaller, as if multiplied by the ratio (muP: Yang et al., arXiv 2203.03466, Tables 3 and 8; for
    the head, its symmetry in Appendix J.2 moves the multiplier into weights and learning rate). Muon's updates have
    a spectral norm of about the root of the width, so theirs shrink with the root (Yang, Simon and Bernstein, arXiv
    2310.17813). All else, embedding, norms and biases, stays. Heads, experts and latents are to grow in number or
    width as the hidden size does; a head's own width is to stay.
    """
    if spec.name == "head.weight":
        return dataclasses.replace(spec, std=spec.std * ratio, lr_scale=ratio)
    if spec.name == "embed.weight" or not spec.decay or len(spec.shape) != 2 or not spec.rule.has_gradient:
        return spec
    root = math.sqrt(ratio)
    return dataclasses.replace(spec, std=spec.std * root, lr_scale=root if spec.optimizer == "muon" else ratio)


def dense_product_numel(cfg: ModelConfig) -> int:
    """Elements of the matrices outside the routed experts that are used in products only: those of `Linear`."""
    with torch.device("meta"):
        model = Transformer(cfg)
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, Linear))


def _is_matrix(spec: ParamSpec) -> bool:
    """Whether it is a matrix of a layer that a gradient trains, and no vector or table."""
    inside = spec.optimizer == "adamw" and spec.layer is not None and spec.decay and len(spec.shape) == 2
    return inside and min(spec.shape[0] // spec.stacked, spec.shape[1]) > 1


def _layer_of(cfg: ModelConfig, path: str) -> int | None:
    """Index of the layer of a module; that of multi-token prediction follows the last. None outside the layers."""
    if path.startswith("mtp."):
        return cfg.num_layers
    found = re.match(r"layers\.(\d+)\.", path)
    return int(found[1]) if found else None
