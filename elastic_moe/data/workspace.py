"""The directory in which a corpus is prepared: one process at a time works there, and a later one goes on.

Its name follows from the corpus and the settings, so a preparation that was killed is found again. A lock of the
operating system, which ends with the process, keeps others out; they wait, and then find the result. Where a file
system has no locks, each process has a directory of its own, and begins anew.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

LOCK = "lock"
POLL_S = 0.5
KEPT_S = 7 * 86400.0  # an unfinished preparation is deleted when nobody has worked on it for so long
_MARK = ".unfinished-"


class Workspace:
    """A directory that becomes `final` when it is complete. Use as a context manager.

    Args:
        final: the directory to be.
        waits: called now and then while another process works there.
    """

    def __init__(self, final: Path, waits: Callable[[], object]) -> None:
        self.final, self._waits = final, waits
        self.directory = final.with_name(f"{_MARK}{final.name}")
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        self.final.parent.mkdir(parents=True, exist_ok=True)
        while not self._take():
            self._waits()
            time.sleep(POLL_S)
        self._sweep()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.close()

    def _take(self) -> bool:
        """Take the lock of the directory, which is made; whether it was free."""
        self.directory.mkdir(exist_ok=True)
        try:
            lock = (self.directory / LOCK).open("w")
        except FileNotFoundError:  # it was just renamed
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(self.directory / LOCK).st_ino == os.fstat(lock.fileno()).st_ino:
                self._lock = lock
                return True
        except FileNotFoundError:  # renamed between
            pass
        except BlockingIOError:
            pass
        except OSError:  # of a file system without locks
            lock.close()
            self.directory = self.directory.with_name(f"{self.directory.name}-{uuid.uuid4().hex}")
            self.directory.mkdir()
            return True
        lock.close()
        return False

    def publish(self, complete: Callable[[Path], bool]) -> None:
        """Rename the complete directory. It replaces a damaged one; a complete one of another process stays.

        Args:
            complete: whether a directory has a complete result.
        """
        try:
            os.rename(self.directory, self.final)
        except OSError:
            if complete(self.final):
                self.discard()
                return
            damaged = self.final.with_name(f"{_MARK}damaged-{uuid.uuid4().hex}")
            os.rename(self.final, damaged)
            os.rename(self.directory, self.final)
            shutil.rmtree(damaged, ignore_errors=True)
        (self.final / LOCK).unlink(missing_ok=True)  # not before: whoever takes a lock finds the result

    def discard(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _sweep(self) -> None:
        """Delete what others have begun, and nobody has gone on with for long."""
        for path in self.final.parent.glob(f"{_MARK}*"):
            with suppress(OSError):
                if path == self.directory or time.time() - path.stat().st_mtime < KEPT_S:
                    continue
                with (path / LOCK).open("a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
