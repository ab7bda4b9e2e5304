"""What a driver shows while a run goes on: a bar on a terminal, elsewhere a line now and then; and what is missing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from types import TracebackType
from typing import Any

from tqdm import tqdm

from elastic_moe.metrics.format_event import format_event, format_loss, level_of
from elastic_moe.metrics.status_view import duration
from elastic_moe.plan.batch_sizes import RunLength
from elastic_moe.run_log import TEXT, RunLog

FIRST_WAIT_S, MOST_WAIT_S = 10.0, 600.0  # waiting is told after so long, then after twice as long each time
TOLD = ("loss", "lr", "tokens", "tokens_per_s", "step_s", "world_size")  # of a record, in a line about the progress
BAR = "{percentage:3.0f}%|{bar}| step {n_fmt} of {total_fmt}{postfix}"  # time left is ours: a resumed run begins late
RECENT = 50  # steps from which the time left is estimated


class Progress:
    """Shows a run on standard error.

    Args:
        length: of the run.
        every_s: seconds between two lines where there is no terminal; 0: none.
        missing: says what is missing while the run waits, as a sentence; it may ask Ray.
        clock: monotonic seconds.
        log: tells the lines; with JSON there is no bar.
    """

    def __init__(
        self,
        length: RunLength,
        every_s: float,
        missing: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
        log: RunLog | None = None,
    ) -> None:
        self._length, self._steps = length, length.steps
        self._every_s, self._missing, self._clock = every_s, missing, clock
        self._log = log or RunLog(TEXT, "")
        hidden = self._log.is_json or None  # None: where there is no terminal
        self._bar: Any = tqdm(total=self._steps, bar_format=BAR, dynamic_ncols=True, disable=hidden)
        self._told_s = clock()
        self._times: list[float] = []  # between the last steps, in seconds
        self._last_time_s = 0.0  # wall clock of the newest record
        self._waits_since_s: float | None = None
        self._patience_s = FIRST_WAIT_S

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def line(self, text: str, level: str = "info", **values: Any) -> None:
        """Print a line, above the bar if there is one; see `RunLog.tell`."""
        self._log.tell(text, level, lambda line: self._bar.write(line, file=sys.stderr), **values)

    def events(self, events: Iterable[dict[str, Any]]) -> None:
        """Tell of those events that a person wants to know of."""
        for event in events:
            if (text := format_event(event)) is not None:
                self.line(text, level_of(event), **event)

    def records(self, records: list[dict[str, Any]]) -> None:
        """Show new records of steps."""
        for record in records:
            if self._last_time_s:
                self._times = [*self._times[1 - RECENT :], float(record["time"]) - self._last_time_s]
            self._last_time_s = float(record["time"])
        if not records:
            return
        last = records[-1]
        step, loss = int(last["step"]), format_loss(last["loss"])
        speed, world = f"{last.get('tokens_per_s') or 0:,.0f} tokens/s", last.get("world_size", "?")
        left = f", {duration(median(self._times) * self._length.left(step))} left" if self._times else ""
        self._log.step, self._log.generation = step, int(last["generation"])
        self._bar.n = step
        self._bar.set_postfix_str(f"loss {loss}, {speed}, {world} workers{left}")
        if self._bar.disable and self._every_s and self._clock() - self._told_s >= self._every_s:
            self._told_s = self._clock()
            told: dict[str, Any] = {key: last.get(key) for key in TOLD}
            text = f"step {step:,} of {self._steps:,}: loss {loss}, {speed}, {world} workers{left}"
            self.line(text, event="progress", steps=self._steps, **told)

    def status(self, status: Mapping[str, Any]) -> None:
        """Tell of a run that waits: after ten seconds, and then more and more rarely."""
        if status.get("phase") != "waiting" or status.get("paused"):
            self._waits_since_s, self._patience_s = None, FIRST_WAIT_S
            return
        now_s = self._clock()
        if self._waits_since_s is None:
            self._waits_since_s = now_s
        if now_s - self._waits_since_s >= self._patience_s:
            self._patience_s += min(self._patience_s, MOST_WAIT_S)
            waited, here = duration(now_s - self._waits_since_s), f"{status['workers']} workers are here"
            text = f"waiting for {waited}: {status['reason']}; {here}; {self._missing()}"
            self.line(text, "warning", event="waiting", workers=status["workers"])
