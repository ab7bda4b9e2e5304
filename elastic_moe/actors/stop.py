"""Ctrl-C and SIGTERM: the first signal asks for a final checkpoint and a clean end, a later one ends the run at once.

Some senders send one wish twice: `ray job stop` signals a job's wrapper (`uv run`, `timeout`) and its child, and the
wrapper passes the signal on. A second signal within `TWICE_S` is therefore no second wish.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

TWICE_S = 1.0


@dataclass
class Stop:
    """The wish for an end, if any.

    Attributes:
        signum: the newest signal.
        count: wishes so far.
        since_s: monotonic time of the first.
    """

    signum: int = 0
    count: int = 0
    since_s: float = 0.0

    def take(self, signum: int, now_s: float) -> None:
        """Take a signal in.

        Raises:
            KeyboardInterrupt: the run is to end at once.
        """
        if self.count and now_s - self.since_s < TWICE_S:
            return
        self.signum, self.count, self.since_s = signum, self.count + 1, now_s
        if self.count > 1:
            raise KeyboardInterrupt


@contextmanager
def signals() -> Iterator[Stop]:
    """Take SIGINT and SIGTERM into a `Stop`, where this is the main thread."""
    stop = Stop()

    def take(signum: int, _frame: Any) -> None:
        stop.take(signum, time.monotonic())

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {signum: signal.signal(signum, take) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
