"""Hyper-connections: Sinkhorn, the four passes against an obvious twin, recomputation, initial values, gains."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.residual import connections as residual_module
from elastic_moe.model.residual import kernels as kernels_module
from elastic_moe.model.residual import mhc
from elastic_moe.model.residual.blocked import BlockedKernels
from elastic_moe.model.residual.connections import ManifoldHyperConnection, Segments, composite_gains, warm_up_kernels
from elastic_moe.model.residual.eager import EagerKernels, FusableKernels, MixSettings
from elastic_moe.model.residual.sinkhorn import sinkhorn
from elastic_moe.model.transformer import Transformer

SHAPE = {
    "vocab_size": 50, "hidden_size": 24, "num_layers": 3, "num_experts": 6, "experts_per_token": 2, "expert_hidden": 8,
    "dense_hidden": 16, "head_dim": 8, "init_std": 0.2, "seq_balance_weight": 0.0,
}  # fmt: skip


def unrolled(z: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    """Slow twin: the paper's iterations from exp, with transformers' eps."""
    matrix = z.exp() / z.exp().sum(dim=-2, keepdim=True) + eps
    matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + eps)
    for _ in range(iters - 1):
        matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + eps)
    return matrix


@pytest.mark.parametrize("iters", [1, 2, 20])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_sinkhorn_and_its_gradient(iters: int, eps: float) -> None:
    generator = torch.Generator().manual_seed(iters)
    z = torch.randn((3, 4, 4), generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn((3, 4, 4), generator=generator, dtype=torch.float64)
    fast, slow = sinkhorn(z, iters, eps), unrolled(z, iters, eps)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    (ours,) = torch.autograd.grad((fast * weights).sum(), z)
    (theirs,) = torch.autograd.grad((slow * weights).sum(), z)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert torch.autograd.gradcheck(lambda t: sinkhorn(t, iters, eps), z)
    if not eps:
        torch.testing.assert_close(fast.sum(dim=-1), torch.ones(3, 4, dtype=torch.float64))


def test_sinkhorn_saves_its_input_alone() -> None:
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        sinkhorn(torch.randn(5, 4, 4, requires_grad=True), 20)
    assert [t.shape for t in saved] == [(5, 4, 4)]


def test_sinkhorn_does_not_overflow() -> None:
    assert torch.isfinite(sinkhorn(torch.eye(4) * 200 - 100, 20)).all()


def reference(x: torch.Tensor, weights: mhc.Weights, settings: MixSettings, f: torch.nn.Module) -> torch.Tensor:
    """Slow twin of a whole sub-layer, for autograd: equations 7 to 9 as they stand, one stream at a time."""
    n = settings.streams
    flat = x.flatten(1).float()
    normed = flat / (flat.square().mean(dim=1, keepdim=True) + settings.norm_eps).sqrt()
    z = normed @ weights.proj.t()
    pre = torch.sigmoid(weights.alphas[0] * z[:, :n] + weights.base[:n]) + settings.eps
    post = 2 * torch.sigmoid(weights.alphas[1] * z[:, n : 2 * n] + weights.base[n : 2 * n])
    res = unrolled(
        (weights.alphas[2] * z[:, 2 * n :] + weights.base[2 * n :]).view(-1, n, n), settings.iters, settings.eps
    )
    y = f(sum(pre[:, i, None] * x[:, i] for i in range(n)))
    return torch.stack(
        [sum(res[:, i, j, None] * x[:, j] for j in range(n)) + post[:, i, None] * y for i in range(n)], dim=1
    )


def example(n: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, mhc.Weights, MixSettings]:
    generator = torch.Generator().manual_seed(n)
    k = 2 * n + n * n
    weights = mhc.Weights(
        *(
            torch.randn(shape, generator=generator).mul_(0.5).to(dtype).requires_grad_()
            for shape in ((k, n * width), (k,), (3,))
        )
    )
    x = torch.randn((7, n, width), generator=generator).to(dtype).requires_grad_()
    return x, weights, MixSettings(n, 5, 1e-4, 1e-6)


FORMS = [EagerKernels(), FusableKernels(), BlockedKernels()]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
@pytest.mark.parametrize(("n", "width"), [(1, 6), (2, 5), (4, 8)])
def test_passes_equal_the_twin(form: EagerKernels, n: int, width: int) -> None:
    """Two sub-layers in one segment, so that the second one's streams are made again; values and every gradient."""
    x, weights, settings = example(n, width, torch.float32)
    f = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh())
    out_grad = torch.randn((7, n, width), generator=torch.Generator().manual_seed(9))
    inputs = [x, *weights, *f.parameters()]

    def fast() -> torch.Tensor:
        segment, streams = mhc.Segment(form, 2), x
        for _ in range(2):
            streams, h, link = mhc.read(streams, weights, settings, segment)
            streams = mhc.write(streams, f(h), link)
        return streams

    ours, theirs = fast(), reference(reference(x, weights, settings, f), weights, settings, f)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, out_grad), torch.autograd.grad(theirs, inputs, out_grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_equals_eager() -> None:
    compiled, eager = kernels_module.choose_kernels("compile", torch.device("cpu")), EagerKernels()
    x, weights, settings = example(4, 16, torch.float32)
    out_grad = torch.randn((7, 4, 16), generator=torch.Generator().manual_seed(9))
    results = []
    for form in (compiled, eager):
        streams, h, link = mhc.read(x, weights, settings, mhc.Segment(form, 1))
        out = mhc.write(streams, h.tanh(), link)
        results.append([out, *torch.autograd.grad(out, [x, *weights], out_grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_compiler_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        def fail(*_: object) -> object:
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    form = kernels_module.compiled_kernels.__wrapped__()
    x, weights, settings = example(2, 4, torch.float32)
    with pytest.warns(UserWarning, match="no compiler here"):
        out = form.read(x, *weights, settings)
    torch.testing.assert_close(out, EagerKernels().read(x, *weights, settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        form.write(x, x[:, 0], out[1], out[2])


def test_warming_up_runs_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    plain = EagerKernels()

    def noted(name: str) -> object:
        def run(*args: object) -> object:
            ran.append(name)
            return getattr(plain, name)(*args)

        return run

    form = kernels_module.FallbackKernels("test", {name: noted(name) for name in kernels_module.PASSES})  # type: ignore[misc]
    monkeypatch.setattr(residual_module, "choose_kernels", lambda *_: form)
    warm_up_kernels(ModelConfig(**SHAPE, residual="mhc"), torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    assert sorted(ran) == sorted(kernels_module.PASSES)
    ran.clear()
    warm_up_kernels(ModelConfig(**SHAPE), torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    assert not ran


def test_streams_keep_their_dtype_and_coefficients_are_fp32() -> None:
    x, weights, settings = example(4, 8, torch.float32)
    form = EagerKernels()
    streams, h, link = mhc.read(x.detach().bfloat16().requires_grad_(), weights, settings, mhc.Segment(form, 1))
    out = mhc.write(streams, h, link)
    assert (streams.dtype, h.dtype, out.dtype) == (torch.bfloat16,) * 3
    assert link.res.dtype == link.post.dtype == torch.float32
    out.float().sum().backward()
    assert weights.proj.grad is not None and weights.proj.grad.dtype == torch.float32


def test_direction_of_the_residual_matrix() -> None:
    """Element [i, j] leads from stream j to stream i: a cyclic shift moves stream 0 to stream 1."""
    form, n = EagerKernels(), 3
    shift = torch.zeros(1, n, n)
    for j in range(n):
        shift[0, (j + 1) % n, j] = 1.0
    x = torch.arange(n).float().view(1, n, 1)
    assert form.write(x, torch.zeros(1, 1), torch.zeros(1, n), shift).flatten().tolist() == [2.0, 0.0, 1.0]


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
            assert base is not None and proj is not None
            scale = float(base[n : 2 * n].abs().max())
            assert scale > 0 and float(proj[n : 2 * n].abs().max()) > 0
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


@pytest.mark.parametrize("recompute", [2, 3, 5, -1])
def test_recomputation_changes_nothing(recompute: int) -> None:
    results = []
    for setting in (0, recompute):
        model, experts = build(residual="mhc", recompute=setting)
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
        model, _ = build(residual="mhc", recompute=setting)
        kept.clear()
        model.loss(text(), text(1)).loss_sum.backward()
        counts.append(sum(kept))
    assert counts == [6, 2]
    assert mhc.best_segment(60, 4) == 6  # the paper: sqrt(n L / (n + 2)) = 6.3
    assert Segments(ModelConfig(**SHAPE, residual="mhc", recompute=-1), torch.device("cpu"))._length == 2  # type: ignore[arg-type]


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
    assert changed[2] > 1e-6 and changed[[0, 1, 3]].max() == 0


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


@pytest.mark.parametrize(("iters", "std", "low", "high"), [
    (1, 1.0, 0.40, 1.70), (3, 1.0, 0.90, 1.08), (20, 1.0, 0.999, 1.001), (20, 4.0, 0.90, 1.10), (5, 4.0, 0.40, 1.60),
])  # fmt: skip
def test_gains_stay_within_their_bounds(iters: int, std: float, low: float, high: float) -> None:
    """Products of 60 maps of random logits: rows sum to one exactly, columns as closely as the iterations allow."""
    z = torch.randn((60, 64, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * std
    maps = sinkhorn(z, iters)
    product = torch.eye(4, dtype=torch.float64).expand(64, 4, 4)
    for matrix in maps:
        product = matrix @ product
    torch.testing.assert_close(product.sum(dim=2), torch.ones(64, 4, dtype=torch.float64))
    assert low < float(product.sum(dim=1).min()) and float(product.sum(dim=1).max()) < high


def test_gains_are_watched_on_the_first_sequence_only() -> None:
    model, experts = build(residual="mhc")
    train(model, experts, 3)
    both, first = model.loss(text(), text(1), gains=True), model.loss(text()[:1], text(1)[:1], gains=True)
    torch.testing.assert_close(both.stats[3:], first.stats[3:], rtol=1e-5, atol=1e-6)
    assert float(both.stats[3]) == pytest.approx(1.0, abs=1e-5)
    assert not model.loss(text(), text(1)).stats[3:].any()
