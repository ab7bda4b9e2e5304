"""Runs of real worker processes that save by the clock, and before they lose workers on purpose."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.config.schema import CheckpointConfig, TrainConfig
from tests.local_run import LocalRun, tiny_config

CORPUS = Path(__file__).resolve().parents[2] / "elastic_moe" / "plan" / "split" / "split.py"
pytestmark = pytest.mark.timeout(600)


def config_of(tmp_path: Path, steps: int, checkpoint: CheckpointConfig | None = None, **elastic: Any) -> TrainConfig:
    """A run that saves its last step only, unless the test says otherwise."""
    config = tiny_config(tmp_path / "run", CORPUS, **elastic)
    return replace(
        config,
        run=replace(config.run, steps=steps),
        optim=replace(config.optim, schedule="constant"),
        checkpoint=checkpoint or CheckpointConfig(every_steps=0),
    )


def saved(run: LocalRun) -> list[int]:
    """Steps of the complete checkpoints."""
    return [int(event["step"]) for event in run.events() if event["event"] == "checkpoint"]


def restored(run: LocalRun) -> dict[str, Any]:
    """The only event of a view whose state came from a checkpoint."""
    (event,) = [e for e in run.events() if e["event"] == "entered" and e["source"] == "checkpoint"]
    return event


def kill(run: LocalRun, *workers: str) -> None:
    for worker in workers:
        run.signal(worker, signal.SIGKILL)


def test_a_run_saves_by_the_clock(tmp_path: Path) -> None:
    config = config_of(tmp_path, 100, CheckpointConfig(every_steps=0, every_minutes=0.5 / 60))
    with LocalRun(config, 2) as run:
        run.wait("a checkpoint", lambda _: bool(saved(run)))
        kill(run, "w0", "w1")
        run.add(), run.add()
        run.wait_end()
        assert restored(run)["step"] in saved(run)
        assert len(run.losses()) == 100


def test_a_drain_saves_before_the_worker_goes(tmp_path: Path) -> None:
    with LocalRun(config_of(tmp_path, 150), 3) as run:
        step = run.wait_step(5)["step"]
        run.coordinator.submit({"event": "drain", "worker": "w1"})
        run.wait("the checkpoint", lambda _: bool(saved(run)))
        assert saved(run)[0] >= step
        run.wait("2 workers", lambda s: s["world_size"] == 2 and s["entered"])
        kill(run, "w0", "w2")
        run.add(), run.add()
        run.wait_end()
        assert restored(run)["step"] == saved(run)[0]
        assert restored(run)["lost_steps"] > 0, "the steps since the checkpoint"
        assert len(run.losses()) == 150


def test_survivors_that_are_too_few_save_the_committed_step_once(tmp_path: Path) -> None:
    """All die in the hold: a new run goes on from the step that was committed last."""
    config = config_of(tmp_path, 60, min_workers=3)
    with LocalRun(config, 3, nodes=3) as run:
        run.wait_step(7)
        kill(run, "w1")
        run.wait("the hold", lambda s: s["phase"] == "waiting")
        run.wait("its checkpoint", lambda _: bool(saved(run)))
        assert [record["step"] for record in run.records()][-1] == saved(run)[0]
        kill(run, "w0", "w2")
    with LocalRun(config, 3) as run:
        run.wait_end()
        assert restored(run)["lost_steps"] == 0
        assert len(run.losses()) == 60
        assert saved(run) == [restored(run)["step"], 60]


def test_a_stop_in_a_hold_ends_the_run_with_its_state_saved(tmp_path: Path) -> None:
    config = config_of(tmp_path, 400, min_workers=2)
    with LocalRun(config, 2) as run:
        run.wait_step(5)
        kill(run, "w0")
        run.coordinator.submit({"event": "stop", "reason": "SIGTERM"})
        run.wait_end()
        run.processes["w1"].join(60)
        run.coordinator.close()
        assert saved(run) == [run.records()[-1]["step"]]


def test_a_run_that_is_given_up_saves_the_committed_step_first(tmp_path: Path) -> None:
    with LocalRun(config_of(tmp_path, 4000), 3) as run:
        run.wait_step(5)
        run.coordinator.submit({"event": "fail", "reason": "a worker has no GPU"})
        status = run.wait("the end", lambda s: s["phase"] == "failed")
        assert status["reason"] == "a worker has no GPU"
        for process in run.processes.values():
            process.join(60)
        assert [process.exitcode for process in run.processes.values()] == [0, 0, 0], "they are released"
        step = run.records()[-1]["step"]
        assert saved(run) == [step]
    with LocalRun(config_of(tmp_path, step + 3), 2) as run:
        run.wait_end()
        assert (restored(run)["step"], restored(run)["lost_steps"]) == (step, 0)
        assert len(run.losses()) == step + 3


def test_a_run_that_cannot_spare_the_drained_holds_with_its_state_saved(tmp_path: Path) -> None:
    config = config_of(tmp_path, 4000, min_workers=2)
    with LocalRun(config, 2) as run:
        run.wait_step(5)
        run.coordinator.submit({"event": "drain", "worker": "w0", "deadline_s": 12})
        run.wait("the hold", lambda s: s["phase"] == "waiting")
        run.wait("both checkpoints", lambda _: len(saved(run)) == 2)
        run.wait("the deadline", lambda _: "worker_evicted" in [event["event"] for event in run.events()])
        step = run.records()[-1]["step"]
        assert saved(run)[-1] == step
        kill(run, "w1")
        run.add(), run.add()
        run.wait_step(step + 2)
        assert (restored(run)["step"], restored(run)["lost_steps"]) == (step, 0)


def test_workers_without_a_coordinator_end_after_a_while(tmp_path: Path) -> None:
    config = config_of(tmp_path, 4000, heartbeat_timeout_s=2.0, lease_s=3.0, hold_s=6.0)
    with LocalRun(config, 2) as run:
        run.wait_step(5)
        run.coordinator.close()
        for process in run.processes.values():
            process.join(120)
        assert [process.exitcode for process in run.processes.values()] == [1, 1]
