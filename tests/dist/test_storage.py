"""Runs of real worker processes on a storage that errors, hangs or is full: they wait, train on, and lose nothing."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.checkpoint.reader import find_latest
from elastic_moe.config.schema import CheckpointConfig, TrainConfig
from elastic_moe.data.prepare import Prepared
from elastic_moe.run_dir import CHECKPOINTS
from tests.local_run import LocalRun, _work, tiny_config
from tests.storage_faults import install, set_fault

CORPUS = Path(__file__).resolve().parents[2] / "elastic_moe" / "plan" / "split" / "split.py"
pytestmark = pytest.mark.timeout(600)


def control_of(config: TrainConfig) -> Path:
    return Path(config.run.dir).parent / "control"


def work_on_faulty_storage(
    config: TrainConfig, address: tuple[str, int], prepared: Prepared, worker: str, node: str
) -> None:
    install(control_of(config))
    _work(config, address, prepared, worker, node)


class FaultyRun(LocalRun):
    """A run whose workers, but not its coordinator, see the faults of the control file."""

    work = staticmethod(work_on_faulty_storage)

    def failures(self) -> list[str]:
        """Reasons of failed checkpoints."""
        return [event["reason"] for event in self.events() if event["event"] == "checkpoint_failed"]

    def saved(self) -> list[int]:
        """Steps of the complete checkpoints."""
        return [int(event["step"]) for event in self.events() if event["event"] == "checkpoint"]


def config_of(tmp_path: Path, steps: int, wait_s: float = 600.0, **elastic: Any) -> TrainConfig:
    config = tiny_config(tmp_path / "run", CORPUS, **elastic)
    return replace(
        config,
        run=replace(config.run, steps=steps),
        optim=replace(config.optim, schedule="constant"),
        checkpoint=CheckpointConfig(every_steps=5, timeout_s=3.0, wait_s=wait_s),
    )


@pytest.mark.parametrize("fault", ["error read", "hang read"])
def test_a_resume_waits_for_storage_that_cannot_be_read(tmp_path: Path, fault: str) -> None:
    with FaultyRun(config_of(tmp_path, 10), 2) as run:
        run.wait_end()
        before = run.losses()
    set_fault(tmp_path / "control", fault)
    with FaultyRun(config_of(tmp_path, 20), 2) as run:
        run.wait("the hold", lambda _: any(e["event"] == "storage_unavailable" for e in run.events()))
        assert run.losses() == before
        set_fault(tmp_path / "control", "")
        run.wait_end()
        losses = run.losses()
        assert losses[:10] == before
        assert len(losses) == 20
        entered = [event for event in run.events() if event["event"] == "entered"]
        assert [(event["source"], event["step"]) for event in entered] == [("initialisation", 0), ("checkpoint", 10)]


def test_a_resume_may_take_longer_than_the_hang_limit(tmp_path: Path) -> None:
    """Every look at the storage takes a second and a half, every file too: the main threads wait, and are not hung."""
    hang_timeout_s = 8.0
    with FaultyRun(config_of(tmp_path, 10), 3) as run:
        run.wait_end()
        before = run.losses()
    set_fault(tmp_path / "control", "slow read")
    with FaultyRun(config_of(tmp_path, 15, hang_timeout_s=hang_timeout_s), 3) as run:
        run.wait_step(12)
        set_fault(tmp_path / "control", "")
        run.wait_end()
        assert run.losses()[:10] == before
        events = run.events()
        (entered,) = [event for event in events if event["event"] == "entered" and event["source"] == "checkpoint"]
        assert (entered["step"], entered["lost_steps"]) == (10, 0)
        assert entered["reconfigure_s"] > hang_timeout_s
        assert not {event["event"] for event in events} & {"worker_evicted", "worker_lost", "suspect", "pause"}


@pytest.mark.parametrize("fault", ["error write", "hang write", "full write"])
def test_training_goes_on_while_nothing_can_be_written_and_the_end_waits(tmp_path: Path, fault: str) -> None:
    set_fault(tmp_path / "control", fault)
    with FaultyRun(config_of(tmp_path, 30), 2) as run:
        run.wait_step(30)
        assert find_latest(str(run.dir / CHECKPOINTS)) is None
        assert run.coordinator.status()["phase"] == "running"
        run.wait("a report", lambda _: any(e["event"] == "checkpoint_failed" for e in run.events()))
        set_fault(tmp_path / "control", "")
        run.wait_end()
        found = find_latest(str(run.dir / CHECKPOINTS))
        assert found is not None
        assert found.step == 30
        assert len([event for event in run.events() if event["event"] == "view"]) == 1, "nobody was given up"


def test_a_state_that_cannot_be_saved_is_told(tmp_path: Path) -> None:
    set_fault(tmp_path / "control", "full write")
    with FaultyRun(config_of(tmp_path, 10, wait_s=1.0), 2) as run:
        run.wait_end()
        reasons = run.failures()
        assert any("was not written within 1 s" in reason for reason in reasons)
        assert any("No space left" in reason for reason in reasons)


# --- holds ------------------------------------------------------------------------------------------------------------


def begin_hold(run: FaultyRun) -> None:
    """Let the run make steps, and lose a worker without which it cannot go on."""
    run.wait_step(7)
    run.signal("w1", signal.SIGKILL)
    run.wait("the hold", lambda s: s["phase"] == "waiting")


def holding(tmp_path: Path, **elastic: Any) -> TrainConfig:
    """A run of three workers that holds when it loses one, saves then only, and soon tells that it cannot."""
    config = config_of(tmp_path, 4000, wait_s=1.0, **({"min_workers": 3} | elastic))
    return replace(config, checkpoint=replace(config.checkpoint, every_steps=0))


@pytest.mark.parametrize("fault", ["error write", "hang write", "full write"])
def test_a_hold_saves_when_the_storage_is_back_however_long_that_takes(tmp_path: Path, fault: str) -> None:
    set_fault(tmp_path / "control", fault)
    with FaultyRun(holding(tmp_path), 3) as run:
        begin_hold(run)
        run.wait("that it is told", lambda _: any("within 1 s" in reason for reason in run.failures()))
        assert run.saved() == []
        set_fault(tmp_path / "control", "")
        run.wait("the checkpoint", lambda _: bool(run.saved()))
        assert run.saved() == [run.records()[-1]["step"]]
        told = [
            (event.get("worker"), event["reason"]) for event in run.events() if event["event"] == "checkpoint_failed"
        ]
        assert len(told) == len(set(told)) <= 3, "by each writer once, and by their leader"
        assert run.coordinator.status()["phase"] == "waiting"
        run.coordinator.submit({"event": "stop", "reason": "SIGTERM"})
        run.wait_end()


def test_a_stop_in_a_hold_waits_for_a_storage_that_comes_back(tmp_path: Path) -> None:
    set_fault(tmp_path / "control", "full write")
    with FaultyRun(holding(tmp_path), 3) as run:
        begin_hold(run)
        run.wait("that it is told", lambda _: any("within 1 s" in reason for reason in run.failures()))
        run.coordinator.submit({"event": "stop", "reason": "SIGTERM"})
        run.wait("the stop", lambda _: any(event["event"] == "stop" for event in run.events()))
        assert run.coordinator.status()["phase"] == "waiting"
        set_fault(tmp_path / "control", "")
        run.wait_end()
        run.coordinator.close()
        assert run.saved() == [run.records()[-1]["step"]]


def test_the_last_one_saves_when_another_dies_while_both_save(tmp_path: Path) -> None:
    set_fault(tmp_path / "control", "hang write")
    with FaultyRun(holding(tmp_path, redundancy=2), 3) as run:
        begin_hold(run)
        run.wait("a write", lambda _: bool(run.failures()))
        run.signal("w2", signal.SIGKILL)
        run.wait("its loss", lambda s: s["workers"] == 1)
        set_fault(tmp_path / "control", "")
        run.wait("the checkpoint", lambda _: bool(run.saved()))
        assert run.saved() == [run.records()[-1]["step"]]
