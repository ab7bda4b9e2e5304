"""Only what a killed start of the same run left unfinished is removed, and only once nobody can be writing it."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import pytest
import torch

from elastic_moe.checkpoint.identity import RunIdentity, write_identity
from elastic_moe.checkpoint.reader import find_latest
from elastic_moe.checkpoint.shards import write_shard
from elastic_moe.checkpoint.storage import TIMEOUT_S, Storage
from elastic_moe.checkpoint.sweep import sweep
from elastic_moe.checkpoint.writer import write_manifest
from elastic_moe.run_dir import LEASE, RUN, step_dir

FOREIGN = (".hidden.tmp", "notes.tmp", ".probe-x", "step_5/.keep")


def age(path: Path, seconds: float) -> None:
    then_s = time.time() - seconds
    os.utime(path, (then_s, then_s))


def shard(root: Path, step: int) -> Path:
    info = write_shard(str(root), step, "g00001-r00000", {"u/weight": torch.ones(3)})
    if step == 10:
        write_manifest(str(root), step, [info])
    return root / step_dir(step) / info.file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a checkpoint, an unfinished one, temporary files, and files of others."""
    write_identity(Storage(str(tmp_path)), RunIdentity("ours"))
    (tmp_path / LEASE).write_text("{}")
    shard(tmp_path, 10), shard(tmp_path, 20)
    for name in (f".{uuid.uuid4().hex}.tmp", f".probe-{uuid.uuid4().hex}", f"{step_dir(10)}/.{uuid.uuid4().hex}.tmp"):
        (tmp_path / name).write_bytes(b"x")
    for name in FOREIGN:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name not in (LEASE, RUN):
            age(path, TIMEOUT_S + 30)
    return tmp_path


def everything(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_what_is_unfinished_and_quiet_is_removed(root: Path) -> None:
    swept = sweep(str(root), "ours")
    assert len(swept.removed) == 4
    assert step_dir(20) in swept.removed
    assert swept.left == ()
    left = everything(root)
    assert not any("probe-" in name and name != ".probe-x" for name in left)
    assert set(FOREIGN) <= set(left)
    assert find_latest(str(root)) is not None
    assert sweep(str(root), "ours").removed == ()


@pytest.mark.parametrize("run", ["another", ""])
def test_nothing_is_touched_in_a_root_of_another_run(root: Path, run: str) -> None:
    before = everything(root)
    assert sweep(str(root), run).removed == ()
    assert everything(root) == before


@pytest.mark.parametrize("damage", ["no run.json", "damaged run.json", "no lease"])
def test_nothing_is_touched_where_the_owner_is_not_known(root: Path, damage: str) -> None:
    name = LEASE if damage == "no lease" else RUN
    (root / name).unlink() if damage.startswith("no") else (root / name).write_bytes(b"{}")
    before = everything(root)
    assert sweep(str(root), "ours").removed == ()
    assert everything(root) == before


def test_what_may_still_be_written_is_left_and_told(root: Path) -> None:
    young = root / step_dir(20) / f".{uuid.uuid4().hex}.tmp"
    young.write_bytes(b"x")
    swept = sweep(str(root), "ours")
    assert swept.left == (step_dir(20),)
    assert young.exists()
    assert len(swept.removed) == 3
