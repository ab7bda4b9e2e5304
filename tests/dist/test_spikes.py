"""Whole runs in which one batch brings a huge gradient: its update is skipped, the run goes back, or it ends."""

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
SLOW, SPIKE, STEPS = 20, 140, 150  # the history of losses is full before the spike
HURRY = "hurry"  # file in the run directory: the workers are not slow any more
CORPUS = Path(__file__).resolve().parents[2] / "elastic_moe" / "plan" / "split" / "split.py"

pytestmark = pytest.mark.timeout(600)


def _disturbed(pause_s: float, config: TrainConfig, address: Any, prepared: Prepared, worker: str, node: str) -> None:
    """A worker whose gradients of one step are huge, and which is slow for some steps before it until it may hurry."""
    from elastic_moe.runtime.step import StepRunner

    compute = StepRunner._compute

    def enlarge(self: StepRunner, step: int, context: Any, batch: int) -> Any:
        share = compute(self, step, context, batch)
        if batch == SPIKE - 1:
            next(iter(self.gradients.tensors.values())).mul_(2.0**14)
        elif step > SLOW and not (Path(config.run.dir) / HURRY).exists():
            time.sleep(pause_s)
        with (Path(config.run.dir) / f"batches-{worker}").open("a") as file:
            file.write(f"{step} {batch}\n")
        return share

    StepRunner._compute = enlarge  # type: ignore[method-assign]
    _work(config, address, prepared, worker, node)


def _batches(run: LocalRun, worker: str) -> list[tuple[int, int]]:
    """(step, batch) of each step that a worker has computed, in order."""
    lines = (run.dir / f"batches-{worker}").read_text().splitlines()
    return [(int(step), int(batch)) for step, batch in map(str.split, lines)]


def _went_back(run: LocalRun) -> list[tuple[int, int]]:
    """(step, batches left out) of every entry whose state came from a checkpoint."""
    return [
        (e["step"], e["skipped_batches"])
        for e in run.events()
        if e["event"] == "entered" and e["source"] == "checkpoint"
    ]


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
    with _run(_config(tmp_path / "elastic", "skip"), 2, pause_s=0.25) as run:
        run.wait_step(SLOW)
        run.add()
        run.wait("the joiner", lambda s: s["world_size"] == 3 and s["entered"])
        for left, worker in ((2, "w0"), (1, "w1")):
            run.signal(worker, signal.SIGKILL)
            run.wait("the view without it", lambda s, left=left: s["world_size"] == left and s["entered"])
        assert run.coordinator.status()["step"] < SPIKE, "the machine is too slow for this test"
        (run.dir / HURRY).touch()
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


def _back_config(path: Path, steps: int = STEPS, inject: str = "") -> TrainConfig:
    config = _config(path, "rollback")
    return replace(
        config,
        run=replace(config.run, steps=steps),
        checkpoint=replace(config.checkpoint, every_steps=50),
        faults=replace(config.faults, inject=[inject] if inject else []),
    )


def _stop(run: LocalRun) -> None:
    run.coordinator.submit({"event": "stop", "reason": "enough"})
    run.wait_end()


def test_the_run_goes_back_and_leaves_the_data_out_and_so_do_joiners_and_a_resumed_run(tmp_path: Path) -> None:
    endless = _back_config(tmp_path, steps=100_000)
    with _run(endless, 2) as run:
        run.wait("the way back", lambda s: s["generation"] > 1 and s["entered"])
        run.add()
        joined = run.wait("the joiner", lambda s: s["world_size"] == 3 and s["entered"])
        run.wait_step(joined["step"] + 3)
        _stop(run)
        assert _told(run) == [(SPIKE, 1)]
        [(step, skipped)] = _went_back(run)
        assert step + skipped == SPIKE
        assert step > 0
        last = len(run.losses())
        assert _batches(run, "w0") == [(s, s - 1) for s in range(1, SPIKE + 1)] + [
            (s, s - 1 + skipped) for s in range(step + 1, last + 1)
        ]
        joiner = _batches(run, "w2")
        assert joiner == [(s, s - 1 + skipped) for s, _ in joiner]
        assert joiner
    with _run(endless, 1) as resumed:
        resumed.wait_step(last + 3)
        _stop(resumed)
        assert _batches(resumed, "w0")[-3:] == [(s, s - 1 + skipped) for s, _ in _batches(resumed, "w0")[-3:]]
        assert len(resumed.losses()) >= last + 3


@pytest.mark.parametrize("died", [f"1:{SPIKE}:apply", f"0:{SPIKE}:publish"])
def test_who_knows_of_the_spike_tells_the_others_when_a_rank_dies_in_its_step(tmp_path: Path, died: str) -> None:
    with _run(_back_config(tmp_path, inject=died), 3) as run:
        run.wait_end()
        assert [p.exitcode for p in run.processes.values()].count(-signal.SIGKILL) == 1
        assert {step for step, _ in _told(run)} <= {SPIKE}
        [(step, skipped)] = _went_back(run)
        assert step + skipped == SPIKE
        assert len(run.losses()) == STEPS


def test_without_a_checkpoint_the_run_goes_on_without_the_update(tmp_path: Path) -> None:
    config = _back_config(tmp_path)
    with _run(replace(config, checkpoint=replace(config.checkpoint, every_steps=1000)), 2) as run:
        run.wait_end()
        assert _told(run) == [(SPIKE, 1)]
        assert _went_back(run) == []
        assert [record["step"] for record in run.records() if record["skipped"]] == [SPIKE]


def test_a_run_that_makes_many_steps_again_has_nobody_that_hangs(tmp_path: Path) -> None:
    """The steps that its members report fall on the way back. That is no standstill, however long they stay low."""
    config = _back_config(tmp_path, steps=100_000)
    elastic = replace(config.elastic, hang_timeout_s=6.0)
    with _run(replace(config, elastic=elastic), 2, pause_s=0.35) as run:
        (run.dir / HURRY).touch()
        back = run.wait("the way back", lambda s: s["generation"] > 1 and s["entered"])
        (run.dir / HURRY).unlink()
        run.wait_step(SPIKE + 2)  # at least 40 steps, which take longer than anybody may stand still
        assert run.coordinator.status()["generation"] == back["generation"], run.events()[-5:]
        _stop(run)
