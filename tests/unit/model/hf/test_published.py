"""Directories as publishers write them: their spellings, absent keys, fused experts, weights in FP8.

The oracle is transformers, which is given the same config.json. The files hold what the publishers' have: the keys of
DeepSeek-V3, GLM-4.5 and Qwen3-30B-A3B, with small sizes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from elastic_moe.errors import UserError
from elastic_moe.model.hf.checkpoint import HFCheckpoint, load_model, named_tensors, read_fields
from elastic_moe.model.hf.families import FAMILIES
from elastic_moe.model.hf.files import read_headers
from elastic_moe.model.hf.known_keys import DEFAULTS
from elastic_moe.model.hf.quantized import dequantize
from elastic_moe.model.params import param_specs
from tests.unit.model.hf.parity import assert_parity, random_model, save

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 28, "num_attention_heads": 4}
COMMON = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.2, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "moe_intermediate_size": 10, "max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "beta_fast": 32, "beta_slow": 1, "factor": 4, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16, "type": "yarn",
}  # fmt: skip
V3 = {
    **COMMON, **SIZES, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "moe_layer_freq": 1, "n_group": 2,
    "n_routed_experts": 8, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 3,
    "num_key_value_heads": 4, "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 12,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "rms_norm_eps": 1e-06, "rope_scaling": YARN, "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "topk_group": 1,
    "topk_method": "noaux_tc", "transformers_version": "4.33.1", "v_head_dim": 7,
}  # fmt: skip
GLM = {
    **COMMON, **SIZES, "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True,
    "pad_token_id": 9, "eos_token_id": [9, 10, 11], "head_dim": 12, "partial_rotary_factor": 0.5, "n_group": 1,
    "topk_group": 1, "n_routed_experts": 8, "n_shared_experts": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1, "num_key_value_heads": 2, "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000, "transformers_version": "4.54.0",
    "use_qk_norm": False,
}  # fmt: skip
QWEN3 = {
    **COMMON, **SIZES, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "bos_token_id": 3, "eos_token_id": 4, "decoder_sparse_step": 1, "head_dim": 8, "max_window_layers": 48,
    "mlp_only_layers": [], "norm_topk_prob": True, "num_experts": 8, "num_experts_per_tok": 3,
    "num_key_value_heads": 2, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "transformers_version": "4.51.0",
    "use_sliding_window": False,
}  # fmt: skip
V4 = {
    **COMMON, "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "model_type": "deepseek_v4", "head_dim": 16, "q_lora_rank": 14, "num_key_value_heads": 1, "n_routed_experts": 6,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "o_groups": 2, "o_lora_rank": 6, "index_n_heads": 3,
    "index_head_dim": 16, "index_topk": 64, "sliding_window": 7, "norm_topk_prob": True, "hc_mult": 2,
    "compress_ratios": [0, 4, 128, 4, 0], "num_hash_layers": 1, "qk_rope_head_dim": 8, "rope_theta": 10000,
    "compress_rope_theta": 40000, "rope_scaling": {**YARN, "mscale": 0, "mscale_all_dim": 0}, "swiglu_limit": 10.0,
}  # fmt: skip


def without(config: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in names} | more


ROPE = {"rope_type": "default", "rope_theta": 5000.0}
PUBLISHED: dict[str, dict[str, Any]] = {
    "V3": V3,
    "V3, no YaRN": without(V3, "rope_scaling", rope_theta=500.0),
    "V3, newer": without(V3, "rope_scaling", "torch_dtype", dtype="bfloat16", rope_parameters={**YARN, "type": None})
    | {"rope_parameters": {**{k: v for k, v in YARN.items() if k != "type"}, "rope_type": "yarn", "rope_theta": 300.0}},
    "V3, not interleaved": {**V3, "rope_interleave": False},
    "V3, much left out": without(
        V3, "attention_bias", "norm_topk_prob", "routed_scaling_factor", "rms_norm_eps", "rope_theta"
    ),
    "V3, no latent of queries": {**V3, "q_lora_rank": None},
    "GLM-4.5-Air": GLM,
    "GLM-4.5": {**GLM, "use_qk_norm": True, "routed_scaling_factor": 2.5},
    "GLM, fraction left out": without(GLM, "partial_rotary_factor", "use_qk_norm", "attention_bias"),
    "GLM, fraction in rope_scaling": without(
        GLM, "partial_rotary_factor", rope_scaling={**ROPE, "partial_rotary_factor": 1 / 3}
    ),
    "GLM, fraction in rope_parameters": without(
        GLM, "partial_rotary_factor", "rope_scaling", "rope_theta",
        rope_parameters={**ROPE, "partial_rotary_factor": 0.5},
    ),
    "GLM, both fractions": without(
        GLM, "rope_scaling", partial_rotary_factor=1.0, rope_parameters={**ROPE, "partial_rotary_factor": 0.5}
    ),
    "GLM, YaRN beside a fraction": {**GLM, "rope_scaling": {**YARN, "mscale": None, "mscale_all_dim": None}},
    "Qwen3": QWEN3,
    "Qwen3, much left out": without(
        QWEN3, "norm_topk_prob", "head_dim", "rope_theta", "mlp_only_layers", "rms_norm_eps"
    ),
    "Qwen3, YaRN": {
        **QWEN3, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "attention_bias": True, "mlp_only_layers": [0],
    },
    "Qwen3, YaRN's factor from lengths": {
        **QWEN3, "rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    },
    "Qwen3, num_local_experts": without(QWEN3, "num_experts", num_local_experts=8),
    "V4": V4,
    "V4, much left out": without(
        V4, "compress_ratios", "num_hash_layers", "rope_scaling", "norm_topk_prob", num_hidden_layers=5
    ),
}  # fmt: skip


def published(config: dict[str, Any], where: Path, **options: Any) -> tuple[Any, Path]:
    """A random model of transformers made from a config.json, and its directory with this very file."""
    torch.manual_seed(len(str(config)))
    made = transformers.AutoConfig.for_model(config["model_type"]).from_dict(json.loads(json.dumps(config)))
    made._attn_implementation = "eager"
    theirs = random_model(made)
    save(theirs, where, **options)
    (where / "config.json").write_text(json.dumps(config))
    return theirs, where


@pytest.mark.parametrize("name", PUBLISHED)
def test_parity_on_what_publishers_write(name: str, tmp_path: Path) -> None:
    theirs, directory = published(PUBLISHED[name], tmp_path / "hf")
    assert_parity(theirs, directory, tmp_path / "grads", 0)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_absent_keys_have_the_default_of_the_class(kind: str) -> None:
    made = transformers.AutoConfig.for_model(kind)
    assert {key: getattr(made, key) for key in DEFAULTS[kind]} == DEFAULTS[kind]
    assert set(FAMILIES[kind].keys.values()) <= {*DEFAULTS[kind], "head_dim"}


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (V3, {"new_gate": 1}, "the key new_gate is not known for deepseek_v3"),
        (V3, {"use_qk_norm": True}, "the key use_qk_norm is not known for deepseek_v3"),
        (V3, {"scoring_func": "softmax"}, "scoring_func='softmax' cannot be expressed"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq=2 cannot be expressed"),
        (V3, {"num_key_value_heads": 2}, "num_key_value_heads must be num_attention_heads"),
        (V3, {"rope_scaling": {**YARN, "new": 1}}, "the key new of the rotary settings is not known"),
        (V3, {"rope_scaling": {**YARN, "attention_factor": 1.0}}, "YaRN with an attention_factor"),
        (V3, {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type 'linear' is not one of default, yarn"),
        (V3, {"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method='awq'"),
        (QWEN3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 cannot be expressed"),
        (QWEN3, {"use_sliding_window": True}, "use_sliding_window=True cannot be expressed"),
        (QWEN3, {"attention_dropout": 0.1}, "attention_dropout=0.1 cannot be expressed"),
        (GLM, {"partial_rotary_factor": 0.4, "head_dim": 8}, "must be at most 1 and rotate an even number"),
    ],
)
def test_what_cannot_be_expressed_is_a_sentence(
    config: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_fields(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("config", [V3, GLM, QWEN3], ids=["V3", "GLM", "Qwen3"])
def test_fused_experts(config: dict[str, Any], tmp_path: Path) -> None:
    theirs, directory = published(config, tmp_path / "hf", save_original_format=False)
    stored = read_headers(directory)
    assert "model.layers.1.mlp.experts.gate_up_proj" in stored
    assert not any(name.endswith("experts.0.gate_proj.weight") for name in stored)
    assert_parity(theirs, directory, tmp_path / "grads", 0)


def test_a_fused_tensor_of_another_shape_is_a_sentence(tmp_path: Path) -> None:
    _, directory = published(QWEN3, tmp_path / "hf", save_original_format=False)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    file = directory / read_headers(directory)[name].file
    tensors = load_file(file)
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"gate_up_proj is \(8, 24, 20\), not \(8, 20, 24\)"):
        load_model(directory)


def quantised(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(e4m3 numbers, scales, the value they stand for) of a matrix, one element's block at a time."""
    rows, columns = (torch.arange(n) // b for n, b in zip(weight.shape, block, strict=True))
    scale = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1)
    for i, j in torch.cartesian_prod(rows.unique(), columns.unique()).tolist():
        scale[i, j] = weight[rows == i][:, columns == j].abs().max() / 448
    wide = scale[rows][:, columns]
    numbers = (weight / wide).to(torch.float8_e4m3fn)
    return numbers, scale, numbers.float() * wide


@pytest.mark.parametrize("block", [(128, 128), (8, 8), (4, 16)])
@pytest.mark.parametrize("fused", [False, True], ids=["each expert", "fused experts"])
def test_fp8_weights_with_scales_of_blocks(fused: bool, block: tuple[int, int], tmp_path: Path) -> None:
    """As DeepSeek publishes them: all projections but the router's; sizes that are no multiple of the block."""
    theirs, directory = published(V3, tmp_path / "hf")
    del theirs
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (directory / "model.safetensors.index.json").unlink()
    stored, expected = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if name.endswith("_proj.weight") or name.endswith("with_mqa.weight"):
            stored[name], stored[f"{name}_scale_inv"], expected[name] = quantised(weight, block)
    if fused:
        fuse(stored)
    save_file(stored, directory / "model.safetensors")
    scheme = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(block)}
    (directory / "config.json").write_text(json.dumps({**V3, "quantization_config": scheme}))
    cfg, model, experts = load_model(directory)
    ours, family = named_tensors(model, experts), FAMILIES["deepseek_v3"]
    for spec in param_specs(cfg):
        name = family.name(spec.name)
        assert name is not None
        assert torch.equal(ours[spec.name], expected[name].float()), name


def fuse(stored: dict[str, torch.Tensor]) -> None:
    """Replace the experts' tensors by fused ones, scales too, as transformers merges them."""
    for suffix in ("", "_scale_inv"):
        for layer in (1, 2):
            where = f"model.layers.{layer}.mlp.experts"
            parts = {
                part: [stored.pop(f"{where}.{e}.{part}_proj.weight{suffix}") for e in range(8)]
                for part in ("gate", "up", "down")
            }
            both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
            stored[f"{where}.gate_up_proj{suffix}"] = torch.stack(both)
            stored[f"{where}.down_proj{suffix}"] = torch.stack(parts["down"])


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 129), (256, 100)])
def test_dequantisation(shape: tuple[int, int]) -> None:
    numbers, scale, value = quantised(torch.randn(shape), (128, 128))
    assert torch.equal(dequantize(numbers, scale, (128, 128)), value)


def test_scales_that_do_not_fit_are_a_sentence(tmp_path: Path) -> None:
    _, directory = published(V3, tmp_path / "hf")
    scheme = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps({**V3, "quantization_config": scheme}))
    name = "model.layers.0.self_attn.o_proj.weight"
    file = directory / read_headers(directory)[name].file
    tensors = load_file(file)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"has no tensor model.layers.0.self_attn.o_proj.weight_scale_inv"):
        load_model(directory)
    save_file({**tensors, f"{name}_scale_inv": torch.ones(2, 1)}, file)
    with pytest.raises(UserError, match=r"o_proj.weight_scale_inv is \(2, 1\), not \(1, 1\)"):
        load_model(directory)
    (directory / "config.json").write_text(json.dumps(V3))
    with pytest.raises(UserError, match="has type F8_E4M3"):
        load_model(directory)


def test_one_expert_of_a_fused_tensor(tmp_path: Path) -> None:
    _, directory = published(QWEN3, tmp_path / "hf", save_original_format=False)
    checkpoint = HFCheckpoint(directory, load_model(directory)[0])
    spec = next(s for s in param_specs(load_model(directory)[0]) if s.name == "layers.0.moe.experts.5.up")
    value = checkpoint.read(spec)
    assert value is not None
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with safe_open(directory / read_headers(directory)[name].file, framework="pt") as file:
        assert torch.equal(value, file.get_tensor(name)[5, 10:])
