"""Whole runs in which numbers are not finite: on one worker, which leaves; and on all, which ends the run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic_moe.checkpoint.weights import find_checkpoint
from elastic_moe.config.schema import TrainConfig
from elastic_moe.data.prepare import Prepared
from tests.local_run import LocalRun, _work, tiny_config

WAIT_S = 60.0
CORPUS = Path(__file__).resolve().parents[2] / "elastic_moe" / "plan" / "split" / "split.py"


def _poisoned(
    only: str, first: int, config: TrainConfig, address: Any, prepared: Prepared, worker: str, node: str
) -> None:
    """A worker whose gradients are not finite from a step on."""
    from elastic_moe.runtime.step import StepRunner

    compute = StepRunner._compute

    def poison(self: StepRunner, step: int, context: Any, batch: int) -> Any:
        share = compute(self, step, context, batch)
        if step >= first and only in ("", worker):
            next(iter(self.gradients.tensors.values())).view(-1)[0] = math.nan
        return share

    StepRunner._compute = poison  # type: ignore[method-assign]
    _work(config, address, prepared, worker, node)


def _poisoned_one(*args: Any) -> None:
    _poisoned("w1", 5, *args)


def _poisoned_all(*args: Any) -> None:
    _poisoned("", 8, *args)


class OnePoisoned(LocalRun):
    work = staticmethod(_poisoned_one)


class AllPoisoned(LocalRun):
    work = staticmethod(_poisoned_all)


def test_a_worker_that_alone_is_not_finite_is_named_and_leaves(tmp_path: Path) -> None:
    with OnePoisoned(tiny_config(tmp_path / "run", CORPUS), 3) as run:
        run.wait_end()
        run.processes["w1"].join(WAIT_S)
        assert run.processes["w1"].exitcode != 0
        records, events = run.records(), run.events()
    assert [record["step"] for record in records if record["skipped"]] == [5, 6, 7]
    assert [record["step"] for record in records] == list(range(1, 31))
    told = [(e["step"], e["workers"], e["nodes"], e["in_a_row"]) for e in events if e["event"] == "not_finite"]
    assert told == [(5, ["w1"], ["n1"], 1), (6, ["w1"], ["n1"], 2), (7, ["w1"], ["n1"], 3)]
    (faulty,) = [event for event in events if event["event"] == "worker_faulty"]
    assert (faulty["worker"], faulty["node"], faulty["step"]) == ("w1", "n1", 7)
    assert {record["world_size"] for record in records[8:]} == {2}
    assert all(math.isfinite(record["loss"]) for record in records)


def test_a_run_that_diverged_ends_with_its_state_saved(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", CORPUS)
    with AllPoisoned(replace(config, optim=replace(config.optim, max_skipped=4)), 2) as run:
        for process in run.processes.values():
            process.join(4 * WAIT_S)
            assert process.exitcode == 1
        run.wait("the records", lambda status: status["step"] == 11)
        run.coordinator.close()
        assert find_checkpoint(str(run.dir / "checkpoints")).step == 11
        assert [record["step"] for record in run.records() if record["skipped"]] == [8, 9, 10, 11]
