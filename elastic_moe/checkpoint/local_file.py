"""Files of a local file system: written atomically, opened only if they are files, and locked among processes."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from elastic_moe.checkpoint.bounded import Activity

PIECE = 1 << 23  # bytes that are read, hashed or written at once, while other threads run
_SYNC_BYTES = 1 << 26  # a file is synced so often: one sync at the end could take longer than the time-out


def in_pieces(parts: Iterable[memoryview]) -> Iterable[memoryview]:
    """The bytes of some buffers, in views of at most `PIECE` bytes."""
    for part in parts:
        for start in range(0, len(part), PIECE):
            yield part[start : start + PIECE]


def is_regular(path: str) -> bool:
    """Whether a path leads to a file. To open a pipe would hang, and a device may have no end.

    Raises:
        FileNotFoundError: there is nothing.
        OSError: nothing can be known now.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def write_file(path: str, parts: Iterable[memoryview], activity: Activity) -> None:
    """Write a file under a temporary name, sync it to disk and rename it, so its name never shows a partial file.

    Args:
        path: of the file; its directory is made.
        parts: the file's bytes, which are not copied.
        activity: told of the bytes that are written.
    """
    parent = os.path.dirname(path)
    os.makedirs(parent, exist_ok=True)
    temporary = f"{parent}/.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb", buffering=0) as file:
            unsynced = 0
            for piece in in_pieces(parts):
                written = 0
                while written < len(piece):
                    written += file.write(piece[written:])
                unsynced += len(piece)
                if unsynced >= _SYNC_BYTES:
                    os.fsync(file.fileno())
                    unsynced = 0
                activity.moved(len(piece))
        _sync(temporary)
        activity.moved(0)
        os.replace(temporary, path)
        _sync(parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def lock(file: IO[str], patience_s: float, poll_s: float) -> bool:
    """Take the operating system's lock of an open file; it ends with the file. Returns whether it came in time."""
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(poll_s)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
