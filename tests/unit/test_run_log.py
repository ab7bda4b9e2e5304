"""The lines of a run's log: text as ever, or one JSON object each that says where the run stood."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest

from elastic_moe.actors.progress import Progress
from elastic_moe.metrics.format_event import format_event, level_of
from elastic_moe.metrics.schema import EVENT_KINDS
from elastic_moe.plan.batch_sizes import RunLength
from elastic_moe.run_log import JSON, TEXT, RunLog, logging_of_run
from tests.unit.actors.test_progress import WAITING, Clock, record

LOST = {"event": "worker_lost", "time": 7.0, "generation": 2, "step": 30, "pid": 5, "reason": "gone"}


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_events_progress_and_waiting_are_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(RunLength(100), 30.0, lambda: "two\nare missing", clock, RunLog(JSON, "mine-1")) as shown:
        for step in range(1, 17):
            clock.now_s = 2.0 * step
            shown.records([record(step)])
        shown.events([LOST, {"event": "worker_connected", "step": 1}])
        shown.status(WAITING)
        clock.now_s += 20.0
        shown.status(WAITING)
    progress, lost, waiting = objects(capsys.readouterr().err)
    assert (progress["event"], progress["level"], progress["run"]) == ("progress", "info", "mine-1")
    assert (progress["step"], progress["generation"], progress["loss"]) == (15, 1, 3.0)
    assert lost == LOST | {"level": "warning", "run": "mine-1", "message": format_event(LOST)}
    assert (waiting["level"], waiting["step"], waiting["event"]) == ("warning", 16, "waiting")
    assert "are missing" in waiting["message"]


def test_text_is_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(RunLength(100), 30.0, str, Clock(), RunLog(TEXT, "mine-1")) as shown:
        shown.events([LOST])
    RunLog(TEXT, "mine-1").tell("the end", show=print)
    told = capsys.readouterr()
    assert (told.err, told.out) == (f"{format_event(LOST)}\n", "the end\n")


def test_values_that_json_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    RunLog(JSON, "mine-1").tell("a line", loss=float("nan"), at=ValueError("x"))
    (line,) = objects(capsys.readouterr().err)
    assert line["loss"] is None
    assert line["at"] == "x"


@pytest.mark.parametrize("log_format", [JSON, TEXT])
def test_what_a_process_logs_says_where_it_was(log_format: str) -> None:
    stream, where = io.StringIO(), [(0, 0)]
    logger = logging.getLogger("elastic_moe.runtime.durable")
    with logging_of_run(log_format, "mine-1", lambda: where[0], stream):
        logger.warning("%d of %s", 3, "four")
        where[0] = (2, 30)
        try:
            raise KeyError("a bug")
        except KeyError:
            logger.exception("it failed")
    logger.debug("of nobody")
    if log_format == JSON:
        first, second = objects(stream.getvalue())
        assert (first["message"], first["level"], first["step"]) == ("3 of four", "warning", 0)
        assert (second["generation"], second["step"], second["run"]) == (2, 30, "mine-1")
        assert "KeyError: 'a bug'" in second["error"]
    else:
        first, second, *_, last = stream.getvalue().splitlines()
        assert first.endswith("WARNING mine-1 generation 0 step 0: 3 of four")
        assert second.endswith("ERROR mine-1 generation 2 step 30: it failed")
        assert last == "KeyError: 'a bug'"


def test_the_package_logs_as_before_afterwards() -> None:
    logger = logging.getLogger("elastic_moe")
    before = logger.level, logger.propagate, list(logger.handlers)
    with logging_of_run(JSON, "mine-1", lambda: (0, 0), io.StringIO()):
        assert not logger.propagate
    assert (logger.level, logger.propagate, logger.handlers) == before


def test_levels() -> None:
    assert {level_of({"event": kind.name}) for kind in EVENT_KINDS} == {"info", "warning", "error"}
    assert level_of({"event": "failed"}) == "error"
    assert level_of({"event": "entered"}) == "info"
