"""Residual connections in whole models: initial values, training, recomputation, warming up, gains."""

from __future__ import annotations

import pytest
import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.residual import connections as residual_module
from elastic_moe.model.residual import kernels as kernels_module
from elastic_moe.model.residual import mhc
from elastic_moe.model.residual.connections import ManifoldHyperConnection, Segments, composite_gains, warm_up_kernels
from elastic_moe.model.residual.eager import EagerKernels
from elastic_moe.model.transformer import Transformer

SHAPE = {
    "vocab_size": 50, "hidden_size": 24, "num_layers": 3, "num_experts": 6, "experts_per_token": 2, "expert_hidden": 8,
    "dense_hidden": 16, "head_dim": 8, "init_std": 0.2, "seq_balance_weight": 0.0,
}  # fmt: skip


def test_warming_up_runs_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    plain = EagerKernels()

    def noted(name: str) -> object:
        def run(*args: object) -> object:
            ran.append(name)
            return getattr(plain, name)(*args)

        return run

    fast = {name: noted(name) for name in kernels_module.PASSES}
    form = kernels_module.FallbackKernels("test", fast)  # type: ignore[arg-type]
    monkeypatch.setattr(residual_module, "choose_kernels", lambda *_: form)
    warm_up_kernels(ModelConfig(**SHAPE, residual="mhc"), torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    assert sorted(ran) == sorted(kernels_module.PASSES)
    ran.clear()
    warm_up_kernels(ModelConfig(**SHAPE), torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    assert not ran


def build(**fields: object) -> tuple[Transformer, LocalExperts]:
    cfg = ModelConfig(**{**SHAPE, **fields})  # type: ignore[arg-type]
    experts = LocalExperts(cfg, seed=1)
    model = Transformer(cfg, experts)
    model.initialize(1)
    return model, experts


def text(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("residual", ["hc", "mhc"])
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_begins_as_the_plain_residual(residual: str, attention: str) -> None:
    """At the initial values n streams are the plain net, whichever streams a sub-layer reads."""
    plain, _ = build(attention=attention)
    streams, _ = build(attention=attention, residual=residual)
    torch.testing.assert_close(streams(text()), plain(text()), rtol=1e-4, atol=1e-4)


def test_gradients_at_the_beginning() -> None:
    """All streams are equal, so at first only what writes to them differently learns."""
    model, _ = build(residual="mhc")
    model.loss(text(), text(1)).loss_sum.backward()
    n = 4
    for block in model.layers:
        for mix in (block.attn_mix, block.ffn_mix):
            assert isinstance(mix, ManifoldHyperConnection)
            base, proj = mix.base.grad, mix.proj.grad
            assert base is not None
            assert proj is not None
            scale = float(base[n : 2 * n].abs().max())
            assert scale > 0
            assert float(proj[n : 2 * n].abs().max()) > 0
            assert float(base[2 * n :].abs().max()) < 1e-4 * scale


def train(model: Transformer, experts: LocalExperts, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([*model.parameters(), *experts.parameters()], lr=1e-2)
    losses, tokens = [], text()
    for _ in range(steps):
        out = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        (out.loss_sum / out.num_tokens).backward()
        optimizer.step()
        losses.append(float(out.ce_sum) / out.num_tokens)
    return losses


def spread_of_streams(model: Transformer) -> float:
    """Largest difference between streams after the last layer, relative to their size."""
    found: list[torch.Tensor] = []
    hook = model.readout.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    model(text())
    hook.remove()
    x = found[0]
    return float((x - x.mean(dim=2, keepdim=True)).abs().max() / x.abs().max())


@pytest.mark.parametrize("residual", ["hc", "mhc"])
def test_training_separates_the_streams(residual: str) -> None:
    model, experts = build(residual=residual)
    assert spread_of_streams(model) < 1e-5
    losses = train(model, experts, 12)
    assert losses[-1] < 0.8 * losses[0]
    assert spread_of_streams(model) > 1e-2


def test_zero_initial_values_would_never_separate() -> None:
    """Why the initial values are what they are: all zeros is a point of symmetry."""
    model, experts = build(residual="mhc")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_mix.base"):
                parameter.zero_()
    train(model, experts, 12)
    assert spread_of_streams(model) < 1e-4


@pytest.mark.parametrize("segment", [2, 3, 5, -1])
def test_recomputation_changes_nothing(segment: int) -> None:
    results = []
    for setting in (0, segment):
        model, experts = build(residual="mhc", stream_segment=setting)
        train(model, experts, 2)
        model.zero_grad()
        model.loss(text(), text(1)).loss_sum.backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in results[0].items():
        torch.testing.assert_close(grad, results[1][name], rtol=1e-5, atol=1e-6, msg=name)


def test_recomputation_keeps_fewer_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    real = mhc.Segment.enter

    def enter(self: mhc.Segment, x: torch.Tensor) -> int:
        index = real(self, x)
        kept.append(int(index == 0))
        return index

    monkeypatch.setattr(mhc.Segment, "enter", enter)
    counts = []
    for setting in (0, 3):
        model, _ = build(residual="mhc", stream_segment=setting)
        kept.clear()
        model.loss(text(), text(1)).loss_sum.backward()
        counts.append(sum(kept))
    assert counts == [6, 2]
    assert mhc.best_segment(60, 4) == 6  # the paper: sqrt(n L / (n + 2)) = 6.3
    cfg = ModelConfig(**SHAPE, residual="mhc", stream_segment=-1)  # type: ignore[arg-type]
    assert Segments(cfg, torch.device("cpu"))._length == 2


def test_hc_coefficients_see_their_own_stream_alone() -> None:
    model, experts = build(residual="hc")
    train(model, experts, 4)
    mix = model.layers[1].attn_mix
    x = torch.randn((1, 1, 4, 24), generator=torch.Generator().manual_seed(3))
    other = x.clone()
    other[:, :, 2] += 1.0
    cfg = ModelConfig(**SHAPE, residual="hc")  # type: ignore[arg-type]
    with torch.no_grad():
        maps = [mix.residual_map(mix.read(t, Segments(cfg, torch.device("cpu")))[2])[0, 0] for t in (x, other)]
    changed = (maps[0] - maps[1]).abs().amax(dim=0)  # by column, the stream that is read
    assert changed[2] > 1e-6
    assert changed[[0, 1, 3]].max() == 0


def test_gains_by_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn((3, 4, 4), generator=generator) for _ in range(5)]
    rows, columns, least = [], [], []
    for s in range(3):
        product = torch.eye(4)
        for matrix in maps:
            product = matrix[s] @ product
        rows.append(max(float(row.abs().sum()) for row in product))
        columns.append(max(float(column.abs().sum()) for column in product.t()))
        least.append(min(float(column.abs().sum()) for column in product.t()))
    expected = [sum(values) / 3 for values in (rows, columns, least)]
    assert composite_gains(maps).tolist() == pytest.approx(expected, rel=1e-5)


def test_gains_are_watched_on_the_first_sequence_only() -> None:
    model, experts = build(residual="mhc")
    train(model, experts, 3)
    both, first = model.loss(text(), text(1), gains=True), model.loss(text()[:1], text(1)[:1], gains=True)
    torch.testing.assert_close(both.stats[-3:], first.stats[-3:], rtol=1e-5, atol=1e-6)
    assert float(both.stats[-3]) == pytest.approx(1.0, abs=1e-5)
    assert not model.loss(text(), text(1)).stats[-3:].any()
