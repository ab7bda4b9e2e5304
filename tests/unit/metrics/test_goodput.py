"""The books of a run's time on disk, over coordinators that start again and runs that go back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.metrics import goodput, jsonl
from elastic_moe.metrics.goodput import GoodputLog, account
from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.metrics.recorder import Recorder
from elastic_moe.run_dir import EVENTS, GOODPUT, METRICS
from tests.patience import until


class Run:
    """A run of two workers, with a clock that the test moves. Its coordinator can start again."""

    def __init__(self, run_dir: Path) -> None:
        self.dir, self.now_s, self.generation = run_dir, 1000.0, 0
        self.start(restarted=False)

    def start(self, restarted: bool) -> None:
        self.now_s += 0.5
        self.log = GoodputLog(self.dir, {"default": 36.0}, clock=lambda: self.now_s)
        self.recorder = Recorder(self.dir, clock=lambda: self.now_s, listeners=[self.log])
        self.tell("started", restarted=restarted)

    def tell(self, event: str, **values: Any) -> None:
        self.recorder.event({"event": event, "generation": self.generation, "step": self.recorder.last_step} | values)

    def enter(self) -> None:
        self.generation += 1
        for worker in "ab":
            self.tell("worker_connected", worker=worker, node="n")
            self.tell("worker_ready", worker=worker)
        self.tell("view", members=["a", "b"], planned=True, cause="start")
        self.now_s += 1
        self.tell("entered")

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.now_s += 2
            self.recorder.record({"step": step, "generation": self.generation, "world_size": 2, "held_s": 0.25})

    def wait(self) -> dict[str, Any]:
        """The books once the old lines are read."""
        until(lambda: not self.log._reader.is_alive(), "the old lines are read")
        return self.log.now()

    def die(self) -> None:
        """The coordinator dies: its books have no last line."""
        until(lambda: not self.log._reader.is_alive(), "its thread has ended")
        self.recorder.close()
        self.log._file.close()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    run.die()


def test_a_coordinator_that_starts_again_goes_on_with_the_books(run: Run, tmp_path: Path) -> None:
    run.enter()
    run.steps(1, 50)
    before = run.wait()
    assert before["worker_s"]["training"] == pytest.approx(2 * 50 * 1.75)
    run.die()
    run.start(restarted=True)
    assert run.wait()["worker_s"]["training"] == pytest.approx(2 * 50.25 * 1.75, rel=0.01), "with what is open"
    assert run.wait()["worker_s"]["checkpoint"] == before["worker_s"]["checkpoint"]
    run.enter()
    run.steps(51, 60)
    now = run.wait()
    assert now["worker_s"]["checkpoint"] == pytest.approx(2 * 60 * 0.25)
    assert now["cost"] == pytest.approx((60 * 2 + 2.5) / 3600 * 36, abs=1e-3)
    run.recorder.close()
    run.log.close()
    assert read_jsonl(tmp_path / GOODPUT)[-1] == account(tmp_path, {"default": 36.0}) == now
    run.start(restarted=False)


def test_a_run_that_goes_back_at_once_keeps_its_books(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes records from the end of the file before they are booked; the old lines are read slowly here."""
    run.enter()
    run.steps(1, 40)
    run.die()
    monkeypatch.setattr(goodput, "CHUNK", 1)
    run.start(restarted=False)
    assert run.recorder.set_aside_after(30, 1) == 10
    assert run.log.now() == read_jsonl(tmp_path / GOODPUT)[-1]
    run.enter()
    run.steps(31, 45)
    now = run.wait()
    assert now["worker_s"]["redone"] == pytest.approx(2 * 10 * 1.75)
    assert now["worker_s"]["training"] == pytest.approx(2 * 45 * 1.75)
    assert now == account(tmp_path, {"default": 36.0})


def test_the_lines_of_a_long_run_are_read_from_two_places(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.enter()
    run.steps(1, 40)
    before = run.wait()
    run.die()
    for module in (goodput, jsonl):
        monkeypatch.setattr(module, "END_BYTES", 1000)
    run.start(restarted=True)
    assert run.wait()["total_s"] == before["total_s"] + 1
    run.die()
    damaged = (tmp_path / METRICS).read_bytes().replace(b'{"time"', b"\0\0\0\0\0\0\0\0", 1)
    (tmp_path / METRICS).write_bytes(damaged)
    run.start(restarted=True)
    assert run.wait()["total_s"] == before["total_s"] + 2


def test_a_line_that_cannot_be_booked_is_told_and_the_run_goes_on(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run.enter()
    run.steps(1, 3)
    run.die()
    with (tmp_path / EVENTS).open("a") as file:
        file.write(json.dumps({"time": run.now_s, "event": "view", "members": 3, "generation": 9}) + "\n")
    run.start(restarted=False)
    run.enter()
    run.steps(4, 8)
    assert run.wait()["worker_s"]["training"] > 0
    assert "could not all be read" in caplog.text
