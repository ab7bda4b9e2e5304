"""Parity with transformers on tiny random models of each family: logits, every gradient, and the way there and back.

Everything that starts at zero or one there (biases, gains, sinks, position biases, mixing coefficients) is made random
first, so that nothing hides; hash tables are filled with distinct experts.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe.errors import UserError
from elastic_moe.model.hf.checkpoint import (
    INDEX,
    HFCheckpoint,
    load_model,
    named_tensors,
    read_fields,
    write_checkpoint,
)
from elastic_moe.model.hf.families import swap_streams
from tests.unit.model.hf.parity import assert_parity, random_model, save

transformers = pytest.importorskip("transformers")
SEEDS = range(6)


def moe_sizes(rng: random.Random, group_choices: tuple[int, ...] = (1, 2, 4)) -> dict[str, Any]:
    groups = rng.choice(group_choices)
    experts = groups * rng.choice([2, 3, 5])
    kept = rng.randint(1, groups)
    return {
        "n_routed_experts": experts,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": rng.randint(1, min(4, kept * experts // groups)),
        "n_shared_experts": rng.randint(0, 2),
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
        "norm_topk_prob": rng.random() < 0.7,
    }


def base_sizes(rng: random.Random) -> dict[str, Any]:
    layers = rng.randint(2, 3)
    return {
        "vocab_size": rng.choice([53, 64]), "hidden_size": rng.choice([20, 33, 48]), "num_hidden_layers": layers,
        "first_k_dense_replace": rng.randint(0, layers - 1), "intermediate_size": rng.choice([24, 35]),
        "moe_intermediate_size": rng.choice([7, 12, 16]), "num_attention_heads": rng.choice([2, 3, 4]),
        "rms_norm_eps": rng.choice([1e-6, 1e-5]), "initializer_range": 0.2, "max_position_embeddings": 64,
    }  # fmt: skip


def rope(rng: random.Random, mscale: bool) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"rope_type": "default", "rope_theta": 5000.0}
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    return yarn | ({"mscale": 0.7, "mscale_all_dim": 1.0} if mscale and rng.random() < 0.7 else {})


def v3(rng: random.Random) -> Any:
    return transformers.DeepseekV3Config(
        **base_sizes(rng), **moe_sizes(rng), q_lora_rank=rng.choice([None, 12]), kv_lora_rank=rng.choice([9, 16]),
        qk_nope_head_dim=rng.choice([5, 8]), qk_rope_head_dim=rng.choice([2, 6]), v_head_dim=rng.choice([4, 11]),
        attention_bias=rng.random() < 0.5, rope_interleave=rng.random() < 0.7, rope_parameters=rope(rng, True),
        num_mtp_layers=0, num_key_value_heads=None,
    )  # fmt: skip


def glm4(rng: random.Random) -> Any:
    heads = {"num_key_value_heads": 1, "head_dim": rng.choice([4, 12]), "use_qk_norm": rng.random() < 0.5}
    turn = {**rope(rng, False), "partial_rotary_factor": rng.choice([0.5, 1.0])}
    return transformers.Glm4MoeConfig(
        **base_sizes(rng), **moe_sizes(rng), **heads, rope_parameters=turn, attention_bias=rng.random() < 0.7,
        num_mtp_layers=0,
    )  # fmt: skip


def qwen3(rng: random.Random) -> Any:
    sizes = base_sizes(rng)
    heads = sizes.pop("num_attention_heads")
    return transformers.Qwen3MoeConfig(
        **{k: v for k, v in sizes.items() if k != "first_k_dense_replace"}, num_attention_heads=2 * heads,
        num_key_value_heads=heads, head_dim=rng.choice([4, 10]), num_experts=rng.choice([5, 8]),
        num_experts_per_tok=rng.randint(1, 4), norm_topk_prob=rng.random() < 0.5, attention_bias=rng.random() < 0.5,
        mlp_only_layers=list(range(sizes["first_k_dense_replace"])), rope_parameters=rope(rng, False),
    )  # fmt: skip


def v4(rng: random.Random) -> Any:
    sizes = base_sizes(rng)
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    layers = sizes["num_hidden_layers"]
    hashed = rng.randint(0, layers)
    groups = rng.choice([1, 2])
    compress = rope(rng, False)
    if compress["rope_type"] == "yarn":
        compress["attention_factor"] = 1.0
    partial = {"partial_rotary_factor": 0.5}
    return transformers.DeepseekV4Config(
        vocab_size=sizes["vocab_size"], hidden_size=sizes["hidden_size"], num_hidden_layers=layers,
        moe_intermediate_size=sizes["moe_intermediate_size"], num_attention_heads=2 * groups,
        rms_norm_eps=sizes["rms_norm_eps"], initializer_range=0.2, max_position_embeddings=64, head_dim=12,
        q_lora_rank=14, n_routed_experts=rng.choice([6, 9]), num_experts_per_tok=rng.randint(1, 4),
        scoring_func=rng.choice(["sqrtsoftplus", "sigmoid"]), routed_scaling_factor=1.5,
        layer_types=rng.sample(kinds, layers), mlp_layer_types=["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        compress_rates={kinds[1]: rng.choice([2, 4]), kinds[2]: 8}, hc_mult=rng.choice([2, 4]),
        hc_sinkhorn_iters=rng.choice([3, 20]), swiglu_limit=rng.choice([0.5, 10.0]), sliding_window=7,
        o_groups=groups, o_lora_rank=6, index_n_heads=3, index_head_dim=10, index_topk=64,
        rope_parameters={
            "main": {"rope_type": "default", "rope_theta": 10000.0, **partial}, "compress": {**compress, **partial},
        },
        partial_rotary_factor=0.5, attn_implementation="eager",
    )  # fmt: skip


CONFIGS = {"deepseek_v3": v3, "deepseek_v4": v4, "qwen3_moe": qwen3, "glm4_moe": glm4}
CASES = list(itertools.product(CONFIGS, SEEDS))


def oracle(kind: str, seed: int) -> Any:
    """A tiny random model of transformers in which nothing is zero or one."""
    torch.manual_seed(seed)
    return random_model(CONFIGS[kind](random.Random(f"{kind}{seed}")))


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_logits_and_gradients(kind: str, seed: int, tmp_path: Path) -> None:
    theirs = oracle(kind, seed)
    assert_parity(theirs, save(theirs, tmp_path / "hf"), tmp_path / "grads", seed)


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_there_and_back_is_bit_equal(kind: str, seed: int, tmp_path: Path) -> None:
    theirs = oracle(kind, seed)
    cfg, model, experts = load_model(save(theirs, tmp_path / "hf"))
    tensors = named_tensors(model, experts)
    unwritten = write_checkpoint(tmp_path / "back", cfg, lambda spec: tensors[spec.name], 64, shard_bytes=20_000)
    assert unwritten == []
    assert (tmp_path / "back" / INDEX).exists()
    again, report = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    tokens = torch.randint(0, cfg.vocab_size, (1, 24), generator=torch.Generator().manual_seed(1))
    for model_of_theirs in (theirs, again):
        model_of_theirs.set_attn_implementation("eager")
        model_of_theirs.set_experts_implementation("eager")
    assert torch.equal(theirs(tokens, use_cache=False).logits, again(tokens, use_cache=False).logits)


def test_streams_are_transposed() -> None:
    """H_res is the transpose of their matrix: the rows that make element [i, j] there make [j, i] here."""
    n = 3
    rows = torch.arange(2 * n + n * n)
    swapped = swap_streams(rows)
    assert torch.equal(swapped[: 2 * n], rows[: 2 * n])
    for i, j in itertools.product(range(n), repeat=2):
        assert swapped[2 * n + i * n + j] == 2 * n + j * n + i
    assert torch.equal(swap_streams(swapped), rows)


def test_untransposed_streams_are_seen(tmp_path: Path) -> None:
    """The parity test can fail: without the transposition the logits differ."""
    theirs = oracle("deepseek_v4", 0)
    cfg, model, experts = load_model(save(theirs, tmp_path / "hf"))
    tokens = torch.randint(0, cfg.vocab_size, (1, 24), generator=torch.Generator().manual_seed(1))
    before = model(tokens)
    for name, tensor in named_tensors(model, experts).items():
        if name.endswith(("_mix.proj", "_mix.base")):
            tensor.copy_(swap_streams(tensor))
    assert (model(tokens) - before).abs().max() > 1e-3


def test_what_is_missing_or_strange_is_named(tmp_path: Path) -> None:
    theirs = oracle("deepseek_v3", 0)
    directory = save(theirs, tmp_path / "hf")
    fields = read_fields(directory)
    from elastic_moe.config.schema import ModelConfig

    with pytest.raises(UserError, match=r"embed_tokens\.weight is"):
        HFCheckpoint(directory, ModelConfig(**{**fields, "vocab_size": 99}))
    with pytest.raises(UserError, match="no place for"):
        HFCheckpoint(directory, ModelConfig(**{**fields, "num_shared_experts": 0, "num_layers": 1}))
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read_fields(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="model_type 'llama'"):
        read_fields(tmp_path)
    with pytest.raises(UserError, match=r"model.attention=csa .* deepseek_v4"):
        write_checkpoint(tmp_path / "x", ModelConfig(attention="csa", residual="hc"), lambda _: torch.empty(0), 8)
