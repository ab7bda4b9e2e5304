"""The model families of Hugging Face that ours can be: their configuration keys and tensor names.

A family lists, for both directions, the keys of config.json and the name of each parameter on disk. There are four:
DeepSeek-V3 (MLA), DeepSeek-V4 (compressed attention, mHC), Qwen3-MoE (GQA, softmax) and GLM-4-MoE (GQA, sigmoid), which
is the architecture of the presets tiny and small.

In two places the layout differs too. DeepSeek-V4's H_res is ours transposed, so the rows and biases that make it are
permuted. The table of a hash layer holds integers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Json = Mapping[str, Any]
SIZES = {  # ours -> theirs, in every family
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "num_heads": "num_attention_heads",
    "expert_hidden": "moe_intermediate_size",
    "experts_per_token": "num_experts_per_tok",
    "normalize_gates": "norm_topk_prob",
}
DEEPSEEK_MOE = {
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "routed_scaling": "routed_scaling_factor",
}
GROUPS = {
    "num_dense_layers": "first_k_dense_replace",
    "dense_hidden": "intermediate_size",
    "num_groups": "n_group",
    "groups_per_token": "topk_group",
}
GQA = {"num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "attention_bias": "attention_bias"}
MLA = {
    "query_latent": "q_lora_rank",
    "kv_latent": "kv_lora_rank",
    "head_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
    "attention_bias": "attention_bias",
    "rope_interleave": "rope_interleave",
}
DEEPSEEK_V4 = {
    "head_dim": "head_dim",
    "query_latent": "q_lora_rank",
    "window": "sliding_window",
    "output_groups": "o_groups",
    "output_latent": "o_lora_rank",
    "index_heads": "index_n_heads",
    "index_dim": "index_head_dim",
    "index_topk": "index_topk",
    "num_streams": "hc_mult",
    "sinkhorn_iters": "hc_sinkhorn_iters",
    "mix_eps": "hc_eps",
    "router_score": "scoring_func",
}
YARN = {
    "rope_factor": "factor",
    "rope_original_len": "original_max_position_embeddings",
    "rope_beta_fast": "beta_fast",
    "rope_beta_slow": "beta_slow",
    "rope_mscale": "mscale",
    "rope_mscale_all_dim": "mscale_all_dim",
}
LAYER_TYPES = {  # ours -> theirs, the kinds of attention of DeepSeek-V4
    "sliding": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}

OWN = "elastic_moe"  # model_type of the models that none of transformers' families can express: own_format.py
NEWER_KEYS = {"num_experts": "num_local_experts", "n_routed_experts": "num_local_experts"}  # in newer files

COMMON_NAMES = [
    (r"embed\.", "model.embed_tokens."),
    (r"norm\.", "model.norm."),
    (r"head\.", "lm_head."),
    (r"layers\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
    (r"layers\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"layers\.(\d+)\.mlp\.(\w+)\.", r"model.layers.\1.mlp.\2_proj."),
    (r"layers\.(\d+)\.moe\.router\.weight", r"model.layers.\1.mlp.gate.weight"),
    (r"layers\.(\d+)\.moe\.router\.bias", r"model.layers.\1.mlp.gate.e_score_correction_bias"),
    (r"layers\.(\d+)\.moe\.shared\.(\w+)\.", r"model.layers.\1.mlp.shared_experts.\2_proj."),
    (r"layers\.(\d+)\.moe\.experts\.(\d+)\.(\w+)", r"model.layers.\1.mlp.experts.\2.\3_proj.weight"),
]
GQA_NAMES = [
    (r"layers\.(\d+)\.attn\.([qkvo])\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"layers\.(\d+)\.attn\.([qk])_norm\.", r"model.layers.\1.self_attn.\2_norm."),
]
MLA_NAMES = [
    (rf"layers\.(\d+)\.attn\.{ours}\.", rf"model.layers.\1.self_attn.{theirs}.")
    for ours, theirs in {
        "q": "q_proj",
        "q_down": "q_a_proj",
        "q_norm": "q_a_layernorm",
        "q_up": "q_b_proj",
        "kv_down": "kv_a_proj_with_mqa",
        "kv_norm": "kv_a_layernorm",
        "kv_up": "kv_b_proj",
        "o": "o_proj",
    }.items()
]
DEEPSEEK_V4_NAMES = [
    (r"embed\.", "model.embed_tokens."),
    (r"norm\.", "model.norm."),
    (r"head\.", "head."),
    (r"readout\.proj", "model.hc_head.hc_fn"),
    (r"readout\.base", "model.hc_head.hc_base"),
    (r"readout\.gate", "model.hc_head.hc_scale"),
    (r"layers\.(\d+)\.(attn|ffn)_norm\.", r"model.layers.\1.\2_norm."),
    (r"layers\.(\d+)\.(attn|ffn)_mix\.proj", r"model.layers.\1.hc_\2_fn"),
    (r"layers\.(\d+)\.(attn|ffn)_mix\.base", r"model.layers.\1.hc_\2_base"),
    (r"layers\.(\d+)\.(attn|ffn)_mix\.gates", r"model.layers.\1.hc_\2_scale"),
    (r"layers\.(\d+)\.moe\.router\.table", r"model.layers.\1.ffn.gate.tid2eid"),
    (r"layers\.(\d+)\.moe\.router\.", r"model.layers.\1.ffn.gate."),
    *[
        pair
        for ours, theirs in {"gate": "w1", "down": "w2", "up": "w3"}.items()
        for pair in (
            (rf"layers\.(\d+)\.moe\.shared\.{ours}\.", rf"model.layers.\1.ffn.shared_experts.{theirs}."),
            (rf"layers\.(\d+)\.moe\.experts\.(\d+)\.{ours}", rf"model.layers.\1.ffn.experts.\2.{theirs}.weight"),
        )
    ],
    *[
        (rf"layers\.(\d+)\.attn\.{ours}", rf"model.layers.\1.attn.{theirs}")
        for ours, theirs in {
            r"q_down\.": "wq_a.",
            r"q_norm\.": "q_norm.",
            r"q_up\.": "wq_b.",
            r"kv\.": "wkv.",
            r"kv_norm\.": "norm.",
            r"sinks": "attn_sink",
            r"group_out": "wo_a.weight",
            r"o\.": "wo_b.",
            r"indexer\.q_up\.": "indexer.wq_b.",
            r"indexer\.weigh\.": "indexer.weights_proj.",
        }.items()
    ],
    *[
        (rf"layers\.(\d+)\.attn\.(indexer\.)?compressor\.{ours}", rf"model.layers.\1.attn.\2compressor.{theirs}")
        for ours, theirs in {r"kv\.": "wkv.", r"gate\.": "wgate.", "position_bias": "ape", r"norm\.": "norm."}.items()
    ],
]


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def swap_streams(tensor: torch.Tensor) -> torch.Tensor:
    """mHC coefficients [2n + n^2, ...] with the n x n rows of H_res transposed; its own inverse."""
    n = next(n for n in range(1, len(tensor)) if 2 * n + n * n == len(tensor))
    matrix = tensor[2 * n :].unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
    return torch.cat((tensor[: 2 * n], matrix))


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    Attributes:
        architecture: name of the family's class for causal language modelling.
        fixed: fields of ModelConfig that the family implies.
        keys: fields of ModelConfig -> keys of config.json.
        names: (regular expression on our parameter names, replacement); the first that matches counts.
        required: keys of config.json -> the values they may have; a key may be absent.
        transposed: H_res is ours transposed.
    """

    architecture: str
    fixed: Json
    keys: Mapping[str, str]
    names: Sequence[tuple[str, str]]
    required: Mapping[str, tuple[Any, ...]]
    transposed: bool = False

    def name(self, ours: str) -> str | None:
        """Their name of a parameter of ours; None when the family has no such parameter."""
        for pattern, theirs in self.names:
            if re.match(pattern, ours):
                return re.sub("^" + pattern, theirs, ours)
        return None

    def layout(self, ours: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The function between our layout of a tensor and theirs, which is its own inverse."""
        return swap_streams if self.transposed and re.search(r"_mix\.(proj|base)$", ours) else _identity


PLAIN = {"residual": "plain", "swiglu_limit": 0.0, "num_hash_layers": 0}
ALWAYS = {"hidden_act": ("silu",), "mlp_bias": (False,), "attention_dropout": (0, None)}
FAMILIES = {
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {"attention": "mla", "router_score": "sigmoid", "qk_norm": False, **PLAIN},
        {**SIZES, **DEEPSEEK_MOE, **GROUPS, **MLA},
        [*COMMON_NAMES, *MLA_NAMES],
        {
            **ALWAYS, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,),
            "partial_rotary_factor": (1, None),
        },
    ),
    "deepseek_v4": Family(
        "DeepseekV4ForCausalLM",
        {
            "attention": "csa", "residual": "mhc", "readout": "learned", "num_dense_layers": 0, "num_shared_experts": 1,
            "num_groups": 1, "groups_per_token": 1, "normalize_gates": True, "qk_norm": False, "attention_bias": False,
            "rope_mscale": 0.0, "rope_mscale_all_dim": 0.0,
        },
        {**SIZES, **DEEPSEEK_V4, "num_experts": "n_routed_experts", "routed_scaling": "routed_scaling_factor"},
        DEEPSEEK_V4_NAMES,
        {
            **ALWAYS, "attention_bias": (False,), "num_key_value_heads": (1,), "norm_topk_prob": (True,),
            "n_shared_experts": (1,), "topk_method": ("noaux_tc",),
        },
        transposed=True,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            "attention": "gqa", "router_score": "softmax", "qk_norm": True, "num_shared_experts": 0,
            "routed_scaling": 1.0, "num_groups": 1, "groups_per_token": 1, "rope_fraction": 1.0, "output_bias": True,
            **PLAIN,
        },
        {**SIZES, **GQA, "num_experts": "num_experts", "dense_hidden": "intermediate_size"},
        [*COMMON_NAMES, *GQA_NAMES],
        {**ALWAYS, "use_sliding_window": (False,), "decoder_sparse_step": (1,), "partial_rotary_factor": (1, None)},
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        {"attention": "gqa", "router_score": "sigmoid", "output_bias": False, **PLAIN},
        {**SIZES, **DEEPSEEK_MOE, **GROUPS, **GQA, "qk_norm": "use_qk_norm"},
        [*COMMON_NAMES, *GQA_NAMES],
        ALWAYS,
    ),
    OWN: Family("ElasticMoeForCausalLM", {}, {}, [("", "")], {}),
}  # fmt: skip
