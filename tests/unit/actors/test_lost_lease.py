"""A driver whose directory another process has taken over ends its run, and writes nothing more."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic_moe.actors import driver
from elastic_moe.actors.stop import Stop
from elastic_moe.actors.take_over import TAKES_OVER
from elastic_moe.config.schema import RunConfig, TrainConfig
from elastic_moe.coordination.lease import Lease, lost
from elastic_moe.run_log import TEXT, RunLog


class Bar:
    """A progress bar that shows nothing."""

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def line(self, _text: str) -> None:
        pass


@pytest.mark.parametrize("on_this_cluster", [False, True])
def test_nothing_more_is_written_and_it_is_told_which_directory_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on_this_cluster: bool
) -> None:
    """Where the other start is on this cluster, it lets coordinator and workers save: they are left to it."""
    held, taken = Lease(str(tmp_path / "run"), "run.dir"), Lease(str(tmp_path / "root"), "checkpoint.dir")
    shown, submitted, ended, killed = list[int](), list[Any](), list[str](), list[Any]()
    trains = threading.Event()
    closed, status = list[int](), {"reason": TAKES_OVER if on_this_cluster else "join"}
    begun = SimpleNamespace(remote=lambda: ("127.0.0.1", 1))
    coordinator = SimpleNamespace(address=begun, close=SimpleNamespace(remote=lambda: closed.append(1)))
    link = SimpleNamespace(submit=submitted.append, poll=lambda: status, forget=lambda: None, is_gone=False)

    def show(*_: Any) -> None:
        shown.append(1)
        taken.lost = len(shown) == 2

    monkeypatch.setattr(driver, "start_coordinator", lambda *_: coordinator)
    monkeypatch.setattr(driver, "CoordinatorLink", lambda _: link)
    monkeypatch.setattr(driver, "ray", SimpleNamespace(get=lambda value, timeout=None: value, kill=killed.append))
    monkeypatch.setattr(driver, "Progress", lambda *_, **__: Bar())
    monkeypatch.setattr(driver, "end_all", ended.append)
    monkeypatch.setattr(driver, "HAND_OVER_S", 0.1)
    monkeypatch.setattr(driver, "POLL_S", 0.0)
    monkeypatch.setattr(driver._Driver, "_fit", lambda _: trains.wait())
    monkeypatch.setattr(driver._Driver, "_show", show)
    config = TrainConfig(run=RunConfig(dir=str(tmp_path)))
    try:
        run = driver._Driver("name", config, cast(Any, None), Stop(), (held, taken), RunLog(TEXT, "run"))
        assert run.run() == 1
    finally:
        trains.set()
    assert len(shown) == 2, "it goes on while it holds both, and no longer"
    assert submitted == [], "no save is asked for in a directory of another process"
    assert (ended, killed) == (([], []) if on_this_cluster else (["name"], [coordinator]))
    assert closed == [], "a coordinator that closes completes and removes checkpoints"
    assert f"another process has taken over checkpoint.dir={tmp_path}/root; nothing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "no summary either"


def test_no_sentence_while_all_leases_are_held(tmp_path: Path) -> None:
    assert lost([Lease(str(tmp_path / name), name) for name in "ab"]) == ""
