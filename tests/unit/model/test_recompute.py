"""`model.recompute`: every policy has the losses, statistics and gradients of keeping all, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.recompute import layers_at_once
from elastic_moe.model.transformer import LossOutput, Transformer

BASE = ModelConfig(
    vocab_size=50, hidden_size=24, num_layers=4, num_experts=6, experts_per_token=2, expert_hidden=8, dense_hidden=16,
    num_heads=2, num_kv_heads=1, head_dim=8, init_std=0.2, rope_dim=4, value_dim=8, kv_latent=12, router_z_loss=0.01,
)  # fmt: skip
CSA: dict[str, Any] = {
    "attention": "csa", "query_latent": 16, "output_latent": 8, "index_dim": 8, "window": 8, "csa_rate": 2,
    "hca_rate": 4, "index_topk": 4,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "latent": {"attention": "mla", "mtp_depth": 1, "num_shared_experts": 0},
    "hc": {"residual": "hc", "qk_norm": True},
    "all": {
        **CSA,
        "residual": "mhc",
        "readout": "learned",
        "mtp_depth": 1,
        "num_hash_layers": 1,
        "document_mask": True,
    },
}
POLICIES = ["selective", "full", "2", "3", "9"]


def build(cfg: ModelConfig) -> tuple[Transformer, LocalExperts]:
    experts = LocalExperts(cfg, seed=1)
    model = Transformer(cfg, experts)
    model.initialize(1)
    dice = torch.Generator().manual_seed(5)
    with torch.no_grad():  # streams of their own, and norms that are no identity
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=dice))
    for parameter in (*model.parameters(), *experts.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    experts.direct = True
    return model, experts


def text(batch: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 50, (batch, 12), generator=torch.Generator().manual_seed(seed))


def step(cfg: ModelConfig, autocast: bool = False) -> tuple[LossOutput, dict[str, torch.Tensor]]:
    """Two micro-batches, and one without a sequence: the last output, and all gradients."""
    model, experts = build(cfg)
    for batch, seed in ((2, 0), (0, 0), (3, 2)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model.loss(text(batch, seed), text(batch, seed + 1), gains=True)
        out.loss_sum.backward()
    named = (*model.named_parameters(), *experts.named_parameters())
    return out, {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_no_bit_differs(name: str, policy: str) -> None:
    """In bf16 where streams are mixed, in fp32 elsewhere."""
    cfg, autocast = replace(BASE, **MODELS[name]), "residual" in MODELS[name]
    (plain, expected), (made_again, grads) = step(cfg, autocast), step(replace(cfg, recompute=policy), autocast)
    assert torch.equal(plain.loss_sum, made_again.loss_sum)
    assert torch.equal(plain.ce_sum, made_again.ce_sum)
    assert torch.equal(plain.load_LE, made_again.load_LE)
    assert torch.equal(plain.stats, made_again.stats)
    assert grads.keys() == expected.keys()
    different = [key for key, grad in grads.items() if not torch.equal(grad, expected[key])]
    assert not different
    assert any(grad.any() for grad in grads.values())


class Noted:
    """An expert backend that notes which calls make a layer once more."""

    def __init__(self, inner: LocalExperts) -> None:
        self.inner, self.calls = inner, list[tuple[int, bool]]()

    def __call__(
        self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, gates_TK: torch.Tensor, again: bool = False
    ) -> torch.Tensor:
        self.calls.append((moe_layer, again))
        return self.inner(moe_layer, x_TD, ids_TK, gates_TK, again)


@pytest.mark.parametrize("batch", [0, 2])
def test_layers_are_made_again_in_the_same_order_on_every_rank(batch: int) -> None:
    """Also where a rank has no sequence: with a dispatch, every call is a collective."""
    expected = {
        "selective": [],
        "full": [3, 2, 1, 0],
        "2": [3, 1, 2, 0],  # the layer of multi-token prediction, then layers 2 and 3, then the first with experts
        "9": [3, 0, 1, 2],
    }
    for policy, order in expected.items():
        model, experts = build(replace(BASE, mtp_depth=1, recompute=policy))
        model.experts = noted = Noted(experts)
        out = model.loss(text(batch, 0), text(batch, 1))
        forward = [(layer, False) for layer in range(4)]
        assert noted.calls == forward
        out.loss_sum.backward()
        assert noted.calls == forward + [(layer, True) for layer in order], policy
        noted.calls.clear()
        with torch.no_grad():
            model.loss(text(batch, 0), text(batch, 1))
        assert noted.calls == forward


def test_numbers_of_layers() -> None:
    policies = {"none": 0, "selective": 0, "full": 1, "7": 7}
    assert [layers_at_once(replace(BASE, recompute=policy)) for policy in policies] == list(policies.values())
