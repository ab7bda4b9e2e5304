"""What a driver shows while a run goes on: a bar on a terminal, elsewhere a line now and then; and what is missing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from types import TracebackType
from typing import Any

from tqdm import tqdm

from elastic_moe.metrics.format_event import format_loss
from elastic_moe.metrics.status_view import duration

FIRST_WAIT_S, MOST_WAIT_S = 10.0, 600.0  # waiting is told after so long, then after twice as long each time
RECENT = 50  # steps from which the time left is estimated


class Progress:
    """Shows a run on standard error.

    Args:
        steps: steps of the run.
        every_s: seconds between two lines where there is no terminal; 0: none.
        missing: says what is missing while the run waits, as a sentence; it may ask Ray.
        clock: monotonic seconds.
    """

    def __init__(
        self, steps: int, every_s: float, missing: Callable[[], str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps, self._every_s, self._missing, self._clock = steps, every_s, missing, clock
        self._bar: Any = tqdm(total=steps, unit="step", dynamic_ncols=True, disable=None)
        self._told_s = clock()
        self._times: list[float] = []  # between the last steps, in seconds
        self._last_time_s = 0.0  # wall clock of the newest record
        self._waits_since_s: float | None = None
        self._patience_s = FIRST_WAIT_S

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._bar.write(text, file=sys.stderr)

    def records(self, records: list[dict[str, Any]]) -> None:
        """Show new records of steps."""
        for record in records:
            if self._last_time_s:
                self._times = [*self._times[1 - RECENT :], float(record["time"]) - self._last_time_s]
            self._last_time_s = float(record["time"])
        if not records:
            return
        last = records[-1]
        step, speed = int(last["step"]), f"{last.get('tokens_per_s') or 0:,.0f} tokens/s"
        world = last.get("world_size", "?")
        self._bar.n = step
        self._bar.set_postfix_str(f"loss {format_loss(last['loss'])}  {speed}  world {world}  gen {last['generation']}")
        if self._bar.disable and self._every_s and self._clock() - self._told_s >= self._every_s:
            self._told_s = self._clock()
            left = f", {duration(median(self._times) * (self._steps - step))} left" if self._times else ""
            loss = format_loss(last["loss"])
            self.line(f"step {step:,} of {self._steps:,}: loss {loss}, {speed}, {world} workers{left}")

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
            self.line(f"waiting for {waited}: {status['reason']}; {here}; {self._missing()}")
