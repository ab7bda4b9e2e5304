"""The books of a run's time on disk: `goodput.jsonl` while it goes on, and the same from the files of any run.

The books are a function of events.jsonl and of the records of all timelines. So a coordinator that is started again, or
another start of the run, reads these files and goes on; goodput.jsonl is for readers only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from elastic_moe.control.booking import Books
from elastic_moe.control.goodput import as_record
from elastic_moe.metrics.jsonl import JsonLines, read_jsonl
from elastic_moe.run_dir import ABANDONED_METRICS, EVENTS, GOODPUT, METRICS

LEAST_S = 5.0  # between two lines
SHARE = 1 / 200  # of the run's age, if that is more: a run of a year has some 3,000 lines

Json = dict[str, Any]


def lines_in_order(run_dir: Path) -> Iterator[tuple[bool, Json]]:
    """Events and records of all timelines in the order of their times. Each: whether it is an event, and the line."""
    events = [(event.get("time", 0.0), 0, event) for event in read_jsonl(run_dir / EVENTS)]
    files = [run_dir / METRICS, *run_dir.glob(ABANDONED_METRICS)]
    steps = [(record.get("time", 0.0), 1, record) for file in files for record in read_jsonl(file)]
    for _, kind, line in sorted((*events, *steps), key=lambda found: found[:2]):
        yield kind == 0, line


def account(run_dir: str | Path, prices: Mapping[str, float]) -> Json:
    """The books of a run up to its last line, as a line of goodput.jsonl.

    Args:
        run_dir: the run directory.
        prices: `cluster.price_per_hour`.
    """
    books, step, last_s = Books(), 0, 0.0
    for is_event, line in lines_in_order(Path(run_dir)):
        books.lines([(is_event, line)])
        step, last_s = int(line.get("step", step)), max(last_s, line.get("time", 0.0))
    return {"time": last_s, "step": step} | as_record(books.at(last_s), prices)


class GoodputLog:
    """Keeps the books of a run that goes on. It listens to the run's recorder. Safe to call from several threads.

    Args:
        run_dir: the run directory; what it has of the run so far is read.
        prices: `cluster.price_per_hour`.
        clock: wall clock, seconds.
    """

    def __init__(self, run_dir: Path, prices: Mapping[str, float], clock: Callable[[], float] = time.time) -> None:
        self._prices, self._clock, self._lock = prices, clock, threading.Lock()
        self._books, self._step, self._began_s, self._wrote_s = Books(), 0, clock(), clock()
        for is_event, line in lines_in_order(run_dir):
            self._books.lines([(is_event, line)])
            self._began_s = min(self._began_s, line.get("time", self._began_s))
        self._file = JsonLines(run_dir / GOODPUT)

    def record(self, record: Mapping[str, Any]) -> None:
        with self._lock:
            self._books.step(record)
            self._step = int(record["step"])
            self._write_if_due(float(record["time"]))

    def event(self, event: Mapping[str, Any]) -> None:
        with self._lock:
            self._books.event(event)
            self._step = int(event.get("step", self._step))
            self._write_if_due(float(event["time"]))

    def now(self) -> Json:
        """The books at this moment, as a line of goodput.jsonl."""
        with self._lock:
            return self._line(self._clock())

    def close(self) -> None:
        """Write the last line."""
        with self._lock:
            self._file.append(self._line(self._clock()))
            self._file.close()

    def _write_if_due(self, now_s: float) -> None:
        if now_s - self._wrote_s >= max(LEAST_S, SHARE * (now_s - self._began_s)):
            self._wrote_s = now_s
            self._file.append(self._line(now_s))

    def _line(self, now_s: float) -> Json:
        return {"time": now_s, "step": self._step} | as_record(self._books.at(now_s), self._prices)
