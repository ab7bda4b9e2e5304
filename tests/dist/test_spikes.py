"""Whole runs in which one batch brings a huge gradient: its update is skipped at every membership, or ends the run."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.checkpoint.weights import find_checkpoint
from elastic_moe.config.schema import BalanceConfig, TrainConfig
from elastic_moe.data.prepare import Prepared
from tests.local_run import LocalRun, _work, tiny_config

WAIT_S = 60.0
SLOW, SPIKE, STEPS = 20, 200, 210
CORPUS = Path(__file__).resolve().parents[2] / "elastic_moe" / "plan" / "split" / "split.py"

pytestmark = pytest.mark.timeout(600)


def _disturbed(pause_s: float, config: TrainConfig, address: Any, prepared: Prepared, worker: str, node: str) -> None:
    """A worker whose gradients of one step are huge, and which is slow for some steps before it."""
    from elastic_moe.runtime.step import StepRunner

    compute = StepRunner._compute

    def enlarge(self: StepRunner, step: int, context: Any) -> Any:
        share = compute(self, step, context)
        if step == SPIKE:
            next(iter(self.gradients.tensors.values())).mul_(2.0**14)
        elif step > SLOW:
            time.sleep(pause_s)
        return share

    StepRunner._compute = enlarge  # type: ignore[method-assign]
    _work(config, address, prepared, worker, node)


def _run(config: TrainConfig, workers: int, pause_s: float = 0.0) -> LocalRun:
    class Disturbed(LocalRun):
        work = staticmethod(partial(_disturbed, pause_s))

    return Disturbed(config, workers)


def _config(path: Path, spike: str) -> TrainConfig:
    config = tiny_config(path / "run", CORPUS, reproducible=True, max_workers=3)
    return replace(
        config,
        run=replace(config.run, steps=STEPS),
        optim=replace(config.optim, spike=spike),
        checkpoint=replace(config.checkpoint, every_steps=0),
        balance=BalanceConfig(every_steps=0),
    )


def _told(run: LocalRun) -> list[tuple[int, int]]:
    return [(e["step"], e["in_a_row"]) for e in run.events() if e["event"] == "loss_spike"]


def test_a_spike_is_skipped_by_those_who_joined_later_as_by_a_run_nobody_disturbed(tmp_path: Path) -> None:
    with _run(_config(tmp_path / "alone", "skip"), 1) as run:
        run.wait_end()
        expected = run.losses()
        assert _told(run) == [(SPIKE, 1)]
        assert [record["step"] for record in run.records() if record["skipped"]] == [SPIKE]
    with _run(_config(tmp_path / "elastic", "skip"), 2, pause_s=0.15) as run:
        run.wait_step(SLOW)
        run.add()
        run.wait("the joiner", lambda s: s["world_size"] == 3 and s["entered"])
        for left, worker in ((2, "w0"), (1, "w1")):
            run.signal(worker, signal.SIGKILL)
            run.wait("the view without it", lambda s, left=left: s["world_size"] == left and s["entered"])
        assert run.coordinator.status()["step"] < SPIKE, "the machine is too slow for this test"
        run.wait_end()
        assert _told(run) == [(SPIKE, 1)]
        assert run.losses() == expected


def test_a_spike_ends_the_run_with_the_state_before_it_saved(tmp_path: Path) -> None:
    with _run(_config(tmp_path, "stop"), 2) as run:
        for process in run.processes.values():
            process.join(4 * WAIT_S)
            assert process.exitcode == 1
        run.wait("the records", lambda status: status["step"] == SPIKE)
        assert _told(run) == [(SPIKE, 1)]
        run.coordinator.close()
        assert find_checkpoint(str(run.dir / "checkpoints")).step == SPIKE
