"""A model's shape as config.json of Hugging Face's transformers, in both directions.

Both directions are strict: a setting that cannot be expressed is refused with a sentence that names it. The families
and their keys are in families.py.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from elastic_moe.config.build import check_model_fields
from elastic_moe.config.schema import ModelConfig
from elastic_moe.errors import UserError
from elastic_moe.model.attention.compressed import layer_kind
from elastic_moe.model.hf.families import FAMILIES, LAYER_TYPES, NEWER_KEYS, YARN, Json

LARGEST = 2**31 - 1  # of any size in a config.json
NO_LIMIT = 1e9  # stands for an unclamped SwiGLU in a family that always applies a limit


def fields_of(config: Json, directory: Path) -> dict[str, Any]:
    """As `fields_from`, of a directory's config.json, with the types and ranges of all fields checked.

    Raises:
        UserError: with one sentence that names the file and the key.
    """
    where = str(directory / "config.json")
    try:
        fields = fields_from(config, where)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{where} lacks {error}, or has a value there that is not known.") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{where} has a value of another kind than its model_type has: {error}.") from error
    theirs = FAMILIES[config["model_type"]].keys
    for ours, value in fields.items():
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UserError(f"{where}: {theirs.get(ours, ours)}={value:.3g} is no size.")
    try:
        check_model_fields(fields)
    except UserError as error:
        key = str(error).partition(" ")[0].removeprefix("model.")
        raise UserError(f"{where}: {theirs.get(key, key)} cannot be so: {error}") from error
    return fields


def fields_from(config: Json, where: str) -> dict[str, Any]:
    """Fields of ModelConfig that a config.json implies.

    Args:
        config: its content.
        where: its path, for messages.

    Raises:
        UserError: the model is of no known family, or has a setting that ours cannot express.
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
        value = config.get(theirs, config.get(NEWER_KEYS.get(theirs, "")))
        if value is None and theirs == "q_lora_rank":
            value = 0
        if value is None and theirs == "head_dim":
            value = config["hidden_size"] // config["num_attention_heads"]
        if value is None:
            raise UserError(f"{where} has no {theirs}.")
        fields[ours] = value
    if kind == "deepseek_v4":
        fields |= _deepseek_v4_fields(config, where)
    else:
        fields |= _rope_fields(rope_of(config), where, full=1.0 if kind == "glm4_moe" else None)
    if kind == "qwen3_moe":
        dense = sorted(config.get("mlp_only_layers") or [])
        if dense != list(range(len(dense))):
            raise UserError(f"{where}: mlp_only_layers must be the first layers, not {dense}.")
        fields |= {"num_dense_layers": len(dense), "bias_update_speed": 0.0}
    return fields


def rope_of(config: Json) -> Json:
    """The rotary settings, in the form of newer files; older ones spread them over two keys."""
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


def _deepseek_v4_fields(config: Json, where: str) -> dict[str, Any]:
    rope = rope_of(config)
    if "main" not in rope or "compress" not in rope:
        raise UserError(f"{where}: rope_parameters must have main and compress, as transformers writes them.")
    main, compress = rope["main"], dict(rope["compress"])
    if compress.pop("attention_factor", 1.0) != 1.0:
        raise UserError(f"{where}: YaRN with an attention_factor other than 1 cannot be expressed here.")
    theirs = {their: ours for ours, their in LAYER_TYPES.items()}
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
        "csa_rate": rates[LAYER_TYPES["csa"]],
        "hca_rate": rates[LAYER_TYPES["hca"]],
        "swiglu_limit": 0.0 if limit >= NO_LIMIT else float(limit),
    }


def family_of(cfg: ModelConfig) -> str:
    """The model_type that can express this model.

    Raises:
        UserError: none can; the message names the field that the nearest family cannot express.
    """
    nearest = {"mla": "deepseek_v3", "csa": "deepseek_v4"}.get(cfg.attention)
    if nearest is None:
        nearest = "qwen3_moe" if cfg.router_score == "softmax" else "glm4_moe"
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
    """Content of config.json for this model in its family.

    Args:
        cfg: the model's shape.
        dtype: of the weights, as torch names it without the prefix.
        seq_len: longest sequence trained on.

    Raises:
        UserError: no family can express the model.
    """
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
        written |= _deepseek_v4_config(cfg, yarn)
    return written


def _deepseek_v4_config(cfg: ModelConfig, yarn: Json) -> dict[str, Any]:
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
        "compress_rates": {LAYER_TYPES["csa"]: cfg.csa_rate, LAYER_TYPES["hca"]: cfg.hca_rate},
        "layer_types": [LAYER_TYPES[layer_kind(cfg, layer)] for layer in range(cfg.num_layers)],
        "mlp_layer_types": ["hash_moe" if i < cfg.num_hash_layers else "moe" for i in range(cfg.num_layers)],
        "swiglu_limit": cfg.swiglu_limit or NO_LIMIT,
    }
