"""The whole model on a GPU against the same model on the CPU: loss and gradients, per family, in fp32 and bf16."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts.grouped import grouped_swiglu, loop_swiglu
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.transformer import Transformer
from tests.dist.test_equality import deepseek
from tests.dist.test_runtime import CORPUS
from tests.local_run import tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")
# Gradients far below it are rounding: streams that are equal at the start, and a norm behind them, leave the learned
# readout none (5e-7; changing weights in the last bit changes it by 70 %). The smallest of the others is 7e-3.
SMALL = 1e-3


def _families() -> dict[str, ModelConfig]:
    tiny = tiny_config(Path("unused"), CORPUS)
    model = replace(tiny.model, vocab_size=257)
    mla = {"attention": "mla", "kv_latent": 16, "rope_dim": 8, "value_dim": 16}
    return {
        "gqa": model,
        "mla": replace(model, **mla),
        "mla_mhc": replace(model, **mla, residual="mhc"),
        "mla_mhc_eager": replace(model, **mla, residual="mhc", fused="off"),
        # Many heads of the indexer: an entry that all of them score 0 ties with others, and which of them a GPU chooses
        # is not what a CPU does.
        "v4": replace(deepseek(replace(tiny, model=model)).model, hidden_size=64, index_heads=16),
    }


FAMILIES = _families() if torch.cuda.is_available() else {}


def _pass(
    cfg: ModelConfig, device: torch.device, precision: AbstractContextManager[object]
) -> tuple[float, dict[str, torch.Tensor]]:
    experts = LocalExperts(cfg)
    model = Transformer(cfg, experts)
    model.initialize(1)
    model, experts = model.to(device), experts.to(device)
    tokens = torch.randint(0, 257, (4, 65), generator=torch.Generator().manual_seed(2)).to(device)
    with precision:
        out = model.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    out.loss_sum.backward()
    named = [*model.named_parameters(), *experts.named_parameters()]
    return float(out.ce_sum), {name: p.grad.cpu() for name, p in named if p.grad is not None}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_computes_what_the_cpu_does(family: str, precision: str) -> None:
    cfg = copy.deepcopy(FAMILIES[family])
    exact = precision == "fp32"

    def context(kind: str) -> AbstractContextManager[object]:
        return nullcontext() if exact else torch.autocast(kind, torch.bfloat16)

    expected, wanted = _pass(cfg, torch.device("cpu"), nullcontext())
    loss, grads = _pass(cfg, CUDA, context("cuda"))
    assert loss == pytest.approx(expected, rel=1e-5 if exact else 1e-2)
    assert grads.keys() == wanted.keys()
    if exact:  # in bf16 a near tie of two experts may go the other way
        for name, grad in wanted.items():
            scale = max(float(grad.abs().max()), SMALL)
            torch.testing.assert_close(grads[name] / scale, grad / scale, rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize("counts", [[64, 0, 192, 16], [1, 2, 3, 250], [0, 0, 0, 7]])
def test_grouped_products_equal_a_loop(counts: list[int]) -> None:
    """bf16 with fitting strides takes the grouped kernel; empty slots are fine."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((sum(counts), 128), generator=generator).to(CUDA, torch.bfloat16)
    gate_up = (torch.randn((4, 128, 128), generator=generator) / 11).to(CUDA)
    down = (torch.randn((4, 128, 64), generator=generator) / 8).to(CUDA)
    rows = torch.tensor(counts)
    both = []
    for form in (grouped_swiglu, loop_swiglu):
        inputs = [x.clone().requires_grad_(), gate_up.clone().requires_grad_(), down.clone().requires_grad_()]
        weights = inputs[1:] if form is grouped_swiglu else [w.to(torch.bfloat16) for w in inputs[1:]]
        y = form(inputs[0], rows, weights[0], weights[1])
        y.float().square().sum().backward()
        both.append([y, *(t.grad for t in inputs)])
    for fast, slow in zip(*both, strict=True):
        assert fast is not None
        assert slow is not None
        scale = float(slow.abs().max())
        torch.testing.assert_close(fast.float() / scale, slow.float() / scale, rtol=0, atol=2e-2)
