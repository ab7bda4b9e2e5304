"""The records of committed steps: written to the run directory, and the newest kept in memory for who asks often."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_moe.metrics.jsonl import lines_since
from elastic_moe.metrics.recorder import Recorder
from elastic_moe.run_dir import METRICS

RECENT = 1000  # records kept in memory: the driver asks for new ones several times a second


class StepRecords:
    """The records of one run. Safe to call from several threads.

    Args:
        run_dir: the run directory.
        recorder: writes the records there.
    """

    def __init__(self, run_dir: Path, recorder: Recorder) -> None:
        self._run_dir, self._recorder = run_dir, recorder
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._lock = threading.Lock()

    def add(self, record: Mapping[str, Any]) -> int:
        """Write the record of a step, unless it is there already. Returns the step up to which all are in the file."""
        written = self._recorder.record(record)
        with self._lock:
            self._recent.extend(written)
        return self._recorder.safe_step

    def since(self, step: int) -> list[dict[str, Any]]:
        """Records of steps after this one, in order: from memory if it has them all, else from the file."""
        if self._recorder.last_step <= step:
            return []
        with self._lock:
            recent = list(self._recent)
        if not recent or int(recent[0]["step"]) > step + 1:
            recent = lines_since(self._run_dir / METRICS, lambda record: int(record["step"]) <= step)
        return [record for record in recent if int(record["step"]) > step]

    def roll_back_to(self, step: int, timeline: int) -> int:
        """Set aside the records of later steps, which this timeline made. Returns how many they were."""
        with self._lock:
            self._recent.clear()
        return self._recorder.set_aside_after(step, timeline)
