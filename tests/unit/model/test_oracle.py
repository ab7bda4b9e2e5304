"""Parity with transformers, same weights: GLM-4-MoE is this very architecture; DeepSeek-V3 and Llama check parts."""

from __future__ import annotations

import re

import pytest
import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.attention import Attention, rope_tables
from elastic_moe.model.experts import LocalExperts
from elastic_moe.model.moe import MoE
from elastic_moe.model.transformer import Transformer

pytest.importorskip("transformers")
CFG = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, num_dense_layers=1,
    dense_hidden=48, num_experts=8, experts_per_token=3, expert_hidden=16, num_shared_experts=2, routed_scaling=1.7,
    seq_balance_weight=0.0, init_std=0.2, rope_theta=5000.0, norm_eps=1e-5,
)  # fmt: skip


def build() -> tuple[Transformer, LocalExperts]:
    experts = LocalExperts(CFG, seed=3)
    model = Transformer(CFG, experts)
    model.initialize(3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name or name.endswith("bias"):  # so that they matter
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model, experts


GLM_NAMES = {  # regular expression on our name -> replacement; the first that matches ends it
    r"^head\.weight$": "lm_head.weight",
    r"^embed\.": "model.embed_tokens.",
    r"^norm\.": "model.norm.",
    r"^layers\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
    r"^layers\.(\d+)\.ffn_norm\.": r"model.layers.\1.post_attention_layernorm.",
    r"^layers\.(\d+)\.attn\.(\w)\.": r"model.layers.\1.self_attn.\2_proj.",
    r"^layers\.(\d+)\.mlp\.(\w+)\.": r"model.layers.\1.mlp.\2_proj.",
    r"^layers\.(\d+)\.moe\.router\.bias$": r"model.layers.\1.mlp.gate.e_score_correction_bias",
    r"^layers\.(\d+)\.moe\.router\.": r"model.layers.\1.mlp.gate.",
    r"^layers\.(\d+)\.moe\.shared\.(\w+)\.": r"model.layers.\1.mlp.shared_experts.\2_proj.",
}


def glm_name(name: str) -> str:
    """Our dense parameter's name in Glm4MoeForCausalLM."""
    return next(re.sub(ours, theirs, name) for ours, theirs in GLM_NAMES.items() if re.match(ours, name))


def test_whole_model_equals_glm4_moe() -> None:
    """Logits and the gradient of every parameter."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    hf_config = Glm4MoeConfig(
        vocab_size=CFG.vocab_size, hidden_size=CFG.hidden_size, intermediate_size=CFG.dense_hidden,
        num_hidden_layers=CFG.num_layers, num_attention_heads=CFG.num_heads, num_key_value_heads=CFG.num_kv_heads,
        head_dim=CFG.head_dim, moe_intermediate_size=CFG.expert_hidden, num_experts_per_tok=CFG.experts_per_token,
        n_shared_experts=CFG.num_shared_experts, n_routed_experts=CFG.num_experts, n_group=1, topk_group=1,
        routed_scaling_factor=CFG.routed_scaling, first_k_dense_replace=CFG.num_dense_layers, norm_topk_prob=True,
        use_qk_norm=False, attention_bias=False, rms_norm_eps=CFG.norm_eps, num_mtp_layers=0,
        rope_parameters={"rope_type": "default", "rope_theta": CFG.rope_theta, "partial_rotary_factor": 1.0},
        attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip
    oracle = Glm4MoeForCausalLM(hf_config).float()
    model, experts = build()
    ours = dict(model.named_parameters()) | dict(model.named_buffers())
    state = {glm_name(name): tensor.detach() for name, tensor in ours.items()}
    for i in range(experts.num_layers):
        gate, up, down = experts.slot_params(i)
        at = f"model.layers.{i + CFG.num_dense_layers}.mlp.experts"
        state[f"{at}.gate_up_proj"] = torch.cat([gate, up], dim=1).detach()
        state[f"{at}.down_proj"] = down.detach()
    oracle.load_state_dict(state)

    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, CFG.vocab_size, (2, 3, 20), generator=generator)
    torch.testing.assert_close(model(tokens), oracle(tokens).logits, rtol=1e-4, atol=1e-4)

    model.loss(tokens, targets).loss_sum.backward()
    logits = oracle(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    theirs = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[glm_name(name)].grad, rtol=1e-3, atol=1e-3, msg=name)
    for i in range(experts.num_layers):
        gate, up, down = (p.grad for p in experts.slot_params(i))
        at = f"model.layers.{i + CFG.num_dense_layers}.mlp.experts"
        assert gate is not None and up is not None
        expected = theirs[f"{at}.gate_up_proj"].grad
        torch.testing.assert_close(torch.cat([gate, up], dim=1), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(down, theirs[f"{at}.down_proj"].grad, rtol=1e-3, atol=1e-3)


def test_moe_layer_equals_deepseek_v3() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    hf_config = DeepseekV3Config(
        hidden_size=CFG.hidden_size, moe_intermediate_size=CFG.expert_hidden, n_routed_experts=CFG.num_experts,
        n_shared_experts=CFG.num_shared_experts, num_experts_per_tok=CFG.experts_per_token, n_group=1, topk_group=1,
        norm_topk_prob=True, routed_scaling_factor=CFG.routed_scaling, experts_implementation="eager",
    )  # fmt: skip
    oracle = DeepseekV3MoE(hf_config).float()
    model, experts = build()
    moe = model.layers[1].moe
    assert isinstance(moe, MoE) and moe.shared is not None
    gate, up, down = experts.slot_params(0)
    oracle.load_state_dict(
        {
            "gate.weight": moe.router.weight,
            "gate.e_score_correction_bias": moe.router.bias,
            "experts.gate_up_proj": torch.cat([gate, up], dim=1),
            "experts.down_proj": down,
            "shared_experts.gate_proj.weight": moe.shared.gate.weight,
            "shared_experts.up_proj.weight": moe.shared.up.weight,
            "shared_experts.down_proj.weight": moe.shared.down.weight,
        }
    )
    x = torch.randn((2, 11, CFG.hidden_size), generator=torch.Generator().manual_seed(2), requires_grad=True)
    out = moe(x, experts)
    expected = oracle(x)
    torch.testing.assert_close(out.y_BSD, expected, rtol=1e-4, atol=1e-5)
    _, _, ids = oracle.gate(x)
    assert torch.equal(out.load_E, torch.bincount(ids.flatten(), minlength=CFG.num_experts))
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (ours,) = torch.autograd.grad((out.y_BSD * weights).sum(), x)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    unbiased = moe.router.bias.clone()
    moe.router.bias.zero_()
    assert not torch.equal(moe(x, experts).load_E, out.load_E), "the bias must matter in this test"
    moe.router.bias.copy_(unbiased)


def test_attention_equals_llama() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    hf_config = LlamaConfig(
        hidden_size=CFG.hidden_size, num_attention_heads=CFG.num_heads, num_key_value_heads=CFG.num_kv_heads,
        head_dim=CFG.head_dim, rope_parameters={"rope_type": "default", "rope_theta": CFG.rope_theta},
        attn_implementation="eager",
    )  # fmt: skip
    oracle, attention = LlamaAttention(hf_config, layer_idx=0).float(), Attention(CFG)
    oracle.load_state_dict({f"{name[0]}_proj.weight": tensor for name, tensor in attention.state_dict().items()})
    x = torch.randn((2, 13, CFG.hidden_size), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(13).expand(2, -1)
    mask = torch.full((13, 13), float("-inf")).triu(1).expand(2, 1, -1, -1)
    expected, _ = oracle(x, position_embeddings=LlamaRotaryEmbedding(hf_config)(x, positions), attention_mask=mask)
    tables = rope_tables(13, CFG.head_dim, CFG.rope_theta, x.device)
    torch.testing.assert_close(attention(x, *tables), expected, rtol=1e-5, atol=1e-6)
