"""The settings that Ray Train is given, which its dashboard shows to anyone; and the last save after an error."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import pytest

from elastic_moe.actors import driver, fit
from elastic_moe.actors.stop import Stop
from elastic_moe.config.schema import RunConfig, TrainConfig
from elastic_moe.data.prepare import prepare
from elastic_moe.run_log import TEXT, RunLog
from tests.local_run import tiny_config


def test_the_token_is_in_nothing_that_ray_train_shows(tmp_path: Path) -> None:
    """The trainer is made without the token, so neither its settings nor a log of them can have it."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    config = tiny_config(tmp_path / "run", corpus)
    trainer = fit.make_trainer(config, prepare(config.data, tmp_path / "cache"), "name")
    assert trainer.train_loop_config is not None
    assert set(trainer.train_loop_config) == {"config", "find", "prepared"}
    assert "token" not in inspect.signature(fit.make_trainer).parameters


class Link:
    """A coordinator whose run is over after some answers."""

    def __init__(self, answers: int) -> None:
        self.submitted: list[dict[str, Any]] = []
        self.answers = answers

    def forget(self) -> None:
        pass

    def submit(self, event: dict[str, Any]) -> None:
        self.submitted.append(event)

    def poll(self) -> dict[str, Any]:
        self.answers -= 1
        return {"phase": "waiting" if self.answers > 0 else "failed"}


def save_last(tmp_path: Path, error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> Link:
    monkeypatch.setattr(driver, "POLL_S", 0.0)
    config, link = TrainConfig(run=RunConfig(dir=str(tmp_path))), Link(answers=3)
    run = driver._Driver("name", config, cast(Any, None), Stop(), (), RunLog(TEXT, "run"), error)
    run._save_last(cast(Any, link))
    return link


def test_after_an_error_of_the_driver_the_members_save_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = save_last(tmp_path, OSError("no space left for the display\nand more"), monkeypatch)
    assert link.submitted == [{"event": "fail", "reason": "no space left for the display"}]
    assert link.answers == 0, "it waits until the run is over"


def test_nothing_is_asked_for_without_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert save_last(tmp_path, None, monkeypatch).submitted == []
