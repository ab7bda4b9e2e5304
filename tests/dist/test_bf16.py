"""Runs in which rows and weights travel in bf16, or gradients: losses follow those of fp32, disturbed or not."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_moe.config.schema import TrainConfig
from tests.dist.test_copies import config_of
from tests.local_run import LocalRun

pytestmark = pytest.mark.timeout(600)
STEPS = 30


def assert_near(base: Path, config: TrainConfig, key: str) -> None:
    """Losses with this key at fp32, undisturbed, and at bf16, with a kill, are near; no step and no copy is lost."""
    losses: list[list[float]] = []
    for value in ("fp32", "bf16"):
        run_dir = str(base / value / "run")
        with LocalRun(replace(config, run=replace(config.run, dir=run_dir), **{key: value}), 3) as run:
            if value == "bf16":
                run.wait_step(5)
                run.signal("w1", signal.SIGKILL)
            run.wait_end()
            losses.append(run.losses())
            assert all(e["lost_steps"] == 0 for e in run.events() if e["event"] == "entered")
            assert not [e for e in run.events() if e["event"] in ("state_repaired", "rolled_back")]
    exact, rounded = losses
    assert exact != rounded
    assert len(exact) == len(rounded) == STEPS
    assert rounded == pytest.approx(exact, rel=0.02)
    assert exact[-1] < 0.95 * exact[0]


@pytest.mark.parametrize("copies", ["1", "all"])
def test_a_disturbed_run_in_bf16_ends_near_the_loss_of_fp32(tmp_path: Path, copies: str) -> None:
    assert_near(tmp_path, config_of(tmp_path / "run", STEPS, copies), "precision")


@pytest.mark.parametrize("copies", ["1", "all"])
def test_a_disturbed_run_that_reduces_in_bf16_ends_near_the_loss_of_fp32(tmp_path: Path, copies: str) -> None:
    """Mirrors are compared with primaries in every step."""
    assert_near(tmp_path, config_of(tmp_path / "run", STEPS, copies, check_every_steps=1), "reduce_precision")


def test_a_disturbed_run_in_bf16_equals_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    """From three workers, with weights in bf16, to one that is alone; against one that was always alone."""
    losses = []
    for workers in (3, 1):
        config = replace(config_of(tmp_path / str(workers) / "run", STEPS, "1"), precision="bf16")
        config = replace(config, elastic=replace(config.elastic, reproducible=True))
        with LocalRun(config, workers) as run:
            if workers > 1:
                run.wait_step(5)
                run.signal("w1", signal.SIGKILL)
                run.wait("2 workers", lambda s: s["world_size"] == 2 and s["entered"] and s["step"] > 10)
                run.signal("w0", signal.SIGKILL)
                run.wait("a worker alone", lambda s: s["world_size"] == 1 and s["entered"])
            run.wait_end()
            losses.append(run.losses())
            assert all(e["lost_steps"] == 0 for e in run.events() if e["event"] == "entered")
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.95 * losses[0][0]
