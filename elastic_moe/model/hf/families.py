"""What Hugging Face calls things: configuration keys and tensor names of the model families that ours can be.

A family says in both directions which keys mean what, and how a parameter of ours is named on disk. Both directions are strict: what cannot be expressed is
refused with a sentence that names it. Four families: DeepSeek-V3 (MLA), DeepSeek-V4 (compressed attention, mHC), Qwen3-MoE (GQA, softmax) and GLM-4-MoE (GQA,
sigmoid), which is the architecture of the presets tiny and small.

Two things are not named but laid out differently: DeepSeek-V4's H_res is ours transposed, so the rows and biases that make it are permuted; and a hash
layer's table holds integers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.errors import UserError
from elastic_moe.model.attention.compressed import layer_kind

Json = Mapping[str, Any]
NO_LIMIT = 1e9  # what an unclamped SwiGLU is called where a limit is always applied

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
V4 = {
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
    "score": "scoring_func",
}
YARN = {
    "rope_factor": "factor",
    "rope_original_len": "original_max_position_embeddings",
    "rope_beta_fast": "beta_fast",
    "rope_beta_slow": "beta_slow",
    "rope_mscale": "mscale",
    "rope_mscale_all_dim": "mscale_all_dim",
}
KINDS = {
    "sliding": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}

RENAMED = {"num_experts": "num_local_experts", "n_routed_experts": "num_local_experts"}  # newer files

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
V4_NAMES = [
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
    """mHC coefficients [2n + n^2, ...] with the n^2 rows of H_res transposed; its own inverse."""
    n = next(n for n in range(1, len(tensor)) if 2 * n + n * n == len(tensor))
    matrix = tensor[2 * n :].unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
    return torch.cat((tensor[: 2 * n], matrix))


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    Attributes:
        architecture: name of its class for causal language modelling.
        fixed: fields of ours that the family implies.
        keys: fields of ours -> keys of its config.json.
        names: regular expressions on our parameter names -> their name; the first that matches counts.
        required: keys of its config.json that must have one of these values, or be absent.
    """

    architecture: str
    fixed: Json
    keys: Mapping[str, str]
    names: Sequence[tuple[str, str]]
    required: Mapping[str, tuple[Any, ...]]

    def name(self, ours: str) -> str | None:
        """Their name of a parameter; None when they have none."""
        for pattern, theirs in self.names:
            if re.match(pattern, ours):
                return re.sub("^" + pattern, theirs, ours)
        return None

    def layout(self, ours: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Between our layout of a tensor and theirs; its own inverse."""
        return swap_streams if re.search(r"_mix\.(proj|base)$", ours) else _identity


PLAIN = {"residual": "plain", "swiglu_limit": 0.0, "num_hash_layers": 0}
ALWAYS = {"hidden_act": ("silu",), "mlp_bias": (False,)}
FAMILIES = {
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {"attention": "mla", "score": "sigmoid", "qk_norm": False, **PLAIN},
        {**SIZES, **DEEPSEEK_MOE, **GROUPS, **MLA},
        [*COMMON_NAMES, *MLA_NAMES],
        ALWAYS,
    ),
    "deepseek_v4": Family(
        "DeepseekV4ForCausalLM",
        {
            "attention": "v4", "residual": "mhc", "readout": "learned", "num_dense_layers": 0, "num_shared_experts": 1,
            "num_groups": 1, "groups_per_token": 1, "normalize_gates": True, "qk_norm": False, "attention_bias": False,
            "rope_mscale": 0.0, "rope_mscale_all_dim": 0.0,
        },
        {**SIZES, **V4, "num_experts": "n_routed_experts", "routed_scaling": "routed_scaling_factor"},
        V4_NAMES,
        {**ALWAYS, "attention_bias": (False,), "num_key_value_heads": (1,)},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            "attention": "gqa", "score": "softmax", "qk_norm": True, "num_shared_experts": 0, "routed_scaling": 1.0,
            "num_groups": 1, "groups_per_token": 1, **PLAIN,
        },
        {**SIZES, **GQA, "num_experts": "num_experts", "dense_hidden": "intermediate_size"},
        [*COMMON_NAMES, *GQA_NAMES],
        {**ALWAYS, "use_sliding_window": (False,), "decoder_sparse_step": (1,)},
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        {"attention": "gqa", "score": "sigmoid", **PLAIN},
        {**SIZES, **DEEPSEEK_MOE, **GROUPS, **GQA, "qk_norm": "use_qk_norm"},
        [*COMMON_NAMES, *GQA_NAMES],
        {**ALWAYS, "attention_bias": (False,)},
    ),
}  # fmt: skip


def fields_from(config: Json, where: str) -> dict[str, Any]:
    """Fields of our ModelConfig that a config.json of theirs implies.

    Raises:
        UserError: the model is of no known family, or has something that ours cannot express.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{where}: model_type {kind!r} is not one of {', '.join(FAMILIES)}.")
    family = FAMILIES[kind]
    if config.get("quantization_config"):
        raise UserError(
            f"{where}: the weights are quantised (quantization_config); convert them to bf16 or fp32 first."
        )
    for key, allowed in family.required.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"{where}: {key}={config[key]!r} cannot be expressed here.")
    fields: dict[str, Any] = dict(family.fixed)
    for ours, theirs in family.keys.items():
        value = config.get(theirs, config.get(RENAMED.get(theirs, "")))
        if value is None and theirs == "q_lora_rank":
            value = 0
        if value is None and theirs == "head_dim":
            value = config["hidden_size"] // config["num_attention_heads"]
        if value is None:
            raise UserError(f"{where} has no {theirs}.")
        fields[ours] = value
    if kind == "deepseek_v4":
        fields |= _v4_fields(config, where)
    else:
        fields |= _rope_fields(rope_of(config), where, full=1.0 if kind == "glm4_moe" else None)
    if kind == "qwen3_moe":
        dense = sorted(config.get("mlp_only_layers") or [])
        if dense != list(range(len(dense))):
            raise UserError(f"{where}: mlp_only_layers must be the first layers, not {dense}.")
        fields |= {"num_dense_layers": len(dense), "bias_update_speed": 0.0}
    return fields


def rope_of(config: Json) -> Json:
    """The rotary settings, of new and of old files."""
    if config.get("rope_parameters"):
        return config["rope_parameters"]
    return {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}


def _rope_fields(rope: Json, where: str, full: float | None = None) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise UserError(f"{where}: rope_type {kind!r} is not one of default, yarn.")
    if full is not None and rope.get("partial_rotary_factor", full) != full:
        raise UserError(f"{where}: partial_rotary_factor={rope['partial_rotary_factor']} cannot be expressed here.")
    fields: dict[str, Any] = {"rope_theta": float(rope["rope_theta"]), "rope_factor": 1.0}
    if kind == "yarn":
        for key in ("attention_factor", "truncate"):
            if rope.get(key) not in (None, True):
                raise UserError(f"{where}: YaRN with {key}={rope[key]} cannot be expressed here.")
        given = {ours: rope.get(theirs) for ours, theirs in YARN.items()}
        fields |= {ours: value for ours, value in given.items() if value is not None}
        fields["rope_factor"] = float(fields["rope_factor"])
    return fields


def _v4_fields(config: Json, where: str) -> dict[str, Any]:
    rope = rope_of(config)
    if "main" not in rope or "compress" not in rope:
        raise UserError(f"{where}: rope_parameters must have main and compress, as transformers writes them.")
    main, compress = rope["main"], dict(rope["compress"])
    if compress.pop("attention_factor", 1.0) != 1.0:
        raise UserError(f"{where}: YaRN with an attention_factor other than 1 cannot be expressed here.")
    theirs = {their: ours for ours, their in KINDS.items()}
    mlp_kinds = list(config.get("mlp_layer_types") or [])
    hashed = mlp_kinds.count("hash_moe")
    if mlp_kinds[:hashed] != ["hash_moe"] * hashed:
        raise UserError(f"{where}: the hash layers in mlp_layer_types must be the first ones.")
    limit = config.get("swiglu_limit", 0.0)
    rates = config["compress_rates"]
    fields = _rope_fields(compress, where)
    fields["compress_theta"] = fields.pop("rope_theta")
    return fields | {
        "rope_theta": float(main["rope_theta"]),
        "rope_dim": int(config["head_dim"] * main.get("partial_rotary_factor", 1.0)),
        "layer_kinds": [theirs[kind] for kind in config["layer_types"]],
        "num_hash_layers": hashed,
        "csa_rate": rates[KINDS["csa"]],
        "hca_rate": rates[KINDS["hca"]],
        "swiglu_limit": 0.0 if limit >= NO_LIMIT else float(limit),
    }


def family_of(cfg: ModelConfig) -> str:
    """The model_type that can express this model.

    Raises:
        UserError: none can; says what stands in the way of the nearest one.
    """
    nearest = {"mla": "deepseek_v3", "v4": "deepseek_v4"}.get(cfg.attention)
    if nearest is None:
        nearest = "qwen3_moe" if cfg.score == "softmax" else "glm4_moe"
    fields = asdict(cfg)
    for key, value in FAMILIES[nearest].fixed.items():
        if fields[key] != value:
            raise UserError(
                f"model.{key}={fields[key]} cannot be expressed in Hugging Face's {nearest}, the nearest to "
                f"model.attention={cfg.attention}: it needs {value}."
            )
    if nearest == "glm4_moe" and cfg.attention_bias:
        raise UserError("model.attention_bias=True cannot be expressed in Hugging Face's glm4_moe.")
    return nearest


def config_of(cfg: ModelConfig, dtype: str, seq_len: int) -> dict[str, Any]:
    """config.json of this model in its family."""
    kind = family_of(cfg)
    family, fields = FAMILIES[kind], asdict(cfg)
    written: dict[str, Any] = {theirs: fields[ours] for ours, theirs in family.keys.items()}
    longest = max(seq_len, int(cfg.rope_original_len * cfg.rope_factor) if cfg.rope_factor > 1 else 0)
    yarn: dict[str, Any] = {"rope_type": "default"}
    if cfg.rope_factor > 1:
        yarn = {theirs: fields[ours] for ours, theirs in YARN.items() if fields[ours]} | {"rope_type": "yarn"}
    written |= {
        "model_type": kind,
        "architectures": [family.architecture],
        "dtype": dtype,
        "max_position_embeddings": longest,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0,
        "eos_token_id": cfg.end_token if cfg.end_token >= 0 else None,
        "bos_token_id": None,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **yarn},
    }
    if kind == "deepseek_v3":
        written |= {"q_lora_rank": cfg.query_latent or None, "num_key_value_heads": cfg.num_heads}
    if kind == "glm4_moe":
        written["rope_parameters"]["partial_rotary_factor"] = 1.0
        written["partial_rotary_factor"] = 1.0
    if kind == "qwen3_moe":
        written |= {"mlp_only_layers": list(range(cfg.num_dense_layers)), "decoder_sparse_step": 1}
    if kind == "deepseek_v4":
        written |= _v4_config(cfg, yarn)
    return written


def _v4_config(cfg: ModelConfig, yarn: Json) -> dict[str, Any]:
    partial = {"partial_rotary_factor": cfg.rope_dim / cfg.head_dim}
    compress = {"rope_theta": cfg.compress_theta, **yarn, **partial}
    if yarn["rope_type"] == "yarn":
        compress["attention_factor"] = 1.0
    return {
        "num_key_value_heads": 1,
        "partial_rotary_factor": cfg.rope_dim / cfg.head_dim,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": cfg.rope_theta, **partial},
            "compress": compress,
        },
        "rope_theta": cfg.rope_theta,
        "compress_rope_theta": cfg.compress_theta,
        "compress_rates": {KINDS["csa"]: cfg.csa_rate, KINDS["hca"]: cfg.hca_rate},
        "layer_types": [KINDS[layer_kind(cfg, layer)] for layer in range(cfg.num_layers)],
        "mlp_layer_types": ["hash_moe" if i < cfg.num_hash_layers else "moe" for i in range(cfg.num_layers)],
        "swiglu_limit": cfg.swiglu_limit or NO_LIMIT,
    }
