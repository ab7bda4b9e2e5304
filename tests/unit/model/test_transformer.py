"""Properties of the whole model: causality, additivity over micro-batches, empty micro-batches, learning."""

from __future__ import annotations

import pytest
import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.moe import MoE, sequence_balance
from elastic_moe.model.transformer import Transformer

SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "dense_hidden": 48, "num_experts": 6, "experts_per_token": 2, "expert_hidden": 16,
}  # fmt: skip
CFG = ModelConfig(**SHAPE)


def build(cfg: ModelConfig = CFG) -> tuple[Transformer, LocalExperts]:
    experts = LocalExperts(cfg, seed=1)
    model = Transformer(cfg, experts)
    model.initialize(1)
    return model, experts


def text(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, CFG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: Transformer, experts: LocalExperts) -> list[torch.Tensor]:
    found = [p.grad for p in (*model.parameters(), *experts.parameters())]
    return [grad.clone() for grad in found if grad is not None]


def test_backend_is_not_part_of_the_module_tree() -> None:
    model, experts = build()
    assert model.experts is experts
    assert not any("experts" in name for name in model.state_dict())
    other = LocalExperts(CFG, seed=2)
    model.experts = other
    assert model.experts is other
    assert all(child is not other for child in model.modules())


def test_logits_do_not_see_the_future() -> None:
    model, _ = build()
    tokens = text(2, 12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % CFG.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-6, atol=1e-7)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-7


def test_sums_add_up_over_micro_batches() -> None:
    tokens, targets = text(5, 9), text(5, 9, seed=1)
    model, experts = build()
    whole = model.loss(tokens, targets)
    whole.loss_sum.backward()
    expected = gradients(model, experts)
    model.zero_grad()
    experts.zero_grad()
    parts = [model.loss(tokens[cut], targets[cut]) for cut in (slice(0, 1), slice(1, 5), slice(5, 5))]
    for part in parts:
        part.loss_sum.backward()
    assert whole.num_tokens == sum(part.num_tokens for part in parts) == 45
    torch.testing.assert_close(sum(part.loss_sum for part in parts), whole.loss_sum, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(sum(part.ce_sum for part in parts), whole.ce_sum, rtol=1e-6, atol=0.0)
    assert torch.equal(torch.stack([part.load_LE for part in parts]).sum(dim=0), whole.load_LE)
    assert whole.load_LE.dtype == torch.int64
    assert whole.load_LE.sum(dim=1).tolist() == [90, 90]
    for a, b in zip(gradients(model, experts), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class _Counted(torch.autograd.Function):
    """Identity that logs (direction, layer), as a collective would."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, log: list[tuple[str, int]], layer: int) -> torch.Tensor:
        ctx.log, ctx.layer = log, layer
        log.append(("forward", layer))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        ctx.log.append(("backward", ctx.layer))
        return grad, None, None


class _Logging:
    """Backend that logs its calls both ways."""

    def __init__(self, inner: LocalExperts) -> None:
        self.inner, self.log = inner, []

    def __call__(
        self,
        moe_layer: int,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        gates_TK: torch.Tensor,
        again: bool = False,
    ) -> torch.Tensor:
        x_TD = _Counted.apply(x_TD, self.log, moe_layer)
        return self.inner(moe_layer, x_TD, expert_ids_TK, gates_TK)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("autocast", [False, True])
def test_empty_batch_calls_every_backend_both_ways(batch: int, autocast: bool) -> None:
    model, experts = build()
    backend = _Logging(experts)
    model.experts = backend
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model.loss(text(batch, 8), text(batch, 8))
    out.loss_sum.backward()
    assert backend.log == [("forward", 0), ("forward", 1), ("backward", 1), ("backward", 0)]
    assert out.num_tokens == 8 * batch
    assert out.load_LE.shape == (2, CFG.num_experts)
    if batch == 0:
        assert float(out.loss_sum.detach()) == 0.0
        assert int(out.load_LE.sum()) == 0
        assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    assert model(text(batch, 1)).shape == (batch, 1, CFG.vocab_size)


def test_every_parameter_gets_a_gradient() -> None:
    model, experts = build()
    model.loss(text(8, 16), text(8, 16, seed=1)).loss_sum.backward()
    for name, parameter in (*model.named_parameters(), *experts.named_parameters()):
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


def test_balance_loss_by_definition() -> None:
    """Equations 17 to 20 of DeepSeek-V3, written out in loops."""
    scores = torch.rand((2, 5, 4), generator=torch.Generator().manual_seed(0))
    ids = scores.topk(2, dim=-1).indices
    expected = 0.0
    for b in range(2):
        for i in range(4):
            f = 4 / (2 * 5) * sum(int(i in ids[b, t].tolist()) for t in range(5))
            p = sum(float(scores[b, t, i] / scores[b, t].sum()) for t in range(5)) / 5
            expected += f * p
    assert float(sequence_balance(scores, 2)) == pytest.approx(expected, rel=1e-6)
    rotating = torch.eye(4).add(torch.eye(4).roll(1, dims=1)).add(0.1).expand(3, 4, 4)  # each expert equally often
    assert float(sequence_balance(rotating, 2)) == pytest.approx(3.0)
    collapsed = torch.tensor([0.9, 0.9, 0.0, 0.0]).expand(3, 4, 4)
    assert float(sequence_balance(collapsed, 2)) == pytest.approx(6.0)


def test_balance_weight_enters_per_token() -> None:
    tokens, targets = text(3, 10), text(3, 10, seed=1)
    model, _ = build(ModelConfig(**SHAPE, seq_balance_weight=0.0))
    heavy, _ = build(ModelConfig(**SHAPE, seq_balance_weight=0.01))
    plain, weighted = model.loss(tokens, targets), heavy.loss(tokens, targets)
    assert torch.equal(plain.loss_sum, plain.ce_sum)
    assert torch.equal(plain.ce_sum, weighted.ce_sum)
    extra = float((weighted.loss_sum - weighted.ce_sum).detach())
    assert 0.9 * 0.01 * 10 * 3 * 2 < extra < 3 * 0.01 * 10 * 3 * 2  # about 1 per sequence and layer


def test_bias_steers_choice_but_not_weight() -> None:
    moe = MoE(CFG, 0)
    x = torch.randn((20, 32), generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(moe.router.weight, generator=torch.Generator().manual_seed(1))
    moe.router.bias[3] = 10.0
    ids, gates, scores, _ = moe.router(x, torch.zeros(20, dtype=torch.int64))
    assert bool((ids == 3).any(dim=1).all())
    chosen = scores.gather(1, ids)
    torch.testing.assert_close(gates, chosen / chosen.sum(dim=1, keepdim=True))


def test_model_learns() -> None:
    model, experts = build()
    tokens = text(4, 17)
    optimizer = torch.optim.AdamW([*model.parameters(), *experts.parameters()], lr=1e-2)
    losses = []
    for _ in range(25):
        out = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        (out.loss_sum / out.num_tokens).backward()
        optimizer.step()
        losses.append(float(out.ce_sum) / out.num_tokens)
    assert losses[0] == pytest.approx(3.91, abs=0.1)  # ln 50
    assert losses[-1] < 0.5 * losses[0]
