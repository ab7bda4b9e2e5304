"""Runs with Muon: disturbed as undisturbed, the same at every world size, and resumed at another one."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_moe.checkpoint.weights import find_checkpoint, weight_reader
from elastic_moe.config.schema import TrainConfig
from elastic_moe.model.params import param_specs
from tests.dist.test_copies import config_of
from tests.dist.test_equality import deepseek, default_scale
from tests.local_run import LocalRun

pytestmark = pytest.mark.timeout(600)
STEPS = 16


def muon(run_dir: Path, steps: int = STEPS, reproducible: bool = False) -> TrainConfig:
    config = default_scale(config_of(run_dir, steps, "1", max_workers=4))
    config = replace(config, optim=replace(config.optim, name="muon"))
    return replace(config, elastic=replace(config.elastic, reproducible=reproducible))


def test_a_disturbed_run_ends_as_an_undisturbed_one_of_another_size(tmp_path: Path) -> None:
    """Bit for bit: V4's attention and mHC, a kill and a join; twins are compared in every step."""
    with LocalRun(deepseek(muon(tmp_path / "alone" / "run", reproducible=True)), 1) as run:
        run.wait_end()
        expected = run.losses()
    config = deepseek(muon(tmp_path / "disturbed" / "run", reproducible=True))
    config = replace(config, elastic=replace(config.elastic, check_every_steps=1))
    with LocalRun(config, 3, nodes=4) as run:
        run.wait_step(5)
        run.signal("w1", signal.SIGKILL)
        run.add()
        run.wait("a joiner", lambda s: s["world_size"] == 3 and s["entered"] and s["generation"] > 2)
        run.wait_end()
        assert run.losses() == expected
        kinds = {event["event"] for event in run.events()}
        assert not kinds & {"repaired", "state_damaged", "rolled_back"}
        assert all(e["lost_steps"] == 0 for e in run.events() if e["event"] == "entered")


def test_a_run_is_resumed_at_another_world_size_and_read(tmp_path: Path) -> None:
    whole = muon(tmp_path / "whole" / "run", reproducible=True)
    with LocalRun(whole, 2) as run:
        run.wait_end()
        expected = run.losses()
    config = muon(tmp_path / "cut" / "run", reproducible=True)
    with LocalRun(config, 3) as run:
        run.wait_step(6)
        run.coordinator.submit({"event": "stop", "reason": "enough"})
        run.wait_end()
        stopped = len(run.losses())
    assert stopped < STEPS
    config.run.resume = "auto"
    with LocalRun(config, 1) as run:
        run.wait_end()
        assert run.losses() == expected
        model = run.config.model
    read = weight_reader(find_checkpoint(str(Path(config.run.dir) / "checkpoints")), model, "muon")
    for spec in param_specs(model, "muon"):
        assert read(spec).shape == spec.shape, "uncut matrices are found"
