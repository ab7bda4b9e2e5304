"""Compute weights in bf16: the same bits as fp32 ones under autocast, with fp32 sums of their gradients."""

from __future__ import annotations

import pytest
import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.layers import Linear
from elastic_moe.model.params import dense_product_numel
from elastic_moe.model.transformer import Transformer
from elastic_moe.runtime.compute_copies import set_dtype

KINDS = {
    "gqa": ModelConfig(attention="gqa", residual="plain", readout="mean", vocab_size=64),
    "mla": ModelConfig(attention="mla", residual="mhc", vocab_size=64),
    "mla, gates": ModelConfig(attention="mla", residual="hc", vocab_size=64, router_score="softmax"),
}


def stacks_of(experts: LocalExperts, cfg: ModelConfig) -> list[torch.Tensor]:
    return [stack for layer in range(cfg.num_moe_layers) for stack in experts.slot_params(layer)]


def passed(cfg: ModelConfig, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Two micro-batches under autocast: the sum of their losses, and the sums of the gradients."""
    experts = LocalExperts(cfg)
    experts.direct = True
    model = Transformer(cfg, experts)
    stacks = stacks_of(experts, cfg)
    torch.manual_seed(1)
    for weight in (*model.parameters(), *stacks):
        torch.nn.init.normal_(weight, std=0.05)
        weight.grad = torch.zeros_like(weight)
    values = [weight.detach().clone() for weight in (*model.parameters(), *stacks)]
    grads = [weight.grad for weight in (*model.parameters(), *stacks)]
    set_dtype(model, stacks, dtype)
    with torch.no_grad():
        for weight, value in zip((*model.parameters(), *stacks), values, strict=True):
            weight.copy_(value)
    total = torch.zeros(())
    for _ in range(2):
        tokens = torch.randint(0, cfg.vocab_size, (2, 33))
        with torch.autocast("cpu", torch.bfloat16):
            out = model.loss(tokens[:, :-1], tokens[:, 1:])
        out.loss_sum.backward()
        total += out.loss_sum.detach()
    names = [*dict(model.named_parameters()), *(f"stack {i}" for i in range(len(stacks)))]
    found = {name: weight.grad for name, weight in zip(names, (*model.parameters(), *stacks), strict=True)}
    assert all(now is before for now, before in zip(found.values(), grads, strict=True)), "the sums stay in place"
    return total, found


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_have_the_bits_of_fp32_weights_under_autocast(kind: str) -> None:
    wide_loss, wide = passed(KINDS[kind], torch.float32)
    narrow_loss, narrow = passed(KINDS[kind], torch.bfloat16)
    assert torch.equal(wide_loss, narrow_loss)
    for name, grad in narrow.items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad, wide[name]), name
    assert all(grad.any() for grad in narrow.values())


def test_matrices_change_their_dtype_there_and_back() -> None:
    cfg = KINDS["mla"]
    experts = LocalExperts(cfg)
    model, stacks = Transformer(cfg, experts), stacks_of(experts, cfg)
    for dtype in (torch.bfloat16, torch.float32):
        set_dtype(model, stacks, dtype)
        linear = [module.weight for module in model.modules() if isinstance(module, Linear)]
        assert {weight.dtype for weight in (*linear, *stacks)} == {dtype}
        others = set(model.parameters()) - set(linear)
        assert {weight.dtype for weight in others} == {torch.float32}, "norms, embedding, routers, maps of streams"
        assert sum(weight.numel() for weight in linear) == dense_product_numel(cfg)
