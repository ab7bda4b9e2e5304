"""The coordinator's event log. Every line gets the time, the generation and the step; a worker's line its identity.

The lines go to a sink, which writes events.jsonl and experts.jsonl. A full disk stops the log, not the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from elastic_moe.control.events import LogEvent
from elastic_moe.control.state import State
from elastic_moe.types import Origin, View

MAX_VIEWS = 16  # that nobody has entered are remembered; of older ones it does not matter any more

T = TypeVar("T")
logger = logging.getLogger(__name__)


class EventLog:
    """Writes the lines of one run's event log.

    Args:
        sink: takes a line; it may raise OSError.
        clock: wall clock, seconds.
        monotonic: monotonic clock, seconds.
    """

    def __init__(
        self,
        sink: Callable[[dict[str, Any]], object],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sink, self._clock, self._monotonic = sink, clock, monotonic
        self._made_s = monotonic()
        self._views: dict[int, tuple[View, float]] = {}  # not entered yet: by generation, with its time
        self._entered = 0  # the newest generation that was entered

    def command(self, state: State, step: int, line: LogEvent, origin: Origin | None = None) -> None:
        """A line that the membership machine asks for. `origin`: of its worker, where the line is to have it."""
        identity = {"worker": line.worker, "node": line.node, "pid": line.pid} if line.worker else {}
        placed = {} if origin is None else origin._asdict()
        self._write(state, step, {"event": line.event, "reason": line.reason} | identity | placed)

    def worker_event(self, state: State, step: int, worker: str, event: Mapping[str, Any]) -> None:
        """A line that a worker sends."""
        self._write(state, step, dict(event) | _identity(state, worker))

    def view_published(self, state: State, step: int, view: View, planned: bool, reason: str, cause: str) -> None:
        """A new view: its kind, its cause, its size and its members. The time until it is entered counts from here."""
        self._views[view.generation] = view, self._monotonic()
        self._views = dict(sorted(self._views.items())[-MAX_VIEWS:])
        self._write(
            state,
            step,
            {
                "event": "view",
                "planned": planned,
                "reason": reason,
                "cause": cause,
                "world_size": len(view.active_ranks),
                "members": [m.worker for m in view.members],
            },
        )

    def entered(self, state: State, step: int, worker: str, generation: int, info: Mapping[str, Any]) -> None:
        """A member has entered a view. The first active rank gives the view's only line.

        The same rank sends the view's records on the same connection, so the line comes before them. The next view may
        have been published meanwhile: the members of a planned one enter the view before it first, and this line is
        what tells of a way back to storage. A line that is told again, after that of a later view, does not count.
        """
        view, published_s = self._views.get(generation, (state.view, self._made_s))  # else an adopted one
        if view is None or view.generation != generation or generation <= self._entered or not view.active_ranks:
            return
        if view.members[view.active_ranks[0]].worker != worker:
            return
        self._entered = generation
        self._views = {later: known for later, known in self._views.items() if later > generation}
        duration = {
            "event": "entered",
            "generation": generation,
            "world_size": len(view.active_ranks),
            "total_s": self._monotonic() - published_s,
        }
        self._write(state, step, duration | _identity(state, worker) | dict(info))

    def _write(self, state: State, step: int, event: dict[str, Any]) -> None:
        generation = state.view.generation if state.view else 0
        hand_over(self._sink, {"time": self._clock(), "generation": generation, "step": step} | event)


def hand_over(sink: Callable[[T], object], value: T) -> object:
    """Give a value to a sink that writes files, and return its answer.

    A file that cannot be written is reported, and the run goes on; the answer is None.
    """
    try:
        return sink(value)
    except OSError as error:
        logger.warning("cannot write a line of the run's files: %s", error)
        return None


def _identity(state: State, worker: str) -> dict[str, Any]:
    record = state.records.get(worker)
    return {"worker": worker} | ({"node": record.member.node, "pid": record.member.pid} if record else {})
