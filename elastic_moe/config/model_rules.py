"""Rules between the keys of the model: groups of experts, attention, recomputation."""

from __future__ import annotations

from elastic_moe.config.schema import ModelConfig
from elastic_moe.errors import UserError

LAYER_KINDS = {"sliding", "csa", "hca"}


def check_groups(model: ModelConfig) -> None:
    """Raise UserError for the first rule of node-limited routing that is broken."""
    if model.num_experts % model.num_groups:
        raise UserError(
            f"model.num_experts ({model.num_experts}) must be a multiple of model.num_groups ({model.num_groups})."
        )
    if model.groups_per_token > model.num_groups:
        raise UserError(
            f"model.groups_per_token ({model.groups_per_token}) must not exceed model.num_groups ({model.num_groups})."
        )
    size = model.num_experts // model.num_groups
    if model.num_groups > 1 and size < 2:
        raise UserError(
            f"model.num_groups ({model.num_groups}) leaves {size} expert in a group; a group's score is the sum of two."
        )
    if model.groups_per_token * size < model.experts_per_token:
        raise UserError(
            f"model.groups_per_token ({model.groups_per_token}) groups of {size} experts are fewer than "
            f"model.experts_per_token ({model.experts_per_token})."
        )


def check_recompute(model: ModelConfig) -> None:
    """Raise UserError if `model.recompute` is no policy."""
    value = model.recompute
    if value not in ("none", "selective", "full") and not (value.isdecimal() and int(value)):
        raise UserError(
            f"model.recompute must be none, selective, full or a number of layers, not {value!r}; the segments of "
            "residual streams have the key model.stream_segment."
        )


def check_attention(model: ModelConfig) -> None:
    """Raise UserError for the first rule of the attention that is broken."""
    if model.attention == "gqa" and model.num_heads % model.num_kv_heads:
        raise UserError(
            f"model.num_heads ({model.num_heads}) must be a multiple of model.num_kv_heads ({model.num_kv_heads})."
        )
    if model.attention == "gqa" and (model.rope_fraction > 1 or model.rotated_dim < 2 or model.rotated_dim % 2):
        raise UserError(
            f"model.rope_fraction ({model.rope_fraction}) must be at most 1 and rotate an even number of the "
            f"{model.head_dim} channels of a head."
        )
    if model.attention != "gqa" and model.rope_dim % 2:
        raise UserError(f"model.rope_dim ({model.rope_dim}) must be even.")
    if model.attention != "csa":
        return
    if model.rope_dim > min(model.head_dim, model.index_dim):
        raise UserError(
            f"model.rope_dim ({model.rope_dim}) must not exceed model.head_dim ({model.head_dim}) and model.index_dim "
            f"({model.index_dim})."
        )
    if model.query_latent == 0:
        raise UserError("model.query_latent must be above 0 with model.attention=csa.")
    if model.num_heads % model.output_groups:
        raise UserError(
            f"model.num_heads ({model.num_heads}) must be a multiple of model.output_groups ({model.output_groups})."
        )
    if model.layer_kinds and (len(model.layer_kinds) != model.num_layers or set(model.layer_kinds) - LAYER_KINDS):
        raise UserError(
            f"model.layer_kinds must name one of {', '.join(sorted(LAYER_KINDS))} for each of the {model.num_layers} "
            f"layers, not {list(model.layer_kinds)!r}."
        )
