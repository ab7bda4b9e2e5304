"""Files of JSON lines: append-only for one writer, readable by others at any time. Only whole lines count.

A line may be torn by a kill or by a full disk. The writer cuts such an end off; a reader stops before it.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_HELD = 10_000  # lines kept in memory while the disk refuses them


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
        self.cut(sum(len(line) for line, _ in _whole_lines(path.read_bytes())))

    def append(self, value: Mapping[str, Any]) -> bool:
        """Add a line. Returns False when the disk refuses it now; a later call then writes it."""
        self._held.append((json.dumps(_plain(value), allow_nan=False) + "\n").encode())
        return self.flush()

    def flush(self) -> bool:
        """Write the lines that wait. Returns whether none is left."""
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
        """Keep only this many bytes of the file."""
        os.ftruncate(self._descriptor, size)
        self._size = size

    def keep_held(self, wanted: Callable[[dict[str, Any]], bool]) -> tuple[list[dict[str, Any]], int]:
        """Drop some of the lines that wait. Returns the values that still wait, and the number of dropped ones."""
        kept = [(line, value) for line in self._held if wanted(value := json.loads(line))]
        dropped = len(self._held) - len(kept)
        self._held = deque((line for line, _ in kept), maxlen=MAX_HELD)
        return [value for _, value in kept], dropped

    def values(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(offset, value) of every line."""
        offset = 0
        for line, value in _whole_lines(self.path.read_bytes()):
            yield offset, value
            offset += len(line)

    def close(self) -> None:
        self.flush()
        os.close(self._descriptor)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a file of JSON lines; none when there is no file."""
    path = Path(path)
    return [value for _, value in _whole_lines(path.read_bytes())] if path.exists() else []


class Tail:
    """Reads a growing file of JSON lines. Each call reads only the new lines, so that frequent calls cost little."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._lines: list[dict[str, Any]] = []

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines so far; a file that has become shorter is read from its beginning."""
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


def _whole_lines(data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines up to the first one that is torn, and their values."""
    lines: list[tuple[bytes, dict[str, Any]]] = []
    for line in data.splitlines(keepends=True):
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(value, dict):
            break
        lines.append((line, value))
    return lines


def _plain(value: Any) -> Any:
    """The value in types that JSON has: numbers that are not finite become null, arrays lists, all else text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
