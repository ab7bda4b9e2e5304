"""A checkpoint is completed once every unit is written; storage that fails, and unexpected errors, are reported."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe.checkpoint.identity import RunIdentity
from elastic_moe.checkpoint.reader import find_latest
from elastic_moe.checkpoint.shards import write_shard
from elastic_moe.coordination.checkpoints import CheckpointCommitter
from elastic_moe.coordination.identity import IdentityFiles
from elastic_moe.run_dir import RUN


def _write(root: str, step: int, units: list[str], tag: str, num_units: int = 1) -> dict[str, Any]:
    tensors = {f"{unit}/{field}": torch.full((3,), float(step)) for unit in units for field in ("weight", "m", "v")}
    return {"step": step, "generation": 4, "num_units": num_units, **write_shard(root, step, tag, tensors).as_dict()}


def _identity(tmp_path: Path) -> IdentityFiles:
    return IdentityFiles.open(tmp_path, str(tmp_path))


def _steps(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in root.iterdir() if path.is_dir())


def test_completes_and_retains(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    root = str(tmp_path)
    committer = CheckpointCommitter(root, 2, {"seed": 1}, events.append, _identity(tmp_path))
    for step in (10, 20, 30):
        committer.add(_write(root, step, ["a", "b"], "r0", 3))
        committer.add(_write(root, step, ["c"], "r1", 3))
        committer.add(_write(root, step, ["c"], "r1", 3))  # told twice
    committer.add(_write(root, 40, ["a", "b"], "r0", 3))  # never completed
    committer.close()
    assert [(event["event"], event["step"]) for event in events] == [("checkpoint", s) for s in (10, 20, 30)]
    manifest = find_latest(root)
    assert manifest is not None
    assert (manifest.step, manifest.meta["generation"], manifest.meta["timeline"]) == (30, 4, 1)
    assert _steps(tmp_path) == [20, 30, 40]
    assert _identity(tmp_path).identity.first_checkpoint == 10


def test_reports_that_workers_repeat_to_a_restarted_coordinator_complete_nothing_again(tmp_path: Path) -> None:
    """Else checkpoints that were retired since would count as failed, and those that are there twice."""
    events: list[dict[str, Any]] = []
    root = str(tmp_path)
    shards = [_write(root, step, ["a"], "r0") for step in (10, 20, 30)]
    committer = CheckpointCommitter(root, 1, {}, events.append, _identity(tmp_path))
    for shard in shards:
        committer.add(shard)
    committer.close()
    assert _steps(tmp_path) == [30]
    (newest,) = [(event["generation"], event["step"]) for event in events[-1:]]
    events.clear()
    committer = CheckpointCommitter(root, 1, {}, events.append, _identity(tmp_path), newest)
    for shard in (*shards, _write(root, 40, ["a"], "r0")):
        committer.add(shard)
    committer.close()
    assert [(event["event"], event["step"]) for event in events] == [("checkpoint", 40)]


@pytest.mark.parametrize("lost", ["nothing", "run.json", "a byte of run.json"])
def test_going_back_deletes_nothing_until_the_new_timeline_has_passed(tmp_path: Path, lost: str) -> None:
    """Without run.json the history is read from the manifests, as soon as the new timeline has one."""
    events: list[dict[str, Any]] = []
    root = str(tmp_path)
    committer = CheckpointCommitter(root, 2, {}, events.append, _identity(tmp_path))
    for step in (10, 20, 30):
        committer.add(_write(root, step, ["a"], "r0"))
    late = _write(root, 40, ["a"], "r0")  # of generation 4, which the run leaves
    committer.roll_back_to(20, 5, 0)
    committer.add(late)
    committer.close()
    assert (events[-1]["event"], events[-1]["timeline"], events[-1]["abandoned"]) == ("timeline", 2, [30, 40])
    assert _steps(tmp_path) == [20, 30, 40]
    found = find_latest(root)
    assert found is not None
    assert found.step == 20
    files = _identity(tmp_path)
    files.begin_start()
    committer = CheckpointCommitter(root, 2, {}, events.append, files)
    committer.add(_write(root, 25, ["a"], "r0"))
    committer.close()
    if lost == "run.json":
        (tmp_path / RUN).unlink()
    elif lost != "nothing":
        (tmp_path / RUN).write_bytes((tmp_path / RUN).read_bytes().replace(b'"timeline": 2', b'"timeline": 3'))
    found = find_latest(root)
    assert found is not None
    assert found.step == 25
    assert _steps(tmp_path) == [20, 25, 30, 40]
    committer = CheckpointCommitter(root, 2, {}, events.append, IdentityFiles(tmp_path, root, _last(root)))
    committer.add(_write(root, 30, ["a"], "r1"))
    committer.add(_write(root, 50, ["a"], "r0"))
    committer.close()
    assert _steps(tmp_path) == [30, 40, 50]
    found = find_latest(root)
    assert found is not None
    assert (found.step, found.meta["timeline"]) == (50, 2)


def _last(root: str) -> RunIdentity:
    found = find_latest(root)
    assert found is not None
    return RunIdentity.of_meta(found.meta)


def test_a_vanished_shard_is_reported_and_leaves_no_manifest(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    committer = CheckpointCommitter(str(tmp_path), 2, {}, events.append, _identity(tmp_path))
    committer.add({"step": 5, "file": "r0.safetensors", "bytes": 7, "sha256": "0", "units": ["a"]})
    committer.close()
    assert [event["event"] for event in events] == ["checkpoint_failed"]
    assert find_latest(str(tmp_path)) is None


def test_an_unexpected_error_is_reported_and_the_next_checkpoint_completes(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    root = str(tmp_path)
    committer = CheckpointCommitter(root, 2, {}, events.append, _identity(tmp_path))
    committer.add({"step": 5, "file": "r0.safetensors"})  # a report without the units
    committer.add(_write(root, 10, ["a"], "r0"))
    committer.close()
    assert [(event["event"], event["step"]) for event in events] == [("checkpoint_failed", 5), ("checkpoint", 10)]
    assert "KeyError" in events[0]["reason"]


def test_a_report_that_fails_does_not_end_the_thread(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []

    def report(event: dict[str, Any]) -> None:
        if event["step"] == 10:
            raise RuntimeError("the log is broken")
        events.append(event)

    root = str(tmp_path)
    committer = CheckpointCommitter(root, 2, {}, report, _identity(tmp_path))
    committer.add(_write(root, 10, ["a"], "r0"))
    committer.add(_write(root, 20, ["a"], "r0"))
    committer.close()
    assert [(event["event"], event["step"]) for event in events] == [("checkpoint", 20)]


def test_shards_that_are_written_again_complete_a_checkpoint_whose_manifest_failed(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    root = str(tmp_path)
    report = _write(root, 10, ["a"], "r0")
    path = tmp_path / "step_00000010" / report["file"]
    path.rename(tmp_path / "away")
    failed = threading.Event()

    def note(event: dict[str, Any]) -> None:
        events.append(event)
        failed.set()

    committer = CheckpointCommitter(root, 2, {}, note, _identity(tmp_path))
    committer.add(report)
    assert failed.wait(60)
    (tmp_path / "away").rename(path)
    committer.add(report)
    committer.close()
    assert [event["event"] for event in events] == ["checkpoint_failed", "checkpoint"]


def test_shards_that_a_timeline_left_behind_complete_nothing_when_they_are_told_to_a_restarted_coordinator(
    tmp_path: Path,
) -> None:
    """Workers repeat their last reports. The checkpoint would count as one of the new timeline, with its old state."""
    root = str(tmp_path)
    committer = CheckpointCommitter(root, 9, {}, lambda _: None, _identity(tmp_path))
    whole = [_write(root, 10, ["a", "b"], "r0", 2)]
    left = [_write(root, 20, ["a"], "r0", 2), _write(root, 20, ["b"], "r1", 2)]
    committer.add(whole[0])
    committer.add(left[0])
    committer.roll_back_to(10, 5, 3)
    committer.close()
    committer = CheckpointCommitter(root, 9, {}, lambda _: None, _identity(tmp_path))
    for report in whole + left:
        committer.add(report)
    new = _write(root, 15, ["a", "b"], "r0", 2) | {"generation": 5}
    committer.add(new)
    committer.close()
    found = find_latest(root)
    assert found is not None
    assert found.step == 15
    assert not (tmp_path / "step_00000020" / "manifest.json").exists()


def test_generations_of_an_earlier_start_tell_nothing_about_those_of_a_new_one(tmp_path: Path) -> None:
    root = str(tmp_path)
    committer = CheckpointCommitter(root, 9, {}, lambda _: None, _identity(tmp_path))
    committer.roll_back_to(10, 5, 3)
    committer.close()
    files = _identity(tmp_path)
    files.begin_start()
    for identity in (files, _identity(tmp_path)):  # of this coordinator, and of one after it
        committer = CheckpointCommitter(root, 9, {}, lambda _: None, identity)
        committer.add(_write(root, 20, ["a"], "r0"))
        committer.close()
        found = find_latest(root)
        assert found is not None
        assert found.step == 20
