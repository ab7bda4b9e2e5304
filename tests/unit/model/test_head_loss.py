"""The loss of the head's logits: chunks beside the plain form, and the z-loss beside its formula."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.head_loss import FEWEST_ROWS, HeadLoss, chunk_rows, head_loss
from elastic_moe.model.transformer import Transformer

N, V, D = 700, 1000, 24
SMALL = 4.0 * V * 300  # bytes: chunks of 300, 300 and 100 rows


def operands(num: int = N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn((num, D), generator=dice), torch.randn((V, D), generator=dice)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (num,), generator=dice)


def both_ways(
    max_bytes: float, z_weight: float, scale: float = 1.0, num: int = N
) -> tuple[HeadLoss, list[torch.Tensor]]:
    hidden, weight, targets = operands(num)
    out = head_loss(hidden, weight, targets, z_weight, max_bytes)
    (scale * out.total).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return out, [hidden.grad, weight.grad]


def by_formula(z_weight: float, scale: float = 1.0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(total, cross-entropy, sum of log Z squared) and gradients, in fp64 by autograd."""
    hidden, weight, targets = operands()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logits = wide[0] @ wide[1].t()
    log_z = logits.exp().sum(dim=1).log()
    ce_sum, z_sum = (log_z - logits[torch.arange(N), targets]).sum(), (log_z**2).sum()
    total = ce_sum + z_weight * z_sum
    (scale * total).backward()
    return [total.detach(), ce_sum.detach(), z_sum.detach()], [t.grad for t in wide if t.grad is not None]


@pytest.mark.parametrize("max_bytes", [0.0, SMALL, 1.0], ids=["whole", "chunks", "fewest rows"])
@pytest.mark.parametrize(("z_weight", "scale"), [(0.0, 1.0), (0.01, 1.0), (0.01, 0.37)])
def test_equals_the_formula(max_bytes: float, z_weight: float, scale: float) -> None:
    out, grads = both_ways(max_bytes, z_weight, scale)
    (total, ce_sum, z_sum), expected = by_formula(z_weight, scale)
    torch.testing.assert_close(out.total.detach().double(), total, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(out.ce_sum.double(), ce_sum, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(out.z_sum.double(), z_sum if z_weight else torch.zeros_like(z_sum), rtol=1e-6, atol=0.0)
    assert not out.ce_sum.requires_grad
    assert not out.z_sum.requires_grad
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


def test_chunks_are_used_where_the_logits_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    widest: list[int] = []
    real = torch.mm

    def mm(a: torch.Tensor, b: torch.Tensor, **keys: torch.Tensor) -> torch.Tensor:
        out = real(a, b, **keys)
        widest.append(out.numel())
        return out

    monkeypatch.setattr(torch, "mm", mm)
    both_ways(SMALL, 0.0)
    assert max(widest) == 300 * V
    widest.clear()
    both_ways(4.0 * V * N, 0.0)
    assert not widest, "all logits fit: the plain form"
    assert chunk_rows(1.0, V, "cpu") == FEWEST_ROWS["cpu"]
    assert chunk_rows(0.0, V, "cpu") == 0


def test_the_same_bits_again_and_without_gradients() -> None:
    first, grads = both_ways(SMALL, 0.01)
    again, same = both_ways(SMALL, 0.01)
    assert torch.equal(first.total, again.total)
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    hidden, weight, targets = operands()
    with torch.no_grad():
        assert torch.equal(head_loss(hidden, weight, targets, 0.01, SMALL).total, first.total)


@pytest.mark.parametrize("max_bytes", [0.0, SMALL])
def test_no_targets(max_bytes: float) -> None:
    out, grads = both_ways(max_bytes, 0.01, num=0)
    assert float(out.total.detach()) == float(out.z_sum) == 0.0
    assert grads[0].shape == (0, D)
    assert not grads[1].any()


@pytest.mark.parametrize("max_bytes", [0.0, SMALL])
def test_bf16_products(max_bytes: float) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = both_ways(max_bytes, 0.01)
    (total, _, _), expected = by_formula(0.01)
    assert float(out.total.detach()) == pytest.approx(float(total), rel=1e-2)
    for grad, reference in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32
        assert float((grad - reference).norm() / reference.norm()) < 2e-2


@pytest.mark.parametrize("mtp_depth", [0, 1])
def test_a_model_with_chunks_has_the_plain_gradients(mtp_depth: int) -> None:
    tokens = torch.randint(0, V, (8, 80), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, dims=1)
    found = []
    for gib in (0.0, SMALL / 2**30):
        cfg = ModelConfig(
            vocab_size=V, hidden_size=16, num_layers=2, num_experts=4, experts_per_token=2, expert_hidden=8,
            dense_hidden=16, num_heads=2, num_kv_heads=1, head_dim=8, mtp_depth=mtp_depth, z_loss=0.01, logits_gib=gib,
        )  # fmt: skip
        model = Transformer(cfg, LocalExperts(cfg, seed=1))
        model.initialize(1)
        out = model.loss(tokens, targets)
        out.loss_sum.backward()
        found.append((out, {name: p.grad for name, p in model.named_parameters()}))
    (plain, expected), (chunked, grads) = found
    torch.testing.assert_close(chunked.loss_sum, plain.loss_sum, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(chunked.stats, plain.stats, rtol=1e-6, atol=0.0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


PEAK = """
import sys, torch
def peak():  # KiB; ru_maxrss would begin with the parent's
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
from elastic_moe.model.head_loss import head_loss
hidden = torch.randn(1024, 32, requires_grad=True)
weight = torch.randn(32768, 32, requires_grad=True)
targets = torch.randint(0, 32768, (1024,))
small = head_loss(hidden[:300], weight, targets[:300], 0.0, 2.0**23)
small.total.backward()  # what the libraries need
before = peak()
head_loss(hidden, weight, targets, 0.0, float(sys.argv[1])).total.backward()
print(peak() - before)
"""


def test_peak_memory_in_a_process_of_its_own() -> None:
    """Logits of 128 MiB: the plain form needs about three times as much, chunks of 32 MiB less than one of them."""
    peaks = {}
    for name, max_bytes in (("whole", 0.0), ("chunks", 2.0**23)):
        run = subprocess.run([sys.executable, "-c", PEAK, str(max_bytes)], capture_output=True, text=True, check=True)
        peaks[name] = int(run.stdout) / 1024
    assert peaks["whole"] > 250, peaks
    assert peaks["chunks"] < 96, peaks
