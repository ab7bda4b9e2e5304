"""`elastic-moe checkpoint` on real files: what it lists, finds damaged, compares and removes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from elastic_moe.checkpoint.identity import RunIdentity, read_identity, write_identity
from elastic_moe.checkpoint.reader import find_latest
from elastic_moe.checkpoint.shards import write_shard
from elastic_moe.checkpoint.storage import Storage
from elastic_moe.checkpoint.writer import write_manifest
from elastic_moe.cli.checkpoint import main
from elastic_moe.config.schema import CheckpointConfig, RunConfig, TrainConfig
from elastic_moe.coordination.lease import Lease
from elastic_moe.run_dir import CONFIG, step_dir


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


def test_rewind_goes_back_only_to_what_is_whole_and_only_if_told(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert main(["rewind", str(run), "10", "--yes"]) == 2
    assert "no run directory" in capsys.readouterr().err
    config = TrainConfig(run=RunConfig(dir="elsewhere"), checkpoint=CheckpointConfig(dir=str(root)))
    OmegaConf.save(OmegaConf.structured(config), run / CONFIG)
    identity = read_identity(Storage(str(root)))
    assert identity is not None
    write_identity(Storage(str(run)), replace(identity, run_dir="moved since"))
    for step in ("30", "40"):
        assert main(["rewind", str(run), step, "--yes"]) == 2
        assert "has no complete checkpoint of step" in capsys.readouterr().err
    assert main(["rewind", str(run), "20", "--yes"]) == 0
    assert "is the newest checkpoint" in capsys.readouterr().out
    assert main(["rewind", str(run), "10"]) == 0
    assert capsys.readouterr().out == "--yes would take the run back to step 10; abandoned: 20\n"
    found = find_latest(str(root))
    assert found is not None
    assert found.step == 20
    with Lease(str(run), "run.dir"):
        assert main(["rewind", str(run), "10", "--yes"]) == 2
    capsys.readouterr()
    (shard,) = (root / step_dir(10)).glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(["rewind", str(run), "10", "--yes"]) == 2, "it is damaged"
    shard.write_bytes(whole)
    assert main(["rewind", str(run), "10", "--yes"]) == 0
    found = find_latest(str(root))
    assert found is not None
    assert found.step == 10
    identities = [read_identity(Storage(str(place))) for place in (run, root)]
    assert identities[0] == identities[1] is not None
    assert identities[0].forks == ((2, 20), (3, 10))
    other = RunIdentity.new("another")
    write_identity(Storage(str(root)), other)
    assert main(["rewind", str(run), "10", "--yes"]) == 2
    assert "of another run" in capsys.readouterr().err
    assert read_identity(Storage(str(root))) == other


def test_no_directory_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(tmp_path / "none")]) == 2
    assert "no directory" in capsys.readouterr().err
    assert main(["diff", str(tmp_path), str(tmp_path)]) == 2
