"""What a driver shows while it prepares the corpus: a bar on a terminal, elsewhere a line now and then.

Where nothing moves, since a server is silent or a step is long, that is told too, by a thread.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

from elastic_moe.metrics.status_view import duration
from elastic_moe.run_log import RunLog

MB = 1e6


class CorpusProgress:
    """Shows the preparation of a corpus on standard error. A corpus that was prepared before shows nothing.

    Args:
        every_s: seconds between two lines of one part where there is no terminal; 0: only the begin and the end.
        log: tells the lines; with JSON there is no bar.
        clock: monotonic seconds.
    """

    def __init__(self, every_s: float, log: RunLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._log, self._clock = every_s, log, clock
        self._bar: Any = None
        self._part, self._done = "looking at the files", -1
        self._watcher: threading.Thread | None = None
        self._moved_s, self._ended, self._lock = time.monotonic(), threading.Event(), threading.Lock()
        self._begun_s = self._part_s = self._told_s = clock()

    def __enter__(self) -> CorpusProgress:
        if self._every_s:
            self._watcher = threading.Thread(target=self._watch, name="corpus progress", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        if self._watcher is not None:
            self._watcher.join()
        if self._bar is not None:
            self._bar.close()
            if error is None:
                took = duration(self._clock() - self._begun_s)
                self._log.tell(f"the corpus is prepared, in {took}", event="prepared")

    def __call__(self, part: str, done: int, total: int) -> None:
        """Show a part of the work. See `data.prepare.Told`."""
        with self._lock:
            self._show(part, done, total)

    def _watch(self) -> None:
        """Tell how long nothing has moved."""
        while not self._ended.wait(self._every_s):
            with self._lock:
                silent_s = time.monotonic() - self._moved_s
                if silent_s < self._every_s or self._ended.is_set():
                    continue
                text = f"{self._part}, without progress for {duration(silent_s)}"
                if self._bar is None or self._bar.disable:
                    self._log.tell(f"preparing the corpus: {text}", event="preparing", part=self._part)
                else:
                    self._bar.set_postfix_str(f"no progress for {duration(silent_s)}")

    def _show(self, part: str, done: int, total: int) -> None:
        now_s, new = self._clock(), part != self._part
        if new or done != self._done:
            self._moved_s, self._done = time.monotonic(), done
        if self._bar is None:
            self._bar = self._new_bar()
        if new:
            self._part, self._part_s = part, now_s
            self._bar.reset(total or None)
            self._bar.set_description(part)
            self._bar.set_postfix_str("")
        self._bar.update(done - self._bar.n)
        if self._bar.disable and (new or (self._every_s and now_s - self._told_s >= self._every_s)):
            self._told_s = now_s
            self._line(done, total, now_s - self._part_s)

    def _new_bar(self) -> Any:
        hidden = self._log.is_json or None  # None: where there is no terminal
        return tqdm(unit="B", unit_scale=True, dynamic_ncols=True, leave=False, file=sys.stderr, disable=hidden)

    def _line(self, done: int, total: int, seconds: float) -> None:
        text = f"preparing the corpus: {self._part}"
        if total:
            text += f", {done / MB:,.1f} of {total / MB:,.1f} MB"
        if done:
            text += f", {duration(seconds * (total - done) / done)} left"
        self._log.tell(text, event="preparing", part=self._part, bytes=done, of_bytes=total)
