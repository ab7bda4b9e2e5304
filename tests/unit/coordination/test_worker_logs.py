"""The workers' logs in the run directory: who wrote a line and when, and no log grows for ever."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.coordination import worker_logs
from elastic_moe.coordination.worker_logs import WorkerLogs
from elastic_moe.run_log import logging_of_run
from elastic_moe.runtime.log_handler import BURST, CoordinatorHandler, logging_to

LINE = {"time": 0.0, "worker": "w1", "level": "WARNING", "logger": "some.module", "text": "words", "step": 7}


def test_a_line_says_who_when_and_where(tmp_path: Path) -> None:
    logs = WorkerLogs(tmp_path / "logs")
    logs.write(LINE | {"generation": 3})
    logs.write(LINE | {"worker": "../../w2", "text": "\udcff"})
    assert (tmp_path / "logs" / "w1.log").read_text().endswith("WARNING some.module generation 3 step 7: words\n")
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["______w2.log", "w1.log"]


def test_a_long_log_keeps_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_logs, "MAX_BYTES", 4000)
    logs = WorkerLogs(tmp_path)
    for number in range(500):
        logs.write(LINE | {"text": f"number {number}"})
    kept = "".join((tmp_path / name).read_text() for name in ("w1.log.1", "w1.log"))
    assert "number 499\n" in kept
    assert "number 0\n" not in kept
    assert 2000 <= len(kept) <= 4200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w1.log", "w1.log.1"]


def test_a_full_disk_costs_the_line_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "logs").write_text("in the way")
    logs = WorkerLogs(tmp_path / "logs")
    for _ in range(3):
        logs.write(LINE)
    assert len(caplog.records) == 1


def test_warnings_of_the_whole_process_and_its_end_are_told() -> None:
    told: list[dict[str, Any]] = []

    def work() -> None:
        with logging_to(told.append, "n1"):
            logging.getLogger("any.library").warning("it is %d", 5)
            logging.getLogger("any.library").info("not this")
            with logging_of_run("text", "run", lambda: (1, 2)):
                logging.getLogger("elastic_moe.some").error("nor is this lost")
            raise RuntimeError("the end")

    with pytest.raises(RuntimeError, match="the end"):
        work()
    assert [(line["level"], line["text"]) for line in told[:2]] == [
        ("INFO", "starts on node n1"),
        ("WARNING", "it is 5"),
    ]
    assert (told[2]["level"], told[2]["text"]) == ("ERROR", "nor is this lost")
    assert told[3]["level"] == "ERROR"
    assert "Traceback" in told[3]["text"]
    assert "RuntimeError: the end" in told[3]["text"]
    assert len(told) == 4
    assert not [handler for handler in logging.getLogger().handlers if isinstance(handler, CoordinatorHandler)]


def test_a_flood_is_counted_and_left_out() -> None:
    told: list[dict[str, Any]] = []
    now = [0.0]
    handler = CoordinatorHandler(told.append, lambda: now[0])
    record = logging.LogRecord("x", logging.WARNING, "", 0, "again", None, None)
    for number in range(1000):
        handler.emit(logging.makeLogRecord(vars(record) | {"msg": f"{number}"}))
    assert len(told) == BURST
    now[0] = 1.0
    handler.emit(record)
    handler.emit(record)  # as a logger and its parent do
    assert len(told) == BURST + 1
    assert told[-1]["text"] == f"({1000 - BURST} lines before this one were left out) again"
