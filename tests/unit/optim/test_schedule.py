"""Shape of the learning rate schedule, and its borders."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from elastic_moe.config.schema import DataConfig, OptimConfig
from elastic_moe.errors import UserError
from elastic_moe.optim.schedule import last_stable_step, lr_at, one_token_each
from elastic_moe.plan.batch_sizes import BatchSizes


def test_cosine_with_warm_up() -> None:
    cfg = OptimConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [lr_at(step, 110, cfg) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[59] == pytest.approx(0.55)  # half way down
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[9:]))
    assert lr_at(500, 110, cfg) == pytest.approx(0.1)


def test_constant() -> None:
    cfg = OptimConfig(lr=0.5, warmup_steps=2, schedule="constant")
    assert [lr_at(step, 5, cfg) for step in range(1, 6)] == [0.25, 0.5, 0.5, 0.5, 0.5]


def test_short_runs_stay_finite() -> None:
    assert lr_at(1, 1, OptimConfig(lr=1.0, warmup_steps=0, min_lr_ratio=0.1)) == pytest.approx(0.1)
    assert lr_at(3, 3, OptimConfig(lr=1.0, warmup_steps=20)) == pytest.approx(0.15)
    assert lr_at(20, 20, OptimConfig(lr=1.0, warmup_steps=20)) == pytest.approx(1.0)


def test_unknown_schedule_names_the_key() -> None:
    with pytest.raises(UserError, match=r"optim\.schedule"):
        lr_at(1, 10, OptimConfig(schedule="linear"))


def test_warm_up_stable_decay() -> None:
    cfg = OptimConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1, schedule="wsd", decay_fraction=0.2)
    rates = [lr_at(step, 100, cfg) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[9:80] == [1.0] * 71
    assert rates[80] < 1.0
    assert rates[84] == pytest.approx(0.1 + 0.9 * 0.5)  # 1 - sqrt(5 / 20)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[79:]))
    linear, cosine = (replace(cfg, decay_shape=shape) for shape in ("linear", "cosine"))
    assert [lr_at(90, 100, c) for c in (linear, cosine)] == pytest.approx([0.55, 0.55])
    assert lr_at(85, 100, linear) == pytest.approx(0.1 + 0.9 * 0.75)
    assert lr_at(85, 100, cosine) > lr_at(85, 100, linear)


def test_a_stable_run_of_any_length_is_the_begin_of_a_longer_one() -> None:
    cfg = OptimConfig(lr=1.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2)
    assert [lr_at(s, 100, cfg) for s in range(1, 81)] == [lr_at(s, 5000, cfg) for s in range(1, 81)]
    later = replace(cfg, decay_fraction=0.125)
    assert lr_at(700, 800, later) == 1.0, "a decay of 100 steps from the checkpoint of step 700"
    assert lr_at(701, 800, later) < 1.0


@pytest.mark.parametrize("fraction", [0.07, 0.29, 0.57, 0.1, 0.3])
def test_a_decay_has_the_steps_that_were_asked_for(fraction: float) -> None:
    """In binary, 0.07 times 100 is above 7, and 0.29 times 100 below 29."""
    cfg = OptimConfig(lr=1.0, warmup_steps=0, schedule="wsd", decay_fraction=fraction)
    assert sum(lr_at(step, 100, cfg) < 1.0 for step in range(1, 101)) == round(100 * fraction)


@pytest.mark.parametrize("fraction", [0.07, 0.29, 0.57, 1.0])
def test_the_last_stable_step_is_the_one_before_the_decay(fraction: float) -> None:
    cfg = OptimConfig(lr=1.0, warmup_steps=0, schedule="wsd", decay_fraction=fraction)

    def ramp(step: int) -> int:
        return step * (step + 1)

    for tokens_through in (one_token_each, ramp):
        stable = [step for step in range(1, 101) if lr_at(step, 100, cfg, tokens_through) == 1.0]
        assert last_stable_step(100, cfg, tokens_through) == max(stable, default=0)
    assert last_stable_step(100, replace(cfg, schedule="cosine")) == 0


def test_steps_of_the_mhc_paper() -> None:
    cfg = OptimConfig(lr=8.6e-4, warmup_steps=2000, schedule="steps")
    rates = [lr_at(step, 30_000, cfg) / cfg.lr for step in range(1, 30_001)]
    assert rates[1999:24_000] == [1.0] * 22_001
    assert rates[24_000:27_000] == pytest.approx([0.316] * 3000)
    assert rates[27_000:] == pytest.approx([0.1] * 3000)
    own = replace(cfg, warmup_steps=0, lr_steps=["0.5:2", "0.57:0"])
    assert [lr_at(step, 100, own) / cfg.lr for step in (1, 50, 51, 57, 58, 100)] == [1, 1, 2, 2, 0, 0]


def test_fractions_of_a_run_are_fractions_of_its_tokens() -> None:
    """With a ramp from 4 to 16 sequences, half of the tokens are done later than half of the steps."""
    sizes = BatchSizes(DataConfig(global_batch=16, micro_batch=4, seq_len=8, batch_ramp=4, batch_ramp_steps=60))
    tokens = [sizes.tokens_through(step) for step in range(101)]
    assert tokens[:3] == [0, 32, 64]
    cfg = OptimConfig(lr=1.0, warmup_steps=0, schedule="steps", lr_steps=["0.5:0.5"])
    first = next(step for step in range(1, 101) if lr_at(step, 100, cfg, sizes.tokens_through) < 1.0)
    assert tokens[first - 2] < tokens[100] / 2 <= tokens[first - 1]
    assert first > 51
    warm = OptimConfig(lr=1.0, warmup_tokens=tokens[30], schedule="constant")
    rates = [lr_at(step, 100, warm, sizes.tokens_through) for step in range(1, 101)]
    assert rates[:30] == pytest.approx([tokens[step] / tokens[30] for step in range(1, 31)])
    assert rates[29:] == [1.0] * 71
    cosine = OptimConfig(lr=1.0, warmup_tokens=tokens[10], min_lr_ratio=0.0)
    middle = (tokens[10] + tokens[100]) / 2
    after = next(step for step in range(1, 101) if tokens[step] >= middle)
    assert lr_at(after, 100, cosine, sizes.tokens_through) <= 0.5 < lr_at(after - 1, 100, cosine, sizes.tokens_through)
    assert lr_at(100, 100, cosine, sizes.tokens_through) == 0.0


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd", "steps"])
def test_equal_batches_change_no_bit(schedule: str) -> None:
    cfg, sizes = OptimConfig(schedule=schedule), BatchSizes(DataConfig(global_batch=24, seq_len=4096))
    steps = range(1, 778)
    assert [lr_at(s, 777, cfg) for s in steps] == [lr_at(s, 777, cfg, sizes.tokens_through) for s in steps]
