"""transformers' DeepSeek-V3 in the shape of a model of this project, for the comparisons."""

from __future__ import annotations

from typing import Any

from elastic_moe.config.schema import ModelConfig


def same_shape(model: ModelConfig) -> Any:
    """transformers' model of the same shape."""
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, num_hidden_layers=model.num_layers,
        intermediate_size=model.dense_hidden, moe_intermediate_size=model.expert_hidden,
        num_attention_heads=model.num_heads, num_key_value_heads=model.num_heads,
        num_experts_per_tok=model.experts_per_token, n_routed_experts=model.num_experts, n_group=1, topk_group=1,
        n_shared_experts=model.num_shared_experts, first_k_dense_replace=model.num_dense_layers, q_lora_rank=None,
        kv_lora_rank=model.kv_latent, qk_nope_head_dim=model.head_dim, qk_rope_head_dim=model.rope_dim,
        v_head_dim=model.value_dim, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)
