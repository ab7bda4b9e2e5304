"""A process with more open files than `select` can tell apart, as a worker among a thousand others has."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

SELECTABLE = 1024  # FD_SETSIZE


@contextmanager
def many_files() -> Iterator[None]:
    """While this lasts, every new file of this process has a number that `select` does not know."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * SELECTABLE), hard))
    held: list[int] = []
    try:
        while not held or held[-1] < SELECTABLE:
            held.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for each in held:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
