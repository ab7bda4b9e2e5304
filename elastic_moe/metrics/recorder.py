"""The run's own record: metrics.jsonl, one line per committed step, events.jsonl, one line per event, and experts.jsonl, where the
experts are and how many tokens they get.

These files are the truth about a run; trackers are copies. Steps arrive more than once (every new generation repeats
recent records, in case the coordinator lost them), so a step that is already there is dropped; and they may come from two
workers out of order when the first rank changes, so a step whose predecessor is missing waits for it a while. A disk that
is full for a while delays lines, it does not stop the run.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from elastic_moe.run_dir import EVENTS, EXPERTS, METRICS

ABOUT_EXPERTS = {"placement", "expert_load"}  # events that go there
MAX_HELD = 10_000  # lines kept in memory while the disk refuses them
MAX_EARLY = 256  # steps that wait for a missing one before it is given up


class JsonLines:
    """An append-only file of JSON lines in which only whole lines ever stay.

    Args:
        path: the file; a torn last line, left by a kill, is cut off.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._held: deque[bytes] = deque(maxlen=MAX_HELD)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        whole = sum(len(line) for line in _whole_lines(path.read_bytes()))
        self.cut(whole)

    def append(self, value: Mapping[str, Any]) -> bool:
        """Add a line. Returns False when the disk refuses it now; it is then written with a later one."""
        self._held.append((json.dumps(_plain(value), allow_nan=False) + "\n").encode())
        return self.flush()

    def flush(self) -> bool:
        """Write lines that wait. Returns whether none is left."""
        while self._held:
            line = self._held[0]
            try:
                written = os.write(self._descriptor, line)
            except OSError:
                written = -1
            if written != len(line):
                if written > 0:
                    self.cut(self._size)
                return False
            self._size += written
            self._held.popleft()
        return True

    def cut(self, size: int) -> None:
        """Drop what lies behind this many bytes."""
        os.ftruncate(self._descriptor, size)
        self._size = size

    def keep_held(self, wanted: Callable[[dict[str, Any]], bool]) -> tuple[list[dict[str, Any]], int]:
        """Drop unwanted ones of the lines that wait. Returns those that still wait, and how many were dropped."""
        kept = [(line, value) for line in self._held if wanted(value := json.loads(line))]
        dropped = len(self._held) - len(kept)
        self._held = deque((line for line, _ in kept), maxlen=MAX_HELD)
        return [value for _, value in kept], dropped

    def values(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(offset, value) of every line."""
        offset = 0
        for line in _whole_lines(self.path.read_bytes()):
            yield offset, json.loads(line)
            offset += len(line)

    def close(self) -> None:
        self.flush()
        os.close(self._descriptor)


class Recorder:
    """Writes a run's records. Safe to call from several threads.

    Args:
        run_dir: the run directory; its files are continued when they exist.
        clock: wall clock, seconds.
    """

    def __init__(self, run_dir: str | Path, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._metrics = JsonLines(Path(run_dir) / METRICS)
        self._events = JsonLines(Path(run_dir) / EVENTS)
        self._experts = JsonLines(Path(run_dir) / EXPERTS)
        self._last: dict[str, Any] | None = None
        for _, value in self._metrics.values():
            self._last = value
        self._next = self.last_step + 1
        self._early: dict[int, dict[str, Any]] = {}

    @property
    def last_step(self) -> int:
        """Last step recorded, 0 when there is none."""
        return int(self._last["step"]) if self._last else 0

    @property
    def last(self) -> dict[str, Any] | None:
        """Last record."""
        return self._last

    def record(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Record a committed step. Returns what was written: nothing, this one, or with it those that had waited for it."""
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
            self._metrics.append(record)
            self._last, self._next = record, self._next + 1
            written.append(record)
        return written

    def event(self, event: Mapping[str, Any]) -> None:
        """Record an event; the time is added when it has none."""
        with self._lock:
            file = self._experts if event.get("event") in ABOUT_EXPERTS else self._events
            file.append({"time": self._clock()} | dict(event))

    def truncate_after(self, step: int) -> int:
        """Forget records of later steps: the run fell back to this one. Returns how many were dropped."""
        with self._lock:
            held, dropped = self._metrics.keep_held(lambda value: int(value["step"]) <= step)
            self._last, cut = None, -1
            for offset, value in self._metrics.values():
                if int(value["step"]) <= step:
                    self._last = value
                else:
                    cut, dropped = (offset if cut < 0 else cut), dropped + 1
            if cut >= 0:
                self._metrics.cut(cut)
            self._last = held[-1] if held else self._last
            self._early.clear()
            self._next = step + 1
            return dropped

    def close(self) -> None:
        with self._lock:
            while self._early:
                self._write_early(give_up=True)
            self._metrics.close()
            self._events.close()
            self._experts.close()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a file of JSON lines; none when there is no file."""
    path = Path(path)
    return [json.loads(line) for line in _whole_lines(path.read_bytes())] if path.exists() else []


class Tail:
    """A growing file of JSON lines, of which each look reads only what is new, so that looking often costs the run nothing."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._lines: list[dict[str, Any]] = []

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines so far; a file that was cut is read anew."""
        if not self._path.exists():
            return []
        if self._path.stat().st_size < self._offset:
            self._offset, self._lines = 0, []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")
        self._offset += len(whole[0]) + len(whole[1])
        self._lines += [json.loads(line) for line in whole[0].splitlines()]
        return self._lines


def _whole_lines(data: bytes) -> list[bytes]:
    """Lines up to the first one that is torn."""
    lines: list[bytes] = []
    for line in data.splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or not isinstance(json.loads(line), dict):
                break
        except ValueError:
            break
        lines.append(line)
    return lines


def _plain(value: Any) -> Any:
    """The value with what JSON lacks replaced: numbers that are not finite become null, arrays lists, the rest text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
