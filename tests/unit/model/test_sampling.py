"""Sampling: the nucleus by definition, temperature 0, seeds, the end token; generation with a cache and without."""

from __future__ import annotations

import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.sampling import generate, pick
from elastic_moe.model.transformer import Transformer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_only_the_nucleus_is_drawn() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    drawn = {pick(logits, 1.0, 0.65, generator(seed)) for seed in range(200)}
    assert drawn == {1, 3}, "0.4 + 0.3 reach 0.65"
    assert {pick(logits, 1.0, 1.0, generator(seed)) for seed in range(200)} == {0, 1, 2, 3}
    assert {pick(logits, 1.0, 1e-9, generator(seed)) for seed in range(20)} == {1}


def test_frequencies_follow_the_temperature() -> None:
    logits, source = torch.tensor([0.0, 1.0]), generator()
    for temperature in (0.5, 2.0):
        share = sum(pick(logits, temperature, 1.0, source) for _ in range(3000)) / 3000
        expected = float((logits / temperature).softmax(dim=0)[1])
        assert abs(share - expected) < 0.03
    assert pick(logits, 0.0, 1.0, source) == 1


def test_generation_equals_generation_without_a_cache() -> None:
    cfg = ModelConfig(
        vocab_size=30, hidden_size=16, num_layers=2, attention="mla", head_dim=8, rope_dim=4, value_dim=8, kv_latent=12,
        num_experts=4, experts_per_token=2, expert_hidden=8, dense_hidden=16, init_std=0.4, residual="mhc",
    )  # fmt: skip
    model = Transformer(cfg, LocalExperts(cfg))
    model.initialize(0)
    prompt = [3, 1, 4]
    cached = list(generate(model, 2, prompt, 12, 0.9, 0.9, seed=5))
    tokens, source = list(prompt), generator(5)
    for _ in range(12):
        tokens.append(pick(model(torch.tensor([tokens]))[0, -1].detach(), 0.9, 0.9, source))
    assert cached == tokens[3:]
    end = cached[6]
    assert list(generate(model, 2, prompt, 12, 0.9, 0.9, 5, end_token=end)) == cached[: cached.index(end)]
