"""`elastic-moe checkpoint` on real files: what it lists, finds damaged, compares and removes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elastic_moe.checkpoint.identity import RunIdentity, write_identity
from elastic_moe.checkpoint.shards import write_shard
from elastic_moe.checkpoint.storage import Storage
from elastic_moe.checkpoint.writer import write_manifest
from elastic_moe.cli.checkpoint import main
from elastic_moe.coordination.lease import Lease
from elastic_moe.run_dir import step_dir


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints 10 and 20, an abandoned one of step 30, and an unfinished one of step 40."""
    identity = RunIdentity.new("run", {"keys": {"optim.lr": 1.0}})
    for step in (10, 20, 30):
        shard = write_shard(
            str(tmp_path), step, "r0", {"a/weight": torch.full((4,), float(step)), "b/weight": torch.ones(1)}
        )
        write_manifest(str(tmp_path), step, [shard], identity.meta() | {"time": 1e9})
    write_shard(str(tmp_path), 40, "r0", {"a/weight": torch.ones(4)})
    write_identity(Storage(str(tmp_path)), identity.forked(20, 2))
    return tmp_path


def test_list_tells_the_state_of_each(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    states = [line.split()[-1] if "complete" in line else line for line in lines]
    assert states[:2] == ["complete", "complete"]
    assert "abandoned" in states[2]
    assert "unfinished" in states[3]


def test_verify_finds_one_changed_byte(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(root)]) == 0
    (shard,) = (root / step_dir(20)).glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["list", str(root)]) == 0
    assert main(["verify", str(root)]) == 1
    assert "damaged" in capsys.readouterr().out


def test_diff_names_what_differs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(root / step_dir(10)), str(root / step_dir(20))]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a: weight changed by 1.00e+00 of its norm",
        "1 of 2 common units have equal weights",
    ]


def test_prune_asks_first_and_spares_what_counts(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in root.glob("step_*"))
    assert main(["prune", str(root)]) == 0
    assert capsys.readouterr().out == "--yes would remove: 30, 40\n"
    with Lease(str(root), "checkpoint.dir"):
        assert main(["prune", str(root), "--yes"]) == 2
    assert sorted(path.name for path in root.glob("step_*")) == before
    assert main(["prune", str(root), "--yes"]) == 0
    assert sorted(path.name for path in root.glob("step_*")) == [step_dir(10), step_dir(20)]
    assert main(["prune", str(root), "--yes"]) == 0


def test_no_directory_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(tmp_path / "none")]) == 2
    assert "no directory" in capsys.readouterr().err
    assert main(["diff", str(tmp_path), str(tmp_path)]) == 2
