"""The books of a run's time on disk: `goodput.jsonl` while it goes on, and the same from the files of any run.

The books are a function of events.jsonl and of the records of all timelines. So a coordinator that is started again, or
another start of the run, reads these files and goes on; goodput.jsonl is for readers only. A long run has a gigabyte of
records: a thread reads them, one by one and with rests, while the run goes on, and the new lines wait for it.
"""

from __future__ import annotations

import heapq
import io
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from elastic_moe.control.booking import Books
from elastic_moe.control.goodput import as_record
from elastic_moe.metrics.jsonl import END_BYTES, JsonLines, begin_of_end, last_line, stream
from elastic_moe.run_dir import ABANDONED_METRICS, EVENTS, GOODPUT, METRICS

LEAST_S = 5.0  # between two lines
SHARE = 1 / 200  # of the run's age, if that is more: a run of a year has some 3,000 lines
CHUNK = 500  # old lines that are read between two rests
CLOSE_TIMEOUT_S = 30.0  # for what a run that ends has not read yet

Json = dict[str, Any]
logger = logging.getLogger(__name__)


class _History:
    """The lines that a run directory has now, in the order of their times; later changes of the files do not matter.

    A run that goes back takes lines from the end of a file. So the ends are read at once, and the rest later.
    """

    def __init__(self, run_dir: Path) -> None:
        paths = [path for path in (run_dir / EVENTS, run_dir / METRICS) if path.exists()]
        self._files: list[tuple[int, BinaryIO, int, bytes]] = []
        for path in (*paths, *run_dir.glob(ABANDONED_METRICS)):
            begin, file = begin_of_end(path, END_BYTES), path.open("rb")
            file.seek(begin)
            end = file.read()
            file.seek(0)
            self._files.append((path.name != EVENTS, file, begin, end))

    def __iter__(self) -> Iterator[tuple[bool, Json]]:
        """Each: whether it is an event, and the line."""
        lines = heapq.merge(*(self._lines(*file) for file in self._files), key=lambda found: found[:2])
        return ((kind == 0, line) for _, kind, line in lines)

    def _lines(self, kind: int, file: BinaryIO, begin: int, end: bytes) -> Iterator[tuple[float, int, Json]]:
        with file:
            for part, size in ((file, begin), (io.BytesIO(end), len(end))):
                yield from ((float(line.get("time") or 0.0), kind, line) for line in stream(part, size))


def account(run_dir: str | Path, prices: Mapping[str, float]) -> Json:
    """The books of a run up to its last line, as a line of goodput.jsonl.

    Args:
        run_dir: the run directory.
        prices: `cluster.price_per_hour`.
    """
    books, step, last_s = Books(), 0, 0.0
    for is_event, line in _History(Path(run_dir)):
        books.lines([(is_event, line)])
        step, last_s = int(line.get("step", step)), max(last_s, line.get("time", 0.0))
    return {"time": last_s, "step": step} | as_record(books.at(last_s), prices)


class GoodputLog:
    """Keeps the books of a run that goes on. It listens to the run's recorder. Safe to call from several threads.

    Args:
        run_dir: the run directory; what it has of the run so far is read in the background.
        prices: `cluster.price_per_hour`.
        clock: wall clock, seconds.
    """

    def __init__(self, run_dir: Path, prices: Mapping[str, float], clock: Callable[[], float] = time.time) -> None:
        self._prices, self._clock, self._lock = prices, clock, threading.Lock()
        self._books, self._step, self._began_s, self._wrote_s = Books(), 0, clock(), clock()
        self._waiting: deque[tuple[bool, Mapping[str, Any]]] = deque()
        self._has_read = self._closed = False
        self._before = last_line(run_dir / GOODPUT)
        self._file = JsonLines(run_dir / GOODPUT)
        self._reader = threading.Thread(target=self._read, args=(_History(run_dir),), name="goodput", daemon=True)
        self._reader.start()

    def record(self, record: Mapping[str, Any]) -> None:
        self._take(False, record)

    def event(self, event: Mapping[str, Any]) -> None:
        self._take(True, event)

    def now(self) -> Json:
        """The books at this moment, as a line of goodput.jsonl. As long as the old lines are read: its last one."""
        with self._lock:
            if self._has_read:
                return self._line(self._clock())
            return dict(self._before) if self._before else self._line(self._clock(), Books())

    def close(self) -> None:
        """Write the last line. It is left out if the old lines cannot be read in time: `account` has it at any time."""
        self._reader.join(CLOSE_TIMEOUT_S)
        with self._lock:
            self._closed = True
            if self._has_read:
                self._file.append(self._line(self._clock()))
            self._file.close()

    def _read(self, history: _History) -> None:
        """Book the old lines, then those that came meanwhile."""
        try:
            for number, (is_event, line) in enumerate(history):
                if self._closed:
                    return
                self._books.lines([(is_event, line)])
                self._began_s = min(self._began_s, line.get("time", self._began_s))
                if number % CHUNK == CHUNK - 1:
                    time.sleep(0.005)  # for the coordinator
        except Exception:  # the books are not worth the run: they go on from here
            logger.exception("goodput: the records so far could not all be read")
        with self._lock:
            self._books.lines(self._waiting)
            self._waiting.clear()
            self._has_read = True

    def _take(self, is_event: bool, line: Mapping[str, Any]) -> None:
        with self._lock:
            self._step = int(line.get("step", self._step))
            if not self._has_read:
                self._waiting.append((is_event, line))
                return
            self._books.lines([(is_event, line)])
            now_s = float(line["time"])
            if now_s - self._wrote_s >= max(LEAST_S, SHARE * (now_s - self._began_s)):
                self._wrote_s = now_s
                self._file.append(self._line(now_s))

    def _line(self, now_s: float, books: Books | None = None) -> Json:
        return {"time": now_s, "step": self._step} | as_record((books or self._books).at(now_s), self._prices)
