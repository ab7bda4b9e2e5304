"""A throttle for processes: each may use a part of one core, and is stopped while it has used more.

It works as a CPU quota of a control group does, without root: a thread reads the processes' CPU clocks every
millisecond, and sends SIGSTOP and SIGCONT. A process that waits uses nothing up, and saves nothing up either.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Self

TICK_S = 0.001
BURST_S = 0.002  # of CPU time that a process may use at once


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process so far. Raises OSError where there is none any more."""
    return time.clock_gettime((~pid << 3) | 2)  # Linux: CPUCLOCK_SCHED of the process, as clock_getcpuclockid has it


class Throttle:
    """Throttles processes as long as the context lasts.

    Args:
        parts: process id -> part of a core.
    """

    def __init__(self, parts: Mapping[int, float]) -> None:
        self._parts = dict(parts)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        left_s: dict[int, float] = {}  # CPU time that a process may still use
        used_s: dict[int, float] = {}
        stopped: set[int] = set()
        before_s = time.perf_counter()
        while not self._ended.wait(TICK_S):
            now_s = time.perf_counter()
            for pid, part in list(self._parts.items()):
                try:
                    now_used_s = cpu_seconds(pid)
                    grant_s = part * (now_s - before_s) - (now_used_s - used_s.get(pid, now_used_s))
                    used_s[pid] = now_used_s
                    left_s[pid] = min(BURST_S, left_s.get(pid, 0.0) + grant_s)
                    if left_s[pid] < 0 and pid not in stopped:
                        os.kill(pid, signal.SIGSTOP)
                        stopped.add(pid)
                    elif left_s[pid] >= 0 and pid in stopped:
                        os.kill(pid, signal.SIGCONT)
                        stopped.discard(pid)
                except OSError:
                    del self._parts[pid]
            before_s = now_s
        for pid in stopped:
            with suppress(OSError):
                os.kill(pid, signal.SIGCONT)
