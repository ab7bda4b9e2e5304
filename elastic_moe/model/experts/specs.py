"""Names, shapes and initial values of the routed experts, which live outside the model's module tree.

Shapes: D hidden, F expert hidden.
"""

from __future__ import annotations

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.init import init_in, init_out
from elastic_moe.types import ParamSpec


def layer_path(cfg: ModelConfig, moe_layer: int) -> tuple[int, str]:
    """(layer index, prefix of its parameters' names) of a MoE layer; the last may belong to multi-token prediction."""
    layer = cfg.num_dense_layers + moe_layer
    return layer, f"layers.{layer}" if layer < cfg.num_layers else "mtp.block"


def expert_specs(cfg: ModelConfig, moe_layer: int) -> list[ParamSpec]:
    """Specifications of gate [F, D], up [F, D] and down [D, F] of each routed expert of one MoE layer."""
    layer, path = layer_path(cfg, moe_layer)
    into, out_of = (cfg.expert_hidden, cfg.hidden_size), (cfg.hidden_size, cfg.expert_hidden)
    matrices = (("gate", into, init_in(cfg)), ("up", into, init_in(cfg)), ("down", out_of, init_out(cfg)))
    return [
        ParamSpec(
            f"{path}.moe.experts.{expert}.{name}", shape, std=init.std, layer=layer, expert=expert, moe_layer=moe_layer
        )
        for expert in range(cfg.num_experts)
        for name, shape, init in matrices
    ]
