"""Which experts are chosen and with what weight, by loops; the hash table; multi-token prediction by its definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.init import init_param
from elastic_moe.model.params import param_specs
from elastic_moe.model.router import Router, affinity
from elastic_moe.model.transformer import Transformer
from elastic_moe.types import ModelStats


def shape(**fields: Any) -> ModelConfig:
    base = {
        "vocab_size": 50, "hidden_size": 16, "num_layers": 2, "num_experts": 12, "experts_per_token": 3, "head_dim": 8,
        "expert_hidden": 8, "dense_hidden": 16, "init_std": 0.4, "seq_balance_weight": 0.0,
    }  # fmt: skip
    return ModelConfig(**{**base, **fields})


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus", "softmax"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (3, 3)])
def test_choice_by_loops(score: str, normalize: bool, groups: int, kept: int) -> None:
    cfg = shape(
        router_score=score, normalize_gates=normalize, num_groups=groups, groups_per_token=kept, routed_scaling=1.5
    )
    router = Router(cfg, hashed=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        router.bias.copy_(torch.randn(12, generator=generator) * 0.3)
    x = torch.randn((20, 16), generator=generator)
    out = router(x, torch.zeros(20, dtype=torch.int64))
    size = 12 // groups
    for t in range(20):
        scores = affinity(router.weight @ x[t], score)
        biased = (scores + router.bias).tolist()
        best = {g: sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)}
        allowed = sorted(best, key=lambda g: -best[g])[:kept]
        experts = sorted((e for e in range(12) if e // size in allowed), key=lambda e: -biased[e])[:3]
        assert sorted(out.expert_ids_TK[t].tolist()) == sorted(experts)
        gates = dict(zip(out.expert_ids_TK[t].tolist(), out.gates_TK[t].tolist(), strict=True))
        total = float(sum(scores[e] for e in experts)) if normalize else 1.0
        for e in experts:
            assert gates[e] == pytest.approx(1.5 * float(scores[e]) / total, rel=1e-5)


def test_hash_layers_go_by_the_token_alone() -> None:
    cfg = shape(num_hash_layers=1)
    experts = LocalExperts(cfg)
    model = Transformer(cfg, experts)
    model.initialize(0)
    router = model.layers[1].moe.router
    table = router.table.long()
    assert all(len(set(row)) == 3 for row in table.tolist())
    assert int(table.max()) < 12
    assert int(torch.bincount(table.flatten(), minlength=12).min()) > 0
    tokens = torch.tensor([7, 7, 3])
    first = router(torch.randn(3, 16), tokens)
    assert torch.equal(first.expert_ids_TK, table[tokens])
    specs = {spec.name: spec for spec in param_specs(cfg)}
    spec = specs["layers.1.moe.router.table"]
    assert spec.optimizer == "frozen"
    assert torch.equal(init_param(spec, 0), router.table)
    assert "layers.1.moe.router.bias" not in specs
    out = model.loss(torch.tensor([[7, 7, 3]]), torch.tensor([[1, 2, 3]]))
    expected = torch.bincount(table[tokens].flatten(), minlength=12)
    assert torch.equal(out.load_LE[0], expected)


@pytest.mark.parametrize("residual", ["plain", "mhc"])
def test_the_token_after_the_next_by_definition(residual: str) -> None:
    """DeepSeek-V3, equations 21 to 25, one sequence at a time."""
    cfg = shape(mtp_depth=1, residual=residual)
    model = Transformer(cfg, LocalExperts(cfg))
    model.initialize(0)
    mtp = model.mtp
    assert mtp is not None
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 50, (3, 9), generator=generator)
    found: list[torch.Tensor] = []
    hook = model.readout.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    out = model.loss(rows[:, :-1], rows[:, 1:], mtp_weight=0.4)
    hook.remove()
    total, count = torch.zeros(()), 0
    from elastic_moe.model.attention.context import AttentionContext
    from elastic_moe.model.residual.connections import Segments

    for b in range(3):
        hidden = found[0][b : b + 1, :7]
        following = rows[b : b + 1, 1:8]  # the next token of each of the first seven positions
        embedded = mtp.embed_norm(model.embed.weight[following])
        if residual == "mhc":
            embedded = embedded.unsqueeze(2).expand(hidden.shape)
        joined = F.linear(torch.cat((mtp.hidden_norm(hidden), embedded), dim=-1), mtp.proj.weight)
        cpu = torch.device("cpu")
        x = mtp.block(joined, following, AttentionContext(cfg, 7, cpu), Segments(cfg, cpu), model.experts).x
        logits = model.head(mtp.norm(mtp.readout(x)))
        total = total + F.cross_entropy(logits[0], rows[b, 2:], reduction="sum")
        count += 7
    assert float(out.stats[0]) == pytest.approx(float(total), rel=1e-5)
    assert int(out.stats[1]) == count
    expected = float(out.ce_sum) + 0.4 * float(total) / count * out.num_tokens
    assert float(out.loss_sum) == pytest.approx(expected, rel=1e-5)


def test_multi_token_prediction_adds_up_over_micro_batches() -> None:
    """Its gradient does not depend on how a batch is cut; forgetting its scale is a known bug of trainers."""
    cfg = shape(mtp_depth=1)
    experts = LocalExperts(cfg)
    model = Transformer(cfg, experts)
    model.initialize(0)
    rows = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    grads = []
    for size in (4, 2, 1):
        model.zero_grad()
        for part in rows.split(size):
            model.loss(part[:, :-1], part[:, 1:]).loss_sum.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for other in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(grad, other[name], rtol=1e-4, atol=1e-5, msg=name)


def test_multi_token_prediction_leaves_the_main_loss_alone() -> None:
    rows = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    sums = []
    for depth in (0, 1):
        cfg = shape(mtp_depth=depth)
        model = Transformer(cfg, LocalExperts(cfg))
        model.initialize(0)
        out = model.loss(rows[:, :-1], rows[:, 1:])
        sums.append(float(out.ce_sum))
        assert out.load_LE.shape == (1 + depth, 12)
        assert torch.equal(model(rows), model(rows))
        assert model(rows).shape == (2, 9, 50)
    assert sums[0] == sums[1]


@pytest.mark.parametrize(("score", "hashed"), [("sigmoid", False), ("softmax", False), ("sqrtsoftplus", True)])
def test_z_loss_equals_its_formula(score: str, hashed: bool) -> None:
    """Summed over tokens, the square of the logarithm of the sum of the logits' exponentials."""
    cfg = shape(vocab_size=9, num_experts=6, router_score=score, router_z_loss=1.0)
    router = Router(cfg, hashed)
    dice = torch.Generator().manual_seed(3)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=dice))
    x = torch.randn((11, 16), generator=dice).requires_grad_()
    z_sum = router(x, torch.zeros(11, dtype=torch.int64)).z_sum
    z_sum.backward()
    wide, weight = x.detach().double().requires_grad_(), router.weight.detach().double().requires_grad_()
    expected = ((wide @ weight.t()).exp().sum(dim=1).log() ** 2).sum()
    expected.backward()
    assert x.grad is not None
    assert router.weight.grad is not None
    for found, right in ((z_sum, expected), (x.grad, wide.grad), (router.weight.grad, weight.grad)):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)


def test_router_z_loss_counts_every_layer_and_is_a_mean_in_the_statistics() -> None:
    base = shape(vocab_size=30, num_layers=3, mtp_depth=1)
    tokens = torch.randint(0, 30, (2, 8), generator=torch.Generator().manual_seed(0))
    sums = []
    for weight in (0.0, 0.5):
        model = Transformer(replace(base, router_z_loss=weight), LocalExperts(base, seed=1))
        model.initialize(1)
        logits: list[torch.Tensor] = []

        def note(router: Router, args: tuple[torch.Tensor, ...], logits: list[torch.Tensor] = logits) -> None:
            logits.append(args[0].detach().double() @ router.weight.detach().double().t())

        for module in model.modules():
            if isinstance(module, Router):
                module.register_forward_pre_hook(note)
        out = model.loss(tokens, tokens)
        sums.append((out, sum(float((one.logsumexp(dim=1) ** 2).sum()) for one in logits), len(logits)))
    (without, _, _), (with_loss, expected, routers) = sums
    assert routers == 3, "two of the layers, and that of the multi-token prediction"
    assert float(with_loss.loss_sum.detach() - without.loss_sum.detach()) == pytest.approx(0.5 * expected, rel=1e-4)
    assert ModelStats(*with_loss.stats.tolist()).router_z_sum == pytest.approx(expected / 3, rel=1e-5)
    assert ModelStats(*without.stats.tolist()).router_z_sum == 0.0
