"""The keys that shape a model's state are exactly those with which a run cannot be continued."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from elastic_moe.config.fingerprint import compare, fingerprint, shape_keys
from elastic_moe.config.schema import DataConfig, ModelConfig, OptimConfig, TrainConfig
from elastic_moe.model.params import param_specs
from elastic_moe.plan.state.units import build_units


def _print(config: TrainConfig, **digests: str) -> dict[str, Any]:
    return fingerprint(config, digests)


def _units(model: ModelConfig) -> list[Any]:
    return [(u.name, u.numel, u.optimizer) for u in build_units(param_specs(model), model.max_unit_elements)]


BASES = [
    ModelConfig(),
    ModelConfig(attention="mla", query_latent=32),
    ModelConfig(residual="mhc", mtp_depth=1, num_hash_layers=1),
]


@pytest.mark.parametrize("base", BASES, ids=["gqa", "mla", "mhc"])
def test_a_key_that_changes_the_state_is_refused(base: ModelConfig) -> None:
    seen = 0
    for item in fields(ModelConfig):
        value = getattr(base, item.name)
        if not isinstance(value, (int, float)) or item.name in ("stream_segment", "end_token"):
            continue
        changed = not value if isinstance(value, bool) else value + (1 if isinstance(value, float) else 4)
        try:
            other = replace(base, **{item.name: changed})
            differs = _units(other) != _units(base)
        except (ValueError, RuntimeError, AssertionError, IndexError):
            continue  # no such model
        if differs:
            seen += 1
            result = compare(_print(TrainConfig(model=base)), _print(TrainConfig(model=other)))
            assert any(f"model.{item.name}:" in text for text in result.impossible), item.name
    assert seen >= 8


def test_values_that_only_change_the_run_are_told() -> None:
    old = TrainConfig()
    new = TrainConfig(
        seed=3,
        model=ModelConfig(rope_theta=5e5, experts_per_token=2),
        data=DataConfig(global_batch=64, cache_dir="elsewhere"),
        optim=OptimConfig(lr=1e-3),
    )
    result = compare(_print(old), _print(new))
    assert result.impossible == ()
    assert set(result.changed) == {
        "seed: 0 -> 3",
        "model.rope_theta: 10000.0 -> 500000.0",
        "model.experts_per_token: 4 -> 2",
        "data.global_batch: 32 -> 64",
        "optim.lr: 0.002 -> 0.001",
    }


def test_digests_tell_another_text_and_another_vocabulary() -> None:
    one = _print(TrainConfig(data=DataConfig(corpus="a")), tokenizer="t", data="d")
    same_text = _print(TrainConfig(data=DataConfig(corpus="b")), tokenizer="t", data="d")
    assert compare(one, same_text) == compare(one, one)
    other = compare(one, _print(TrainConfig(data=DataConfig(corpus="a")), tokenizer="u", data="e"))
    assert other.impossible == ("data.tokenizer: another vocabulary",)
    assert other.changed == ("data: another text",)
    assert compare({}, one) == compare(one, one)


def test_keys_of_another_attention_do_not_count() -> None:
    assert "model.kv_latent" not in shape_keys(ModelConfig())
    assert "model.kv_latent" in shape_keys(ModelConfig(attention="mla"))
