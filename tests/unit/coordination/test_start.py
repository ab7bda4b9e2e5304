"""A start touches nothing of another run, and never takes absence for an empty run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elastic_moe.checkpoint.identity import RunIdentity, write_identity
from elastic_moe.checkpoint.shards import write_shard
from elastic_moe.checkpoint.storage import Storage
from elastic_moe.checkpoint.writer import write_manifest
from elastic_moe.config.schema import CheckpointConfig, RunConfig, TrainConfig
from elastic_moe.coordination.start import check_start, look
from elastic_moe.errors import UserError
from elastic_moe.run_dir import METRICS, step_dir


def _config(tmp_path: Path, name: str = "run", resume: str = "auto", root: str = "", overwrite: bool = False):
    run = RunConfig(dir=str(tmp_path / name), resume=resume, overwrite=overwrite)
    return TrainConfig(run=run, checkpoint=CheckpointConfig(dir=root and str(tmp_path / root)))


def _made(config: TrainConfig, root: Path, old: bool = False, first: int = 10) -> None:
    """A run with records and one checkpoint, or none with `first` 0; `old`: of a version without identities."""
    run_dir = Path(config.run.dir)
    run_dir.mkdir()
    (run_dir / METRICS).write_text('{"step": 1}\n')
    identity = replace(RunIdentity.new(str(run_dir)), first_checkpoint=first)
    if not old:
        for place in (run_dir, root):
            write_identity(Storage(str(place)), identity)
    if first:
        shard = write_shard(str(root), first, "r0", {"a/weight": torch.ones(2)})
        write_manifest(str(root), first, [shard], {} if old else identity.meta())


def _refused(config: TrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        check_start(config, look(config))
    return str(caught.value)


@pytest.mark.parametrize("old", [False, True])
def test_records_without_a_checkpoint_end_the_start(tmp_path: Path, old: bool) -> None:
    config = _config(tmp_path, root="root")
    _made(config, tmp_path / "root", old)
    check_start(config, look(config))
    forgotten = _config(tmp_path)
    assert "no readable checkpoint" in _refused(forgotten)
    assert not (tmp_path / "run" / "checkpoints").exists()
    (tmp_path / "root" / step_dir(10) / "manifest.json").unlink()
    assert "no readable checkpoint" in _refused(config)
    (tmp_path / "root").rename(tmp_path / "unmounted")
    assert "no readable checkpoint" in _refused(config)


def test_a_run_that_died_before_its_first_checkpoint_may_begin_anew(tmp_path: Path) -> None:
    config = _config(tmp_path, root="root")
    _made(config, tmp_path / "root", first=0)
    check_start(config, look(config))
    assert "no readable checkpoint" in _refused(_config(tmp_path, root="elsewhere"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_the_root_of_another_run_is_refused(tmp_path: Path, old: bool, overwrite: bool) -> None:
    _made(_config(tmp_path, "one", root="root"), tmp_path / "root", old)
    sentence = _refused(_config(tmp_path, "two", "never", "root", overwrite))
    assert "another run" in sentence
    if not old:
        assert "another run" in _refused(_config(tmp_path, "two", "auto", "root"))


def test_overwriting_is_of_the_runs_own(tmp_path: Path) -> None:
    config = _config(tmp_path, resume="never", root="root", overwrite=True)
    _made(config, tmp_path / "root")
    check_start(config, look(config))
    assert "run.resume=auto" in _refused(_config(tmp_path, resume="never", root="root"))


def test_storage_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file")
    with pytest.raises(UserError, match="cannot be read"):
        look(_config(tmp_path, root="root"))


def test_a_fresh_start(tmp_path: Path) -> None:
    for resume in ("never", "auto"):
        check_start(_config(tmp_path, resume=resume), look(_config(tmp_path, resume=resume)))
    assert not list(tmp_path.iterdir())
