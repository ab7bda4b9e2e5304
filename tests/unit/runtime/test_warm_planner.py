"""Who compiles the planner, who waits, and what is said."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from elastic_moe.runtime import warm_planner
from elastic_moe.runtime.warm_planner import READY, REASON, warm_up


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which no process has compiled yet. (The machine code itself is where it was.)"""
    monkeypatch.setattr(warm_planner, "cache_dir", lambda: tmp_path)
    return tmp_path


def test_the_first_process_says_that_it_compiles_and_later_ones_say_nothing(fresh: Path) -> None:
    told: list[str] = []
    for _ in range(3):
        warm_up(told.append)
    assert told == [REASON]
    assert (fresh / READY).exists()


def test_one_that_waited_for_another_says_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(warm_planner, "lock", lambda *_: (fresh / READY).touch())
    warm_up(told.append)
    assert told == []


def test_a_process_that_never_gives_the_lock_back_is_not_waited_for_for_ever(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_planner, "LOCK_S", 0.3)
    told: list[str] = []
    with (fresh / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        warm_up(told.append)
    assert told == [REASON]
