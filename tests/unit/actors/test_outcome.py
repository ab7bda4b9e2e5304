"""The exit code of a run and its last lines: whether the last state is saved is looked up, and told."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from elastic_moe.actors.outcome import Ended, conclude
from elastic_moe.actors.stop import Stop
from elastic_moe.checkpoint.manifest import ShardInfo
from elastic_moe.checkpoint.writer import write_manifest
from elastic_moe.config.schema import RunConfig, TrainConfig
from elastic_moe.errors import StorageFailed, UserError

STEPS = 5
ONCE = Stop(signal.SIGTERM, 1)
TWICE = Stop(signal.SIGINT, 2)


class WorkerError(RuntimeError):
    """As Ray Train raises it."""

    def __init__(self, failure: Exception) -> None:
        super().__init__("a worker failed")
        self.worker_failures = {0: failure}


def ended(
    root: Path,
    step: int,
    saved: int = 0,
    stop: Stop | None = None,
    error: Exception | None = None,
    phase: str = "finished",
) -> Ended:
    """A run that has committed `step` steps, and has a checkpoint of step `saved`."""
    records = [{"step": number, "loss": 1.0, "generation": 1, "world_size": 2} for number in range(1, step + 1)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "events.jsonl").write_text("")
    if saved:
        write_manifest(str(root / "checkpoints"), saved, list[ShardInfo](), {"seed": 0})
    config = TrainConfig(run=RunConfig(dir=str(root), steps=STEPS))
    return Ended(config, stop or Stop(), error, {"phase": phase, "reason": "no reason"})


def test_all_steps_and_their_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conclude(ended(tmp_path, STEPS, saved=STEPS)) == 0
    assert capsys.readouterr().out.startswith(f"{STEPS} steps, loss 1.0000")


@pytest.mark.parametrize(("step", "stop"), [(STEPS, Stop()), (3, ONCE)])
def test_a_last_state_that_is_not_saved_is_an_exit_code_of_its_own(tmp_path: Path, step: int, stop: Stop) -> None:
    with pytest.raises(StorageFailed, match=f"after step {step} is not saved") as caught:
        conclude(ended(tmp_path, step, saved=2, stop=stop))
    assert caught.value.exit_code == 3


def test_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conclude(ended(tmp_path, 3, saved=3, stop=ONCE)) == 143
    assert capsys.readouterr().out == f"stopped after step 3 of {STEPS}; go on with run.resume=auto\n"
    (tmp_path / "new").mkdir()
    assert conclude(ended(tmp_path / "new", 0, stop=ONCE)) == 143, "before the first step there is nothing to save"


def test_ended_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conclude(ended(tmp_path, 3, saved=2, stop=TWICE, phase="running")) == 130
    assert "stopped after step 3" in (out := capsys.readouterr().out)
    assert "the state after step 3 is not saved" in out


def test_a_run_that_fails_while_it_stops_has_failed_unless_its_state_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = RuntimeError("no answer")
    assert conclude(ended(tmp_path, 3, saved=2, stop=ONCE, error=error, phase="failed")) == 1
    assert "failed after step 3 of 5: no answer; the state after step 3 is not saved" in capsys.readouterr().err
    assert conclude(ended(tmp_path, 3, saved=3, stop=ONCE, error=error, phase="failed")) == 143


def test_a_failed_run_tells_whether_its_state_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conclude(ended(tmp_path, 3, saved=3, phase="failed")) == 1
    assert capsys.readouterr().err == "failed after step 3 of 5: no reason; the state after step 3 is saved\n"
    bad = WorkerError(UserError("data.corpus: no such file"))
    with pytest.raises(UserError, match="no such file"):
        conclude(ended(tmp_path, 4, saved=3, error=bad, phase="failed"))
    assert "data.corpus: no such file; the state after step 4 is not saved" in capsys.readouterr().err


def test_a_failure_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray's errors bring many lines about the process that died."""
    error = RuntimeError("The actor died unexpectedly\n\tclass_name: Controller\n\tpid: 12")
    assert conclude(ended(tmp_path, 3, saved=3, error=error)) == 1
    said = capsys.readouterr().err
    assert "The actor died unexpectedly; the state after step 3 is saved" in said
    assert "class_name" not in said
