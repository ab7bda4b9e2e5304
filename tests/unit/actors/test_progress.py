"""The lines of a job's log: progress now and then, and what a run waits for, more and more rarely."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from elastic_moe.actors.progress import Progress
from elastic_moe.plan.batch_sizes import RunLength

WAITING = {"phase": "waiting", "reason": "waiting for workers", "workers": 1, "paused": False}
RUNNING = WAITING | {"phase": "running"}


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def record(step: int) -> dict[str, Any]:
    return {"step": step, "time": 2.0 * step, "loss": 3.0, "tokens_per_s": 1234.5, "world_size": 2, "generation": 1}


def test_a_line_about_the_progress_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(RunLength(100), 30.0, str, clock) as shown:
        for step in range(1, 41):
            clock.now_s = 2.0 * step
            shown.records([record(step)])
            shown.records([])
    assert capsys.readouterr().err.splitlines() == [
        "step 15 of 100: loss 3.0000, 1,234 tokens/s, 2 workers, 2 min 50 s left",
        "step 30 of 100: loss 3.0000, 1,234 tokens/s, 2 workers, 2 min 20 s left",
    ]


def test_no_line_where_none_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(RunLength(100), 0.0, str, clock) as shown:
        clock.now_s = 1000.0
        shown.records([record(1), record(2)])
    assert capsys.readouterr().err == ""


def test_waiting_is_told_after_ten_seconds_and_then_more_and_more_rarely(capsys: pytest.CaptureFixture[str]) -> None:
    clock, told = Clock(), list[float]()
    with Progress(RunLength(100), 30.0, lambda: "two are missing", clock) as shown:
        for second in range(4000):
            clock.now_s = float(second)
            shown.status(WAITING)
            if line := capsys.readouterr().err:
                told.append(second)
                assert line.startswith("waiting for ")
                assert line.endswith(": waiting for workers; 1 workers are here; two are missing\n")
        shown.status(RUNNING)
        clock.now_s += 9.0
        shown.status(WAITING)
        assert capsys.readouterr().err == "", "it waits anew"
    assert told == [10, 20, 40, 80, 160, 320, 640, 1240, 1840, 2440, 3040, 3640]


def test_a_pause_is_no_waiting(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(RunLength(100), 30.0, str, clock) as shown:
        for second in range(100):
            clock.now_s = float(second)
            shown.status(WAITING | {"paused": True})
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    """Says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows the same as a line, and lines stand above it. A resumed run begins with its step."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    with Progress(RunLength(10_000), 1.0, str) as shown:
        shown.records([record(5000), record(5001)])
        shown.line("a worker died")
    assert "a worker died\n" in terminal.getvalue()
    assert "| step 5001 of 10000, loss 3.0000, 1,234 tokens/s, 2 workers, 2 h 46 min left" in terminal.getvalue()
