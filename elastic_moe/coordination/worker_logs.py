"""Keeps what the workers log in the run directory, a file for each: a cluster that is gone has taken its logs along.

The lines come over the control connections (`runtime/log_handler.py`), so no worker has to see the run directory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_moe.run_log import text_line

MAX_BYTES = 8 << 20  # of a log; its older half is in a second file, and what was before that is dropped
OLDER = ".1"
ID_CHARACTERS = 16  # of a worker's id, in the name of its file

logger = logging.getLogger(__name__)


class WorkerLogs:
    """The logs of one run.

    Args:
        directory: is made with the first line.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._told = False

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line of a worker: an event with `worker`, `level`, `logger` and `text`. A full disk costs the line."""
        generation, step = line.get("generation", 0), line.get("step", 0)
        text = text_line(line["time"], line["level"], line["logger"], generation, step, line["text"])
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in str(line["worker"]))[:ID_CHARACTERS]
        path = self._directory / f"{name}.log"
        try:
            self._directory.mkdir(exist_ok=True)
            if path.exists() and path.stat().st_size > MAX_BYTES // 2:
                os.replace(path, path.with_name(path.name + OLDER))
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{text}\n")
            self._told = False
        except OSError as error:
            if not self._told:
                self._told = True
                logger.warning("what workers log cannot be kept: %s", error)
