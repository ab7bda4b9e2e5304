"""The coordinator's watch over its driver, with a run of plain values: it is stopped, else it fails, and ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from elastic_moe.actors import driver_watcher
from elastic_moe.actors.driver_watcher import REASON, DriverWatcher


class Run:
    """A run that is over once it was asked for one of these ends."""

    def __init__(self, *ends: str, broken: bool = False) -> None:
        self._ends, self._broken = ends, broken
        self.asked: list[str] = []
        self.closed = False

    def submit(self, request: dict[str, Any]) -> None:
        assert request["reason"] == REASON
        if self._broken:
            raise OSError("no space left")
        self.asked.append(request["event"])

    def status(self) -> dict[str, Any]:
        over = bool(set(self.asked) & set(self._ends))
        return {"phase": "finished" if over else "running", "workers": 0 if over else 2}

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_watcher, "POLL_S", 0.01)
    monkeypatch.setattr(driver_watcher, "LEAVE_S", 0.05)


def watch(run: Run, dead: Callable[[], bool]) -> list[str]:
    """The names that were ended when the watch is over."""
    ended: list[str] = []
    watcher = DriverWatcher("name", run, 0.05, dead, ended.append)
    watcher.start()
    watcher.join(60)
    assert not watcher.is_alive()
    return ended


def test_the_run_of_a_dead_driver_is_stopped_and_all_of_it_ends() -> None:
    answers = iter([False, False, True])
    run = Run("stop")
    assert watch(run, lambda: next(answers)) == ["name"]
    assert run.asked == ["stop"]
    assert run.closed
    assert not list(answers), "it was watched until then"


def test_a_run_that_does_not_stop_fails_and_one_that_does_not_fail_ends_nevertheless() -> None:
    run = Run("fail")
    assert watch(run, lambda: True) == ["name"]
    assert run.asked == ["stop", "fail"]
    assert run.closed
    assert watch(Run(), lambda: True) == ["name"]


def test_an_error_on_the_way_leaves_nothing_behind() -> None:
    run = Run(broken=True)
    assert watch(run, lambda: True) == ["name"]


def test_a_head_that_does_not_answer_is_asked_again() -> None:
    answers = iter([OSError("away"), True])

    def dead() -> bool:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert watch(Run("stop"), dead) == ["name"]


def test_a_driver_that_closes_the_run_ends_it_itself() -> None:
    ended: list[str] = []
    run = Run("stop")
    watcher = DriverWatcher("name", run, 0.05, lambda: False, ended.append)
    watcher.start()
    time.sleep(0.05)
    watcher.close()
    watcher.join(60)
    assert not watcher.is_alive()
    assert (ended, run.asked, run.closed) == ([], [], False)
