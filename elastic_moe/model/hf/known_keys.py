"""What a config.json may leave out, and what it may say without a meaning here.

A key that is absent has the default of its family, that of the family's class in transformers
(tests/unit/model/hf/test_published.py compares them). A key that stands in neither list may change the mathematics, so
it is refused.
"""

from __future__ import annotations

from elastic_moe.errors import UserError
from elastic_moe.model.hf.families import FAMILIES, NEWER_KEYS, YARN, Json

_EVERY = {"initializer_range": 0.02, "tie_word_embeddings": False}
DEFAULTS: dict[str, Json] = {
    "deepseek_v3": {
        **_EVERY, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
        "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
        "first_k_dense_replace": 3, "norm_topk_prob": True, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_interleave": True, "attention_bias": False,
    },
    "deepseek_v4": {
        **_EVERY, "vocab_size": 129280, "hidden_size": 4096, "moe_intermediate_size": 2048, "num_hidden_layers": 43,
        "num_attention_heads": 64, "head_dim": 512, "q_lora_rank": 1024, "num_experts_per_tok": 6,
        "n_routed_experts": 256, "scoring_func": "sqrtsoftplus", "norm_topk_prob": True, "routed_scaling_factor": 1.5,
        "max_position_embeddings": 1048576, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
        "swiglu_limit": 10.0, "sliding_window": 128, "o_groups": 8, "o_lora_rank": 1024, "index_n_heads": 64,
        "index_head_dim": 128, "index_topk": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
    },
    "qwen3_moe": {
        **_EVERY, "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "attention_bias": False, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128,
        "norm_topk_prob": False,
    },
    "glm4_moe": {
        **_EVERY, "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46,
        "num_attention_heads": 96, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "attention_bias": False, "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1,
        "n_routed_experts": 128, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "norm_topk_prob": True, "use_qk_norm": False,
    },
}  # fmt: skip

READ = set(
    """
    model_type tie_word_embeddings quantization_config max_position_embeddings original_max_position_embeddings
    rope_parameters rope_scaling rope_theta partial_rotary_factor
""".split()
)  # fmt: skip - by name, in every family
READ_IN = {
    "qwen3_moe": {"mlp_only_layers"},
    "deepseek_v3": {"num_key_value_heads"},
    "deepseek_v4": set("""
        layer_types mlp_layer_types compress_rates compress_rate_csa compress_rate_hca compress_ratios num_hash_layers
        swiglu_limit compress_rope_theta qk_rope_head_dim intermediate_size norm_topk_prob n_shared_experts
    """.split()),
}  # fmt: skip
WITHOUT_MEANING = set(
    """
    architectures auto_map dtype torch_dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id
    sep_token_id decoder_start_token_id tokenizer_class name_or_path pretraining_tp ep_size
    num_nextn_predict_layers num_mtp_layers
    aux_loss_alpha seq_aux router_aux_loss_coef router_jitter_noise output_router_logits
    sliding_window max_window_layers head_dim qk_head_dim
    return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss pruned_heads
    chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder finetuning_task id2label label2id prefix task_specific_params problem_type
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
""".split()
)  # fmt: skip - losses and sampling have keys of their own here
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "attention_factor", "truncate", *YARN.values()}


def check_keys(config: Json, where: str) -> None:
    """Refuse a key whose meaning is not known, unless it is null.

    Raises:
        UserError: with one sentence that names the first such key.
    """
    kind = config["model_type"]
    family = FAMILIES[kind]
    known = {*family.keys.values(), *NEWER_KEYS.values(), *family.required, *READ, *READ_IN.get(kind, ())}
    for key, value in config.items():
        if key not in known and key not in WITHOUT_MEANING and not key.startswith("_") and value is not None:
            raise UserError(
                f"{where}: the key {key} is not known for {kind}, and may change the model: remove it if it does not."
            )
