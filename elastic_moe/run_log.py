"""The lines of a run's log: text for people, or with `run.log_format=json` one JSON object a line for machines.

An object has time, level, run, generation, step and message, and what the line is about. The run is named as Ray Train
names it. The driver tells events and progress so; workers and the coordinator what they log themselves.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

TEXT, JSON = "text", "json"
PACKAGE = "elastic_moe"  # parent of all loggers of this package
Where = Callable[[], tuple[int, int]]  # generation and step of the process


def json_line(level: str, run: str, generation: int, step: int, message: str, **values: Any) -> str:
    """One line. What JSON cannot hold is null or text."""
    line = {"time": time.time(), "level": level, "run": run, "generation": generation, "step": step, "message": message}
    return json.dumps({key: _plain(value) for key, value in (line | values).items()}, default=str)


def text_line(time_s: float, level: str, about: str, generation: int, step: int, message: str) -> str:
    """One line for people. `about` says whose or what line it is."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
    return f"{when} {level} {about} generation {generation} step {step}: {message}"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """What a driver tells of its run.

    Args:
        log_format: TEXT or JSON.
        run: name of the run.
    """

    def __init__(self, log_format: str, run: str) -> None:
        self.is_json, self._run = log_format == JSON, run
        self.generation = self.step = 0  # of lines that are about no other ones

    def tell(self, text: str, level: str = "info", show: Callable[[str], object] | None = None, **values: Any) -> None:
        """Print a line.

        Args:
            text: the line for people, and the message of the object.
            level: of the line.
            show: prints text elsewhere than on standard error.
            **values: of the object.
        """
        if self.is_json:
            about = {"generation": self.generation, "step": self.step} | values
            print(json_line(level, self._run, message=text, **about), file=sys.stderr, flush=True)
        elif show is not None:
            show(text)
        else:
            print(text, file=sys.stderr)


class _Formatter(logging.Formatter):
    """Formats what a process of the run logs."""

    def __init__(self, log_format: str, run: str, where: Where) -> None:
        super().__init__()
        self._is_json, self._run, self._where = log_format == JSON, run, where

    def format(self, record: logging.LogRecord) -> str:
        generation, step = self._where()
        if not self._is_json:
            message = record.getMessage()
            lines = [text_line(record.created, record.levelname, self._run, generation, step, message)]
            if record.exc_info:
                lines.append(self.formatException(record.exc_info))
            return "\n".join(lines)
        values = {"logger": record.name, "time": record.created, "process": record.process}
        if record.exc_info:
            values["error"] = self.formatException(record.exc_info)
        return json_line(record.levelname.lower(), self._run, generation, step, record.getMessage(), **values)


@contextmanager
def logging_of_run(log_format: str, run: str, where: Where, stream: TextIO | None = None) -> Iterator[None]:
    """What this package logs goes to standard error in the run's format, and to no other handler, while this lasts."""
    logger, handler = logging.getLogger(PACKAGE), logging.StreamHandler(stream)
    handler.setFormatter(_Formatter(log_format, run, where))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
