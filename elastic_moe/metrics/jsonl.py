"""Files of JSON lines: append-only for one writer, readable by others at any time. Only whole lines count.

A line may be torn by a kill or a full disk, or damaged by the disk. The next writer moves such lines to a file beside
it, which ends in `.damaged`; a reader passes over them. All other lines stay.

A run of a million steps has a gigabyte of lines. A writer parses the last ones only; those before them are looked at,
and parsed if one does not look like a JSON object.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from elastic_moe.run_dir import DAMAGED

MAX_HELD = 10_000  # lines kept in memory while the disk refuses them
END_BYTES = 4 << 20  # of a file, that are parsed at first
LINE_BYTES = 1 << 16  # of a file, in which its last line is looked for at first

Json = dict[str, Any]


class JsonLines:
    """An append-only file of JSON lines in which only whole lines ever stay.

    Args:
        path: the file; damaged lines and a torn end are moved to the file `path` + ".damaged".
        integer: a key that every line has as a whole number; "" for none. A line without it is damaged.

    Attributes:
        damaged: damaged lines that were moved now, a torn end not counted.
        last: the newest line that was in the file when it was opened; None if there was none.
    """

    def __init__(self, path: Path, integer: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._held: deque[bytes] = deque(maxlen=MAX_HELD)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        begin = begin_of_end(path, END_BYTES)
        lines = list(_split(_read(path, begin), integer))
        if begin and not _looks_whole(path, begin, integer):
            begin, lines = 0, list(_split(_read(path, 0), integer))
        bad = [line for line, value in lines if value is None]
        self.damaged = sum(line.endswith(b"\n") for line in bad)
        if bad:
            _append(path.with_name(path.name + DAMAGED), [line.rstrip(b"\n") + b"\n" for line in bad])
        self._keep(begin, [line for line, value in lines if value is not None])
        values = [value for _, value in lines if value is not None]
        self.last: Json | None = values[-1] if values else None

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

    def move_end(self, unwanted: Callable[[Json], bool], target: Path) -> tuple[Json | None, int]:
        """Move the last lines to the end of another file, those that still wait for the disk included.

        Args:
            unwanted: of a line, and then of all that come later.
            target: the other file.

        Returns:
            The last line that stays, None if none does, and the number of lines moved.

        Raises:
            OSError: the disk refuses the other file; nothing was moved.
        """
        begin, lines = _end(self.path, lambda value: not unwanted(value))
        held = [(line, json.loads(line)) for line in self._held]
        moved = [line for line, value in (*lines, *held) if unwanted(value)]
        if moved:
            _append(target, moved)
            self._keep(begin, [line for line, value in lines if not unwanted(value)])
            self._held = deque((line for line, value in held if not unwanted(value)), maxlen=MAX_HELD)
        kept = [value for _, value in (*lines, *held) if not unwanted(value)]
        return (kept[-1] if kept else None), len(moved)

    def _keep(self, begin: int, lines: list[bytes]) -> None:
        """Make these lines the file's content from a place on: by a cut if they are there, else by a new file."""
        content = b"".join(lines)
        if os.pread(self._descriptor, len(content), begin) == content:
            self.cut(begin + len(content))
            return
        temporary = self.path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with self.path.open("rb") as before:
                _append(temporary, [before.read(begin), *lines])
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND)
        self._size = begin + len(content)

    def close(self) -> None:
        self.flush()
        os.close(self._descriptor)


def read_jsonl(path: str | Path) -> list[Json]:
    """All whole lines of a file of JSON lines; none when there is no file."""
    path = Path(path)
    return [value for _, value in _whole_lines(path.read_bytes())] if path.exists() else []


def last_lines(path: str | Path, max_bytes: int) -> list[Json]:
    """The whole lines in the last bytes of a file of JSON lines; none when there is no file."""
    path = Path(path)
    if not path.exists():
        return []
    return [value for _, value in _whole_lines(_read(path, begin_of_end(path, max_bytes)))]


def last_line(path: str | Path) -> Json | None:
    """The last whole line of a file of JSON lines, however long it is; None when there is none."""
    path = Path(path)
    lines = _end(path, lambda _: True, LINE_BYTES)[1] if path.exists() else []
    return lines[-1][1] if lines else None


def lines_since(path: str | Path, is_earlier: Callable[[Json], bool]) -> list[Json]:
    """The last lines of a file of JSON lines, which is read from its end on; none when there is no file.

    Args:
        path: the file.
        is_earlier: of a line, and then of all before it: it is not wanted.
    """
    path = Path(path)
    if not path.exists():
        return []
    return [value for _, value in _end(path, is_earlier)[1] if not is_earlier(value)]


def iterate(path: str | Path) -> Iterator[Json]:
    """The whole lines of a file of JSON lines, one by one; none when there is no file."""
    path = Path(path)
    if path.exists():
        with path.open("rb") as file:
            yield from stream(file, path.stat().st_size)


def stream(file: BinaryIO, end: int) -> Iterator[Json]:
    """The whole lines of an open file up to a place, one by one: memory for one of them."""
    while file.tell() < end and (line := file.readline()):
        yield from (value for _, value in _split(line) if value is not None)


class LineReader:
    """Reads what is new in a growing file of JSON lines, so that frequent calls cost little."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._last = b""  # the line that ends at the offset

    def new_lines(self) -> tuple[list[Json], bool]:
        """The whole lines since the last call, and whether the file is read from its beginning: it was cut or replaced,
        also if it has grown again.
        """
        if not self._path.exists():
            return [], False
        anew = False
        with self._path.open("rb") as file:
            file.seek(self._offset - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._offset, self._last, anew = 0, b"", True
                file.seek(0)
            ended = file.read().rpartition(b"\n")
        new = ended[0] + ended[1]
        if not new:
            return [], anew
        self._offset += len(new)
        self._last = new[new.rfind(b"\n", 0, -1) + 1 :]
        return [value for _, value in _whole_lines(new)], anew


class Tail:
    """All lines of a growing file of JSON lines. Each call reads only the new ones."""

    def __init__(self, path: Path) -> None:
        self._file = LineReader(path)
        self._lines: list[Json] = []

    def lines(self) -> list[Json]:
        """All whole lines so far. A file that was cut or replaced is read from its beginning."""
        new, anew = self._file.new_lines()
        if anew:
            self._lines = []
        self._lines += new
        return self._lines


def _end(path: Path, is_earlier: Callable[[Json], bool], span: int = 0) -> tuple[int, list[tuple[bytes, Json]]]:
    """The last whole lines with their values, at least those that are not earlier, and the place where they begin.

    Args:
        path: the file.
        is_earlier: of a line, and then of all before it.
        span: bytes that are read at first; 0: `END_BYTES`.
    """
    span = span or END_BYTES
    while True:
        begin = begin_of_end(path, span)
        lines = _whole_lines(_read(path, begin))
        if not begin or (lines and is_earlier(lines[0][1])):
            return begin, lines
        span *= 4


def begin_of_end(path: Path, span: int) -> int:
    """Begin of the first line in the last bytes of a file; 0 if it has no more than these."""
    with path.open("rb") as file:
        begin = file.seek(0, os.SEEK_END) - span
        if begin <= 0:
            return 0
        file.seek(begin - 1)
        file.readline()
        return file.tell()


def _read(path: Path, begin: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read()


def _looks_whole(path: Path, end: int, integer: str) -> bool:
    """Whether every line up to a place looks like one that `append` wrote. Costs a hundredth of parsing them."""
    key = f'"{integer}": '.encode() if integer else b""
    with path.open("rb") as file:
        for line in file:
            if not (line.startswith(b"{") and line.endswith(b"}\n") and key in line):
                return False
            if b"\0" in line or not line.isascii():
                return False
            end -= len(line)
            if end <= 0:
                return True
    return True


def _whole_lines(data: bytes) -> list[tuple[bytes, Json]]:
    """The lines that are neither damaged nor torn, and their values."""
    return [(line, value) for line, value in _split(data) if value is not None]


def _split(data: bytes, integer: str = "") -> Iterator[tuple[bytes, Json | None]]:
    """Every line of a file with its value; None for a line that is damaged or torn. Empty lines are left out."""
    *ended, rest = data.split(b"\n")
    for line, end in (*((one, b"\n") for one in ended), (rest, b"")):
        if not line:
            continue
        value = _parsed(line, integer)
        if value is None and (cut := _joint(line)) and (first := _parsed(line[:cut], integer)) is not None:
            yield line[:cut] + b"\n", first  # the line break behind it is damaged, and it is not
            line = line[cut + 1 :]
            value = _parsed(line, integer)
        if line:
            yield line + (end if value is None else b"\n"), value


def _joint(line: bytes) -> int:
    """Length of the JSON object at the beginning of a line, 0 if there is none."""
    try:
        text = line.decode()
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return 0
    return len(text[:end].encode()) if isinstance(value, dict) else 0


def _parsed(line: bytes, integer: str) -> Json | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or (integer and type(value.get(integer)) is not int):
        return None
    return value


def _append(path: Path, lines: list[bytes]) -> None:
    """Add lines to a file and wait for the disk."""
    with path.open("ab") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


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
