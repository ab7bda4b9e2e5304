"""A ramp of the batch, wsd, chunked loss and layers made again: disturbed as undisturbed, resumed as not stopped."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from elastic_moe.checkpoint.inventory import list_checkpoints
from elastic_moe.cli.checkpoint import main as checkpoint_command
from elastic_moe.config.schema import TrainConfig
from elastic_moe.plan.batch_sizes import BatchSizes
from elastic_moe.run_dir import CONFIG, checkpoint_root
from tests.dist.test_copies import config_of
from tests.dist.test_equality import deepseek, default_scale
from tests.local_run import LocalRun

pytestmark = pytest.mark.timeout(900)
STEPS = 18


def recipe(run_dir: Path, recompute: str, reproducible: bool = True, steps: int = STEPS) -> TrainConfig:
    config = deepseek(default_scale(config_of(run_dir, steps, "1", max_workers=4)))
    model = replace(
        config.model, recompute=recompute, stream_segment=0, logits_gib=2.0**-30, z_loss=1e-4, router_z_loss=1e-3
    )  # a byte of logits: as small as chunks get
    data = replace(config.data, micro_batch=4, seq_len=96, batch_ramp=4, batch_ramp_steps=9)
    optim = replace(config.optim, schedule="wsd", decay_fraction=0.25)
    elastic = replace(config.elastic, reproducible=reproducible, check_every_steps=1)
    return replace(config, model=model, data=data, optim=optim, elastic=elastic)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one worker that keeps all activations."""
    with LocalRun(recipe(tmp_path_factory.mktemp("alone") / "run", "none"), 1) as run:
        run.wait_end()
        sizes = BatchSizes(run.config.data)
        assert [r["tokens"] for r in run.records()] == [96 * sizes.size(step) for step in range(STEPS)]
        assert run.records()[0]["tokens"] < run.records()[-1]["tokens"]
        assert all(r["z_loss"] > 0 and r["router_z_loss"] > 0 for r in run.records())
        assert run.records()[-1]["lr"] == pytest.approx(0.1 * run.config.optim.lr)
        return run.losses()


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_a_disturbed_run_has_the_losses_of_one_worker(tmp_path: Path, undisturbed: list[float], recompute: str) -> None:
    """Bit for bit, with a kill and a join while the batch grows; the rows of layers made again travel twice."""
    with LocalRun(recipe(tmp_path / "run", recompute), 3, nodes=4) as run:
        run.wait_step(4)
        run.signal("w1", signal.SIGKILL)
        run.add()
        run.wait("a joiner", lambda s: s["world_size"] == 3 and s["entered"] and s["generation"] > 2)
        run.wait_end()
        assert run.losses() == undisturbed
        assert all(e["lost_steps"] == 0 for e in run.events() if e["event"] == "entered")
        assert len({r["generation"] for r in run.records()}) >= 2


def test_a_stopped_run_goes_on_in_its_ramp_and_to_a_longer_end(tmp_path: Path) -> None:
    """With wsd, nothing before the decay depends on the length: the first steps are those of a longer run."""
    longer = 24
    with LocalRun(recipe(tmp_path / "whole" / "run", "2", steps=longer), 2) as run:
        run.wait_end()
        expected = run.losses()
    config = recipe(tmp_path / "cut" / "run", "2")
    with LocalRun(config, 1) as run:
        run.wait_step(5)
        run.coordinator.submit({"event": "stop", "reason": "enough"})
        run.wait_end()
        assert len(run.losses()) < 13, "before its decay"
    config.run.resume, config.run.steps = "auto", longer
    with LocalRun(config, 2) as run:
        run.wait_end()
        assert run.losses() == expected


def test_a_decayed_run_is_continued_from_before_its_decay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint before a decay stays, whatever came after it; the run gets a longer stable part."""
    longer = 24
    with LocalRun(recipe(tmp_path / "whole" / "run", "2", steps=longer), 2) as run:
        run.wait_end()
        expected = run.losses()
    config = recipe(tmp_path / "decayed" / "run", "2")
    config.checkpoint.every_steps, config.checkpoint.keep = 2, 1
    with LocalRun(config, 2) as run:
        run.wait_end()
        assert run.losses() != expected[:STEPS], "it has decayed"
    OmegaConf.save(OmegaConf.structured(config), run.dir / CONFIG)
    entries = list(list_checkpoints(checkpoint_root(config)))
    rates = [record["lr"] for record in run.records()]
    stable = max(step for step, rate in enumerate(rates, 1) if rate == config.optim.lr)
    assert [(e.step, e.manifest is not None and e.manifest.stays) for e in entries] == [(stable, True), (STEPS, False)]
    assert checkpoint_command(["rewind", str(run.dir), str(stable)]) == 0
    assert f"step {stable}; abandoned: {STEPS}" in capsys.readouterr().out
    assert checkpoint_command(["rewind", str(run.dir), str(stable), "--yes"]) == 0
    config.run.resume, config.run.steps = "auto", longer
    with LocalRun(config, 1) as run:
        run.wait_end()
        assert run.losses() == expected
