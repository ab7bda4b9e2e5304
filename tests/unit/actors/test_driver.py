"""The settings that Ray Train is given, which its dashboard shows to anyone."""

from __future__ import annotations

import inspect
from pathlib import Path

from elastic_moe.actors import driver
from elastic_moe.data.prepare import prepare
from tests.local_run import tiny_config


def test_the_token_is_in_nothing_that_ray_train_shows(tmp_path: Path) -> None:
    """The trainer is made without the token, so neither its settings nor a log of them can have it."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    config = tiny_config(tmp_path / "run", corpus)
    trainer = driver.make_trainer(config, prepare(config.data, tmp_path / "cache"), "name")
    assert trainer.train_loop_config is not None
    assert set(trainer.train_loop_config) == {"config", "find", "prepared"}
    assert "token" not in inspect.signature(driver.make_trainer).parameters
