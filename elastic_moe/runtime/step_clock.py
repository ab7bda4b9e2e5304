"""The clock of a step: seconds of each phase, and of this rank's own work in it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")


class StepClock:
    """Measures one step after the other.

    Attributes:
        started_s: reading of the clock at the step's beginning.
        data_s: seconds in `reading` since then.
    """

    def __init__(self) -> None:
        self.started_s, self.data_s = time.perf_counter(), 0.0
        self._waited: Sequence[float] = (0.0,)
        self._first_waited_s = 0.0
        self._began: dict[str, tuple[float, float]] = {}  # phase -> the time, and the seconds waited so far

    def start(self, waited: Sequence[float]) -> None:
        """A step begins. `waited`: one-element sum of the seconds waited for others, see `Group.waited`."""
        self.started_s, self.data_s, self._waited = time.perf_counter(), 0.0, waited
        self._first_waited_s = waited[0]
        self._began.clear()

    def begin(self, phase: str) -> None:
        """A phase begins, and the one before it ends."""
        self._began[phase] = time.perf_counter(), self._waited[0]

    def stop(self) -> None:
        """No phase of this step was seen."""
        self._began.clear()

    @property
    def waited_s(self) -> float:
        """Seconds of the step in which this rank waited for others, so far."""
        return self._waited[0] - self._first_waited_s

    def own_s(self, *phases: str) -> float:
        """Seconds of phases in which this rank did not wait for others; of the present phase, so far."""
        marks = [*self._began.items(), ("", (time.perf_counter(), self._waited[0]))]
        spans = pairwise(marks)
        return sum(end[0] - began[0] - (end[1] - began[1]) for (name, began), (_, end) in spans if name in phases)

    def reading(self, items: Iterable[T]) -> Iterator[T]:
        """The items; the time that it takes to make them counts as reading of data."""
        iterator = iter(items)
        while True:
            began_s = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.data_s += time.perf_counter() - began_s
            yield item

    def seconds(self, ended_s: float) -> dict[str, float]:
        """Duration of each phase, the last one up to `ended_s`."""
        ends = [*(began_s for began_s, _ in self._began.values()), ended_s][1:]
        return {phase: end_s - at[0] for (phase, at), end_s in zip(self._began.items(), ends, strict=True)}
