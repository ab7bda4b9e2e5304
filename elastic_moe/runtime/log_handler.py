"""Sends what a worker logs to the coordinator, which keeps it in the run directory.

Warnings and errors of the whole process go there at once, so a process that is killed has told them. A program that
logs without end must not fill the control connection: beyond a rate, lines are counted and left out. Ray keeps all
output of the process in its own files, as long as the node lives.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from elastic_moe.control.messages import WORKER_LOG
from elastic_moe.run_log import PACKAGE

TEXT_CHARACTERS = 8192  # of one line, its traceback included
BURST, PER_S = 100, 10.0  # lines


class CoordinatorHandler(logging.Handler):
    """Sends log records.

    Args:
        tell: takes events; it does not wait.
        clock: monotonic seconds.
    """

    def __init__(self, tell: Callable[[dict[str, Any]], None], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.WARNING)
        self._tell, self._clock = tell, clock
        self._last: logging.LogRecord | None = None
        self._allowed, self._counted_s, self._left_out = float(BURST), clock(), 0

    def emit(self, record: logging.LogRecord) -> None:
        if record is self._last:
            return  # it has come up from another logger
        self._last = record
        now_s = self._clock()
        self._allowed = min(BURST, self._allowed + PER_S * (now_s - self._counted_s))
        self._counted_s = now_s
        if self._allowed < 1.0:
            self._left_out += 1
            return
        self._allowed -= 1.0
        try:
            text = self.format(record)
            if self._left_out:
                text, self._left_out = f"({self._left_out} lines before this one were left out) {text}", 0
            where = {"level": record.levelname, "logger": record.name}
            self._tell({"event": WORKER_LOG, **where, "text": text[-TEXT_CHARACTERS:]})
        except Exception:  # noqa: BLE001 - a line that cannot be told must not end the worker
            self.handleError(record)


@contextmanager
def logging_to(tell: Callable[[dict[str, Any]], None], node: str) -> Iterator[None]:
    """While this lasts, warnings and errors of this process are told, and so is the error that ends it.

    Args:
        tell: takes events.
        node: of this worker.
    """
    handler = CoordinatorHandler(tell)
    loggers = logging.getLogger(), logging.getLogger(PACKAGE)  # what the package logs may not come up to the root
    for each in loggers:
        each.addHandler(handler)
    start = {"event": WORKER_LOG, "level": "INFO", "logger": __name__, "text": f"starts on node {node}"}
    tell(start)
    try:
        yield
    except BaseException as error:
        lines = "".join(traceback.format_exception(error))
        tell(start | {"level": "ERROR", "text": lines[-TEXT_CHARACTERS:].rstrip()})
        raise
    finally:
        for each in loggers:
            each.removeHandler(handler)
