"""Shape of the learning rate schedule, and its borders."""

from __future__ import annotations

from itertools import pairwise

import pytest

from elastic_moe.config.schema import OptimConfig
from elastic_moe.errors import UserError
from elastic_moe.optim.schedule import lr_at


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
