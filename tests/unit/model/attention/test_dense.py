"""GQA and MLA against slow twins, one query at a time: values and gradients, documents, windows of the cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.attention.context import AttentionContext, KVCache
from elastic_moe.model.attention.dense import GroupedQueryAttention, LatentAttention, attend
from elastic_moe.model.attention.rope import rotate

CPU = torch.device("cpu")
BATCH, LENGTH, WIDTH = 2, 7, 20
SHAPE: dict[str, Any] = {"hidden_size": WIDTH, "num_layers": 2, "num_heads": 4, "head_dim": 6, "norm_eps": 1e-5}
GQA: dict[str, dict[str, Any]] = {
    "shared": {"num_kv_heads": 2, "qk_norm": True},
    "one key per head": {"num_kv_heads": 4, "qk_norm": False, "attention_bias": True},
    "multi-query": {"num_kv_heads": 1, "qk_norm": False},
}
MLA: dict[str, dict[str, Any]] = {
    "query latent": {"query_latent": 10, "kv_latent": 8, "rope_dim": 4, "value_dim": 5},
    "no query latent": {"kv_latent": 8, "rope_dim": 4, "value_dim": 6, "rope_interleave": False},
    "YaRN": {
        "kv_latent": 8, "rope_dim": 4, "value_dim": 5, "attention_bias": True, "rope_factor": 4.0,
        "rope_original_len": 8,
        "rope_mscale": 1.0, "rope_mscale_all_dim": 0.7,
    },
}  # fmt: skip
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])


def randomized(layer: torch.nn.Module) -> Any:
    """The layer with every parameter random, gains near 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.4
            parameter.copy_(1 + 0.3 * noise if "norm" in name else noise)
    return layer


def gqa(**fields: Any) -> tuple[ModelConfig, GroupedQueryAttention]:
    cfg = ModelConfig(**{**SHAPE, **fields, "attention": "gqa"})
    return cfg, randomized(GroupedQueryAttention(cfg, 0))


def mla(**fields: Any) -> tuple[ModelConfig, LatentAttention]:
    cfg = ModelConfig(**{**SHAPE, **fields, "attention": "mla"})
    return cfg, randomized(LatentAttention(cfg, 0))


def hidden(seed: int = 1) -> torch.Tensor:
    return torch.randn((BATCH, LENGTH, WIDTH), generator=torch.Generator().manual_seed(seed), requires_grad=True)


def sees(query: int, key: int, documents_S: torch.Tensor | None) -> bool:
    return key <= query and (documents_S is None or bool(documents_S[query] == documents_S[key]))


def softmax_sum(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], scale: float) -> torch.Tensor:
    """One query's output over the keys it sees."""
    scores = torch.stack([(q @ key) * scale for key in keys])
    weights = (scores - scores.max()).exp()
    weights = weights / weights.sum()
    return torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(dim=0)


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def turned(x_d: torch.Tensor, position: int, theta: float, interleave: bool) -> torch.Tensor:
    """RoPE of one vector at one position, pair by pair, as a product of complex numbers."""
    width = len(x_d)
    out = [torch.zeros(())] * width
    for i in range(width // 2):
        a, b = (2 * i, 2 * i + 1) if interleave else (i, i + width // 2)
        angle = position * theta ** (-2 * i / width)
        out[a] = x_d[a] * math.cos(angle) - x_d[b] * math.sin(angle)
        out[b] = x_d[b] * math.cos(angle) + x_d[a] * math.sin(angle)
    return torch.stack(out)


def slow_gqa(
    cfg: ModelConfig, layer: GroupedQueryAttention, x_BSD: torch.Tensor, documents_BS: torch.Tensor | None
) -> torch.Tensor:
    """By definition: head h uses the keys and values of group h // (H / G)."""
    heads, groups, width = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

    def normed(v: torch.Tensor, norm: Any) -> torch.Tensor:
        return rms(v, norm.weight, cfg.norm_eps) if cfg.qk_norm else v

    rows = []
    for b in range(x_BSD.shape[0]):
        q_SHd = layer.q(x_BSD[b]).view(-1, heads, width)
        k_SGd, v_SGd = (p(x_BSD[b]).view(-1, groups, width) for p in (layer.k, layer.v))
        for s in range(x_BSD.shape[1]):
            seen = [t for t in range(s + 1) if sees(s, t, None if documents_BS is None else documents_BS[b])]
            outs = []
            for h in range(heads):
                g = h // (heads // groups)
                q = turned(normed(q_SHd[s, h], layer.q_norm), s, cfg.rope_theta, interleave=False)
                keys = [turned(normed(k_SGd[t, g], layer.k_norm), t, cfg.rope_theta, interleave=False) for t in seen]
                outs.append(softmax_sum(q, keys, [v_SGd[t, g] for t in seen], width**-0.5))
            rows.append(layer.o(torch.cat(outs)))
    return torch.stack(rows).view(x_BSD.shape)


def slow_mla(
    cfg: ModelConfig, layer: LatentAttention, x_BSD: torch.Tensor, documents_BS: torch.Tensor | None
) -> torch.Tensor:
    """Equations 1 to 11 of DeepSeek-V3 for one head and query at a time. Rotation by `rotate` where YaRN scales."""
    nope, value = cfg.head_dim, cfg.value_dim
    tables = AttentionContext(cfg, x_BSD.shape[1], CPU).rope(cfg.rope_dim, cfg.rope_theta, yarn=True)

    def turn(x_r: torch.Tensor, position: int) -> torch.Tensor:
        if cfg.rope_factor <= 1:
            return turned(x_r, position, cfg.rope_theta, cfg.rope_interleave)
        cos, sin = (t[position : position + 1] for t in tables)
        return rotate(x_r[None], (cos, sin), cfg.rope_interleave)[0]

    scale = (nope + cfg.rope_dim) ** -0.5
    if cfg.rope_factor > 1:
        scale *= (0.1 * cfg.rope_mscale_all_dim * math.log(cfg.rope_factor) + 1) ** 2
    rows = []
    for b in range(x_BSD.shape[0]):
        if cfg.query_latent:
            query = torch.stack([layer.q_up(rms(c, layer.q_norm.weight, 1e-6)) for c in layer.q_down(x_BSD[b])])
        else:
            query = layer.q(x_BSD[b])
        q_SHd = query.view(-1, cfg.num_heads, nope + cfg.rope_dim)
        down = layer.kv_down(x_BSD[b])
        latents = [rms(c, layer.kv_norm.weight, 1e-6) for c in down[:, : cfg.kv_latent]]
        kv_SHd = torch.stack([layer.kv_up(c) for c in latents]).view(-1, cfg.num_heads, nope + value)
        for s in range(x_BSD.shape[1]):
            seen = [t for t in range(s + 1) if sees(s, t, None if documents_BS is None else documents_BS[b])]
            outs = []
            for h in range(cfg.num_heads):
                q = torch.cat((q_SHd[s, h, :nope], turn(q_SHd[s, h, nope:], s)))
                keys = [torch.cat((kv_SHd[t, h, :nope], turn(down[t, cfg.kv_latent :], t))) for t in seen]
                outs.append(softmax_sum(q, keys, [kv_SHd[t, h, nope:] for t in seen], scale))
            rows.append(layer.o(torch.cat(outs)))
    return torch.stack(rows).view(x_BSD.shape)


CASES = [*(("gqa", name) for name in GQA), *(("mla", name) for name in MLA)]


@pytest.mark.parametrize("documents_BS", [None, DOCUMENTS], ids=["whole rows", "documents"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_equals_the_twin(kind: str, name: str, documents_BS: torch.Tensor | None) -> None:
    """Values, and the gradients of the input and of every parameter."""
    x_BSD = hidden()
    out_grad = torch.randn(x_BSD.shape, generator=torch.Generator().manual_seed(2))
    if kind == "gqa":
        cfg, layer = gqa(**GQA[name])
        slow = slow_gqa(cfg, layer, x_BSD, documents_BS)
    else:
        cfg, layer = mla(**MLA[name])
        slow = slow_mla(cfg, layer, x_BSD, documents_BS)
    fast, loss = layer(x_BSD, AttentionContext(cfg, LENGTH, CPU, documents_BS))
    assert loss is None
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    inputs = [x_BSD, *layer.parameters()]
    grads = [torch.autograd.grad(y, inputs, out_grad) for y in (fast, slow)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cuts", [[1] * 7, [3, 4], [5, 1, 1], [7]], ids=str)
@pytest.mark.parametrize(("kind", "name"), CASES)
@torch.no_grad()
def test_a_cache_gives_the_same_outputs(kind: str, name: str, cuts: list[int]) -> None:
    """Also for MLA's absorbed form, which never forms a key."""
    cfg, layer = gqa(**GQA[name]) if kind == "gqa" else mla(**MLA[name])
    x_BSD, cache = hidden(), KVCache(1)
    whole, _ = layer(x_BSD, AttentionContext(cfg, LENGTH, CPU))
    outputs = []
    for x in x_BSD.split(cuts, dim=1):
        outputs.append(layer(x, AttentionContext(cfg, x.shape[1], CPU, cache=cache))[0])
        cache.length += x.shape[1]
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-4, atol=1e-5)
    per_token = cfg.kv_latent + cfg.rope_dim if kind == "mla" else 2 * cfg.num_kv_heads * cfg.head_dim
    assert cache.layers[0].num_elements == BATCH * LENGTH * per_token


@pytest.mark.parametrize("value_width", [3, 8])
def test_values_may_be_narrower_than_keys(value_width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn((1, heads, 5, 8), generator=generator) for heads in (4, 2))
    v = torch.randn((1, 2, 5, value_width), generator=generator)
    out = attend(q, k, v, None, 0.3)
    assert out.shape == (1, 4, 5, value_width)
    for h in range(4):
        for s in range(5):
            keys, values = list(k[0, h // 2, : s + 1]), list(v[0, h // 2, : s + 1])
            torch.testing.assert_close(out[0, h, s], softmax_sum(q[0, h, s], keys, values, 0.3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("documents_BS", [None, DOCUMENTS], ids=["whole rows", "documents"])
@pytest.mark.parametrize("window", [0, 1, 3, LENGTH])
def test_masks_by_definition(window: int, documents_BS: torch.Tensor | None) -> None:
    cfg = ModelConfig(**SHAPE)
    mask = AttentionContext(cfg, LENGTH, CPU, documents_BS).mask(window)
    if documents_BS is None and window in (0, LENGTH):
        assert mask is None, "plain causality needs no mask"
        return
    assert mask is not None
    for b in range(mask.shape[0]):
        row = None if documents_BS is None else documents_BS[b]
        for s in range(LENGTH):
            for t in range(LENGTH):
                expected = sees(s, t, row) and (not window or t > s - window)
                assert bool(mask[b, 0, s, t]) == expected, (b, s, t)


@pytest.mark.parametrize("window", [0, 2])
def test_masks_behind_a_cache(window: int) -> None:
    """The queries of a later call follow the positions in the cache."""
    cache = KVCache(1)
    cache.length = 4
    context = AttentionContext(ModelConfig(**SHAPE), 3, CPU, cache=cache)
    assert context.positions.tolist() == [4, 5, 6]
    mask = context.mask(window)
    assert mask is not None
    assert mask.shape == (1, 1, 3, 7)
    for s in range(3):
        seen = [t for t in range(7) if t <= s + 4 and (not window or t > s + 4 - window)]
        assert mask[0, 0, s].nonzero().flatten().tolist() == seen
