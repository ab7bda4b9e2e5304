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
from elastic_moe.model.hf.families import FAMILIES, LAYER_TYPES, NEWER_KEYS, OWN, YARN, Json
from elastic_moe.model.hf.known_keys import DEFAULTS, ROPE_KEYS, check_keys
from elastic_moe.model.hf.own_format import own_config, own_fields
from elastic_moe.model.hf.quantized import block_of

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
    if kind == OWN:
        return own_fields(config, where)
    family = FAMILIES[kind]
    check_keys(config, where)
    block_of(config, where)
    for key, allowed in family.required.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"{where}: {key}={config[key]!r} cannot be expressed here.")
    fields: dict[str, Any] = dict(family.fixed)
    for ours, theirs in family.keys.items():
        value = value_of(config, theirs)
        if value is None and theirs == "q_lora_rank":
            value = 0
        if value is None and theirs == "head_dim":
            value = value_of(config, "hidden_size") // value_of(config, "num_attention_heads")
        if value is None:
            raise UserError(f"{where} has no {theirs}.")
        fields[ours] = value
    if kind == "deepseek_v4":
        return fields | _deepseek_v4_fields(config, where)
    rope = rope_of(config)
    fields |= _rope_fields(rope, where)
    if kind == "glm4_moe":
        fields["rope_fraction"] = float(rope.get("partial_rotary_factor", 0.5))
    elif rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{where}: partial_rotary_factor={rope['partial_rotary_factor']} cannot be expressed here.")
    if kind == "deepseek_v3" and config.get("num_key_value_heads") not in (None, fields["num_heads"]):
        raise UserError(f"{where}: num_key_value_heads must be num_attention_heads.")
    if kind == "qwen3_moe":
        dense = sorted(config.get("mlp_only_layers") or [])
        if dense != list(range(len(dense))):
            raise UserError(f"{where}: mlp_only_layers must be the first layers, not {dense}.")
        fields |= {"num_dense_layers": len(dense), "bias_update_speed": 0.0}
    return fields


def value_of(config: Json, key: str) -> Any:
    """The value of a key in either spelling, or the family's default where the key is absent."""
    for name in (key, NEWER_KEYS.get(key, key)):
        if name in config:
            return config[name]
    return DEFAULTS[config["model_type"]].get(key)


def rope_of(config: Json) -> dict[str, Any]:
    """The rotary settings of a model with one kind of layer, in the form of newer files.

    Older files spread them over `rope_scaling` and keys at the top, which count where the settings do not say. The
    order is that of transformers.
    """
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if config.get(key) is not None:
            rope.setdefault(key, config[key])
    rope.setdefault("rope_theta", 10000.0)
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if rope["rope_type"] == "yarn":
        longest = value_of(config, "max_position_embeddings")
        rope.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings", longest))
        if rope.get("factor") is None:
            rope["factor"] = longest / rope["original_max_position_embeddings"]
    return rope


def _rope_fields(rope: Json, where: str) -> dict[str, Any]:
    if rope["rope_type"] not in ("default", "yarn"):
        raise UserError(f"{where}: rope_type {rope['rope_type']!r} is not one of default, yarn.")
    for key, value in rope.items():
        if key not in ROPE_KEYS and value is not None:
            raise UserError(f"{where}: the key {key} of the rotary settings is not known, and may change the model.")
    fields: dict[str, Any] = {"rope_theta": float(rope["rope_theta"]), "rope_factor": 1.0}
    if rope["rope_type"] == "yarn":
        if rope.get("attention_factor") is not None or rope.get("truncate") not in (None, True):
            raise UserError(f"{where}: YaRN with an attention_factor or without truncate cannot be expressed here.")
        given = {ours: rope.get(theirs) for ours, theirs in YARN.items()}
        fields |= {ours: value for ours, value in given.items() if value is not None}
        fields["rope_factor"] = float(fields["rope_factor"])
    return fields


def _deepseek_v4_fields(config: Json, where: str) -> dict[str, Any]:
    main, compress = _deepseek_v4_rope(config)
    if compress.pop("attention_factor", 1.0) != 1.0:
        raise UserError(f"{where}: YaRN with an attention_factor other than 1 cannot be expressed here.")
    layers = value_of(config, "num_hidden_layers")
    hashed = _hash_layers(config, layers)
    if hashed is None:
        raise UserError(f"{where}: the hash layers in mlp_layer_types must be the first ones.")
    limit = value_of(config, "swiglu_limit")
    rates = {LAYER_TYPES["csa"]: 4, LAYER_TYPES["hca"]: 128, **(config.get("compress_rates") or {})}
    for kind in ("csa", "hca"):
        rates[LAYER_TYPES[kind]] = config.get(f"compress_rate_{kind}", rates[LAYER_TYPES[kind]])
    fields = _rope_fields(compress, where)
    fields["compress_theta"] = fields.pop("rope_theta")
    return fields | {
        "rope_theta": float(main["rope_theta"]),
        "rope_dim": int(value_of(config, "head_dim") * main.get("partial_rotary_factor", 1.0)),
        "layer_kinds": _layer_kinds(config, layers),
        "num_hash_layers": hashed,
        "csa_rate": rates[LAYER_TYPES["csa"]],
        "hca_rate": rates[LAYER_TYPES["hca"]],
        "swiglu_limit": 0.0 if limit >= NO_LIMIT else float(limit),
    }


def _deepseek_v4_rope(config: Json) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rotary settings of the window and of the compressed entries; one set in older files is for the latter."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if "main" in rope and "compress" in rope:
        both = dict(rope["main"]), dict(rope["compress"])
    else:
        fraction = config.get("partial_rotary_factor")
        if fraction is None:
            rotated = config.get("qk_rope_head_dim")
            fraction = 64 / 512 if rotated is None else rotated / value_of(config, "head_dim")
        plain = {"rope_theta": value_of(config, "rope_theta"), "partial_rotary_factor": fraction}
        theta = value_of(config, "compress_rope_theta")
        original = {"original_max_position_embeddings": value_of(config, "max_position_embeddings")}
        both = plain, {**original, **rope, **plain, "rope_theta": theta}
    for settings in both:
        settings["rope_type"] = settings.get("rope_type", settings.get("type", "default"))
    return both


def _layer_kinds(config: Json, layers: int) -> list[str]:
    """Kinds of attention, ours. Older files give rates; without either, V4-Pro's order."""
    theirs = {their: ours for ours, their in LAYER_TYPES.items()}
    if config.get("layer_types") is not None:
        return [theirs[kind] for kind in config["layer_types"]][:layers]
    if config.get("compress_ratios") is not None:
        return [{0: "sliding", 4: "csa", 128: "hca"}[rate] for rate in config["compress_ratios"]][:layers]
    return ["hca" if layer < 2 or layer % 2 == 0 else "csa" for layer in range(layers)]


def _hash_layers(config: Json, layers: int) -> int | None:
    """Number of leading layers that route by a table; None where they are not the first ones."""
    if config.get("mlp_layer_types") is None:
        return min(config.get("num_hash_layers", 3), layers)
    kinds = list(config["mlp_layer_types"])[:layers]
    hashed = kinds.count("hash_moe")
    return hashed if kinds[:hashed] == ["hash_moe"] * hashed else None


def family_of(cfg: ModelConfig) -> str:
    """The model_type that can express this model: a family of transformers, or our own format."""
    nearest = {"mla": "deepseek_v3", "csa": "deepseek_v4"}.get(cfg.attention)
    if nearest is None:
        nearest = "qwen3_moe" if cfg.router_score == "softmax" else "glm4_moe"
    fields = asdict(cfg)
    for key, value in FAMILIES[nearest].fixed.items():
        if fields[key] != value and (key != "output_bias" or cfg.attention_bias):
            return OWN
    return nearest


def config_of(cfg: ModelConfig, dtype: str, seq_len: int) -> dict[str, Any]:
    """Content of config.json for this model in its family.

    Args:
        cfg: the model's shape.
        dtype: of the weights, as torch names it without the prefix.
        seq_len: longest sequence trained on.

    Raises:
        UserError: neither a family nor our own format can express the model.
    """
    kind = family_of(cfg)
    if kind == OWN:
        return own_config(cfg, dtype, seq_len)
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
        written["rope_parameters"]["partial_rotary_factor"] = cfg.rope_fraction
        written["partial_rotary_factor"] = cfg.rope_fraction
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
