"""Writes the records of a run: metrics.jsonl, events.jsonl, and experts.jsonl for placements and loads.

These files are the truth about a run; trackers get copies. A step may arrive more than once, because every new
generation repeats recent records in case the coordinator lost them; a step that is already there is dropped. Steps may
also arrive out of order from two workers when the first rank changes; a step whose predecessor is missing waits for it
a while. A full disk delays lines and does not stop the run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from elastic_moe.metrics.jsonl import JsonLines
from elastic_moe.metrics.schema import EXPERT_KINDS
from elastic_moe.run_dir import DAMAGED, EVENTS, EXPERTS, METRICS, abandoned_metrics

MAX_EARLY = 256  # steps that wait for a missing one before it is given up
_ABOUT_EXPERTS = {kind.name for kind in EXPERT_KINDS}


class Listener(Protocol):
    """Gets a copy of what is written, each record and event once, in order. It neither waits nor raises."""

    def record(self, record: Mapping[str, Any]) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None: ...


class Recorder:
    """Writes a run's records. Safe to call from several threads.

    Args:
        run_dir: the run directory; its files are continued when they exist.
        clock: wall clock, seconds.
        listeners: get a copy.
    """

    def __init__(
        self, run_dir: str | Path, clock: Callable[[], float] = time.time, listeners: Sequence[Listener] = ()
    ) -> None:
        self._clock, self._lock, self._listeners = clock, threading.Lock(), listeners
        self._metrics = JsonLines(Path(run_dir) / METRICS, "step")
        self._events = JsonLines(Path(run_dir) / EVENTS)
        self._experts = JsonLines(Path(run_dir) / EXPERTS)
        self._last: dict[str, Any] | None = self._metrics.last
        self._safe_step = self.last_step
        self._next = self.last_step + 1
        self._early: dict[int, dict[str, Any]] = {}
        for file in (self._metrics, self._events, self._experts):
            if file.damaged:
                reason = f"{file.damaged} damaged lines of {file.path.name} are now in {file.path.name}{DAMAGED}"
                self.event({"event": "records_damaged", "step": self.last_step, "reason": reason})

    @property
    def last_step(self) -> int:
        """Last step recorded, 0 when there is none."""
        return int(self._last["step"]) if self._last else 0

    @property
    def safe_step(self) -> int:
        """Last step whose record has reached the file, as all before it have; the disk may refuse later ones."""
        return self._safe_step

    @property
    def last(self) -> dict[str, Any] | None:
        """Last record."""
        return self._last

    def record(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Record a committed step. Returns the records written: none, this one, or also those that waited for it."""
        with self._lock:
            step = int(record["step"])
            if step >= self._next:
                self._early.setdefault(step, {"time": self._clock()} | dict(record))
            return self._write_early(len(self._early) > MAX_EARLY)

    def _write_early(self, give_up: bool) -> list[dict[str, Any]]:
        """Write the steps that follow one another; with `give_up`, also those behind a gap."""
        if give_up and self._early:
            self._next = min(self._early)
        written: list[dict[str, Any]] = []
        while (record := self._early.pop(self._next, None)) is not None:
            if self._metrics.append(record):
                self._safe_step = int(record["step"])
            self._last, self._next = record, self._next + 1
            written.append(record)
            for listener in self._listeners:
                listener.record(record)
        return written

    def event(self, event: Mapping[str, Any]) -> None:
        """Record an event; the time is added when it has none."""
        with self._lock:
            file = self._experts if event.get("event") in _ABOUT_EXPERTS else self._events
            line = {"time": self._clock()} | dict(event)
            file.append(line)
            for listener in self._listeners:
                listener.event(line)

    def set_aside_after(self, step: int, timeline: int) -> int:
        """Move the records of later steps to a file of their own: the run has gone back to this step.

        Args:
            step: last step whose record stays.
            timeline: the timeline that made the later records.

        Returns:
            The number of records moved.
        """
        with self._lock:
            path = self._metrics.path.with_name(abandoned_metrics(timeline))
            self._last, moved = self._metrics.move_end(lambda value: int(value["step"]) > step, path)
            self._early.clear()
            self._next = step + 1
            self._safe_step = min(self._safe_step, step)
            return moved

    def close(self) -> None:
        with self._lock:
            while self._early:
                self._write_early(give_up=True)
            self._metrics.close()
            self._events.close()
            self._experts.close()
