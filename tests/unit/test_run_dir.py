"""The names in a run directory."""

from pathlib import Path

import pytest

from elastic_moe.config.schema import CheckpointConfig, RunConfig, TrainConfig
from elastic_moe.run_dir import checkpoint_root, step_dir, step_of


@pytest.mark.parametrize("step", [0, 7, 99_999_999, 100_000_000])
def test_a_step_directory_gives_its_step_back(step: int) -> None:
    assert step_of(step_dir(step)) == step


@pytest.mark.parametrize("name", ["step_1", "step_0000000x", ".step_00000001", "step_00000001.tmp", "manifest.json"])
def test_another_name_is_no_step(name: str) -> None:
    assert step_of(name) is None


def test_checkpoints_lie_in_the_run_directory_unless_another_place_is_named() -> None:
    config = TrainConfig(run=RunConfig(dir="/runs/a"))
    assert checkpoint_root(config) == "/runs/a/checkpoints"
    assert checkpoint_root(config, Path("/moved")) == "/moved/checkpoints"
    elsewhere = TrainConfig(run=RunConfig(dir="/runs/a"), checkpoint=CheckpointConfig(dir="s3://bucket/a"))
    assert checkpoint_root(elsewhere) == checkpoint_root(elsewhere, Path("/moved")) == "s3://bucket/a"
