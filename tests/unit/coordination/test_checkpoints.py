"""The checkpoint book completes a checkpoint once every unit is written, and survives storage that fails."""

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


def test_completes_retains_and_falls_back(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    root = str(tmp_path)
    book = CheckpointCommitter(root, 2, ["a", "b", "c"], {"seed": 1}, events.append)
    for step in (10, 20, 30):
        book.add(_write(root, step, ["a", "b"], "r0"))
        book.add(_write(root, step, ["c"], "r1"))
        book.add(_write(root, step, ["c"], "r1"))  # told twice
    book.add(_write(root, 40, ["a", "b"], "r0"))  # never completed
    book.close()
    assert [(event["event"], event["step"]) for event in events] == [("checkpoint", s) for s in (10, 20, 30)]
    manifest = find_latest(root)
    assert manifest is not None and manifest.step == 30 and manifest.meta["generation"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020", "step_00000030", "step_00000040"]

    book = CheckpointCommitter(root, 2, ["a", "b", "c"], {}, events.append)
    book.roll_back_to(20)
    book.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020"]


def test_a_vanished_shard_is_reported_and_leaves_no_manifest(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    book = CheckpointCommitter(str(tmp_path), 2, ["a"], {}, events.append)
    book.add({"step": 5, "file": "r0.safetensors", "bytes": 7, "sha256": "0", "units": ["a"]})
    book.close()
    assert [event["event"] for event in events] == ["checkpoint_failed"]
    assert find_latest(str(tmp_path)) is None
