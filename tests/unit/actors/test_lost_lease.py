"""A driver whose directory another process has taken over ends its run at once, and asks for nothing more."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic_moe.actors import driver
from elastic_moe.actors.outcome import Ended
from elastic_moe.actors.stop import Stop
from elastic_moe.config.schema import RunConfig, TrainConfig
from elastic_moe.coordination.lease import Lease, lost


class Bar:
    """A progress bar that shows nothing."""

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_the_run_ends_without_a_save_and_tells_which_directory_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, taken = Lease(str(tmp_path / "run"), "run.dir"), Lease(str(tmp_path / "root"), "checkpoint.dir")
    shown, submitted, ended, killed = list[int](), list[Any](), list[str](), list[Any]()
    trains, concluded = threading.Event(), list[Ended]()
    close = SimpleNamespace(remote=lambda: "closed")
    coordinator = SimpleNamespace(close=close)

    def show(*_: Any) -> None:
        shown.append(1)
        taken.lost = len(shown) == 2

    def conclude(run: Ended) -> int:
        concluded.append(run)
        return 1

    monkeypatch.setattr(driver, "start_coordinator", lambda *_: coordinator)
    monkeypatch.setattr(driver, "CoordinatorLink", lambda _: SimpleNamespace(submit=submitted.append))
    monkeypatch.setattr(driver, "ray", SimpleNamespace(get=lambda value, timeout: value, kill=killed.append))
    monkeypatch.setattr(driver, "tqdm", lambda **_: Bar())
    monkeypatch.setattr(driver, "end_all", ended.append)
    monkeypatch.setattr(driver, "conclude", conclude)
    monkeypatch.setattr(driver, "POLL_S", 0.0)
    monkeypatch.setattr(driver._Driver, "_fit", lambda _: trains.wait())
    monkeypatch.setattr(driver._Driver, "_show", show)
    config = TrainConfig(run=RunConfig(dir=str(tmp_path)))
    try:
        run = driver._Driver("name", config, cast(Any, None), cast(Any, None), Stop(), (held, taken))
        assert run.run() == 1
    finally:
        trains.set()
    assert len(shown) == 2, "it goes on while it holds both, and no longer"
    assert submitted == [], "no save is asked for in a directory of another process"
    assert (ended, killed) == (["name"], [coordinator])
    assert f"another process has taken over checkpoint.dir={tmp_path}/root" in str(concluded[0].error)


def test_no_sentence_while_all_leases_are_held(tmp_path: Path) -> None:
    assert lost([Lease(str(tmp_path / name), name) for name in "ab"]) == ""
