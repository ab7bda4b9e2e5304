"""Exporting can neither end nor delay a run: errors are reported now and then, and what waits is bounded."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from elastic_moe.actors import metrics
from elastic_moe.actors.link import actor_name, train_names
from elastic_moe.actors.metrics import MAX_WAITING, RunExporter
from tests.patience import until


class Failing(RunExporter):
    """Fails at every second export, or hangs."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, train_names(actor_name("ab" * 16, str(run_dir)), str(run_dir)), 2)
        self.exports, self.hangs = 0, threading.Event()

    def _export(self) -> None:
        self.exports += 1
        self.hangs.wait()
        if self.exports % 2:
            raise RuntimeError("Ray is away")


def test_an_error_is_told_once_in_a_while_and_the_thread_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "PERIOD_S", 0.001)
    exporter = Failing(tmp_path)
    exporter.hangs.set()
    with caplog.at_level(logging.WARNING):
        exporter.begin(dict, dict)
        until(lambda: exporter.exports >= 10, "further exports")
        exporter.close()
    assert not exporter.is_alive()
    assert [record.getMessage() for record in caplog.records] == [
        "metrics are not exported now: RuntimeError: Ray is away"
    ]


def test_an_exporter_that_hangs_delays_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PERIOD_S", 0.001)
    monkeypatch.setattr(metrics, "CLOSE_S", 0.05)
    exporter = Failing(tmp_path)
    exporter.begin(dict, dict)
    until(lambda: exporter.exports == 1, "an export that hangs")
    for step in range(2 * MAX_WAITING):
        exporter.record({"step": step})
    assert len(exporter._heard) == MAX_WAITING
    began_s = time.monotonic()
    exporter.close()
    assert time.monotonic() - began_s < 30
    exporter.hangs.set()
    exporter.join(60)


def test_the_name_of_a_run_is_that_of_its_directory_with_a_piece_of_its_id() -> None:
    run, there = "0123456789abcdef" * 2, "/runs/my run (2)"
    names = train_names(actor_name(run, there), there)
    assert names.name == "my-run-2-01234567"
    assert names.id.startswith(run)
    copy = train_names(actor_name(run, "/copies/my run (2)"), "/copies/my run (2)")
    assert (copy.name, copy.id != names.id) == (names.name, True)
    assert train_names(actor_name(run, "/runs/été"), "/runs/été").name == "t-01234567"
    assert train_names(actor_name(run, "/"), "/").name == "01234567"
