"""A checkpoint is completed once every unit is written; storage that fails, and unexpected errors, are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from elastic_moe.checkpoint.reader import find_latest
from elastic_moe.checkpoint.writer import write_shard
from elastic_moe.coordination.checkpoints import CheckpointCommitter


def _write(root: str, step: int, units: list[str], tag: str) -> dict[str, Any]:
    tensors = {f"{unit}/{field}": torch.full((3,), float(step)) for unit in units for field in ("weight", "m", "v")}
    return {"step": step, "generation": 4, **write_shard(root, step, tag, tensors).as_dict()}


def test_completes_retains_and_rolls_back(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    root = str(tmp_path)
    committer = CheckpointCommitter(root, 2, ["a", "b", "c"], {"seed": 1}, events.append)
    for step in (10, 20, 30):
        committer.add(_write(root, step, ["a", "b"], "r0"))
        committer.add(_write(root, step, ["c"], "r1"))
        committer.add(_write(root, step, ["c"], "r1"))  # told twice
    committer.add(_write(root, 40, ["a", "b"], "r0"))  # never completed
    committer.close()
    assert [(event["event"], event["step"]) for event in events] == [("checkpoint", s) for s in (10, 20, 30)]
    manifest = find_latest(root)
    assert manifest is not None
    assert (manifest.step, manifest.meta["generation"]) == (30, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020", "step_00000030", "step_00000040"]

    committer = CheckpointCommitter(root, 2, ["a", "b", "c"], {}, events.append)
    committer.roll_back_to(20)
    committer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020"]


def test_a_vanished_shard_is_reported_and_leaves_no_manifest(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    committer = CheckpointCommitter(str(tmp_path), 2, ["a"], {}, events.append)
    committer.add({"step": 5, "file": "r0.safetensors", "bytes": 7, "sha256": "0", "units": ["a"]})
    committer.close()
    assert [event["event"] for event in events] == ["checkpoint_failed"]
    assert find_latest(str(tmp_path)) is None


def test_an_unexpected_error_is_reported_and_the_next_checkpoint_completes(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    root = str(tmp_path)
    committer = CheckpointCommitter(root, 2, ["a"], {}, events.append)
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
    committer = CheckpointCommitter(root, 2, ["a"], {}, report)
    committer.add(_write(root, 10, ["a"], "r0"))
    committer.add(_write(root, 20, ["a"], "r0"))
    committer.close()
    assert [(event["event"], event["step"]) for event in events] == [("checkpoint", 20)]
