"""Contract of the internals of Hydra in cli/hydra_internals.py. A failure here means that Hydra has changed them."""

from __future__ import annotations

import sys

import hydra
import pytest

from elastic_moe.cli.hydra_internals import loader_of, parse_flags, split_jobs
from elastic_moe.config.reference import config_dir


def test_the_version_is_the_one_this_was_written_for() -> None:
    assert hydra.__version__.startswith("1.3."), "check cli/hydra_internals.py against this version of Hydra"


def test_flags_have_the_fields_that_train_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "-m", "seed=1,2", "run.steps=3", "--config-name", "other"])
    flags = parse_flags()
    assert flags.multirun is True
    assert flags.config_name == "other"
    assert flags.overrides == ["seed=1,2", "run.steps=3"]
    for name in ("help", "hydra_help", "cfg", "info", "shell_completion", "config_path", "config_dir"):
        assert not getattr(flags, name), name


@pytest.mark.parametrize(("flag", "field"), [("--help", "help"), ("-h", "help"), ("--hydra-help", "hydra_help")])
def test_help_is_a_flag_and_not_an_exit(monkeypatch: pytest.MonkeyPatch, flag: str, field: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train", flag])
    assert getattr(parse_flags(), field) is True


def test_a_sweep_is_the_product_of_its_values() -> None:
    jobs = split_jobs(["seed=1,2", "optim.lr=0.1,0.2", "run.steps=7", "hydra.job.name=x"], loader_of(config_dir(), ""))
    assert jobs == [
        [f"seed={seed}", f"optim.lr={lr}", "run.steps=7"] for seed in (1, 2) for lr in (0.1, 0.2)
    ]  # fmt: skip
