"""A run over wall-clock time, from its records: loss, speed, number of workers, and who came and went when.

The time between two lives of a run (`run.resume=auto`) is cut out, so that the axis is time in which the run was up.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from elastic_moe.metrics.records import read_events, read_metrics

LOST, LEFT, JOINED, RESUMED = "lost", "left", "joined", "resumed"  # kinds of marks
MAX_POINTS = 200  # of a curve
STEPS_PER_POINT = 4  # at least, so that single steps do not show in the speed

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A change of the membership.

    Attributes:
        at_s: seconds since the start.
        kind: LOST without warning, LEFT as planned, JOINED or RESUMED.
        count: workers.
        pause_s: for LOST, seconds until the next committed step; else 0.
    """

    at_s: float
    kind: str
    count: int
    pause_s: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """A run over wall-clock time; times are seconds since its first view.

    Attributes:
        end_s: time of the last committed step.
        steps: committed steps.
        lost_steps: committed steps that had to be made again.
        loss: (time, mean loss around it).
        tokens_per_s: (time, tokens committed per second around it).
        workers: (time, number of workers from then on).
        marks: changes of the membership, in order.
    """

    end_s: float
    steps: int
    lost_steps: int
    loss: Points
    tokens_per_s: Points
    workers: Points
    marks: tuple[Mark, ...]


def read_timeline(run_dir: str | Path) -> Timeline:
    """The timeline of a run directory.

    Raises:
        UserError: no step is recorded there.
    """
    return timeline_of(read_metrics(run_dir), read_events(run_dir))


def timeline_of(records: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> Timeline:
    """The timeline of a run's records and events, both in order; at least one record."""
    changes = list(memberships(events))
    commits = list(accumulate((float(record["time"]) for record in records), max))  # nodes' clocks differ a little
    clock = UpClock(commits, changes, records[0]["step_s"])
    at = [clock.elapsed_s(time) for time in commits]
    end_s = max(at[-1], 1e-3)
    width_s = max(end_s / MAX_POINTS, STEPS_PER_POINT * statistics.median(float(r["step_s"]) for r in records))
    return Timeline(
        end_s=end_s,
        steps=int(records[-1]["step"]),
        lost_steps=sum(int(event.get("lost_steps", 0)) for event in events if event["event"] == "entered"),
        loss=_means([(t, r["loss"]) for t, r in zip(at, records, strict=True) if r["loss"] is not None], width_s),
        tokens_per_s=token_rates(at, [int(record["tokens"]) for record in records], width_s, end_s),
        workers=[(clock.elapsed_s(change.time), float(change.world_size)) for change in changes],
        marks=tuple(marks_of(events, changes, commits, clock)),
    )


@dataclass(frozen=True)
class Membership:
    """Members of a view from the time when all of them had entered it."""

    time: float
    world_size: int
    members: frozenset[str]
    resumed: bool


def memberships(events: Sequence[dict[str, Any]]) -> Iterator[Membership]:
    """The memberships of a run, in order."""
    members: frozenset[str] = frozenset()
    before: frozenset[str] = frozenset()
    for event in events:
        if event["event"] == "view":
            members = frozenset(event.get("members", ()))
        elif event["event"] == "entered":
            yield Membership(event["time"], event["world_size"], members, bool(before) and not before & members)
            before = members


class UpClock:
    """Wall-clock time as seconds in which the run was up: from its first membership, without the time between lives.

    Args:
        commits: times of the committed steps, in order; at least one.
        changes: the memberships.
        first_step_s: duration of the first step, for a run without memberships.

    Attributes:
        start: the wall clock at 0.
        cuts: begin and end of every time that is left out.
    """

    def __init__(self, commits: Sequence[float], changes: Sequence[Membership], first_step_s: float = 0.0) -> None:
        self.start = changes[0].time if changes else commits[0] - first_step_s
        self.cuts: list[tuple[float, float]] = []
        for change in changes:
            last = bisect_right(commits, change.time) - 1
            if change.resumed and last >= 0:
                self.cuts.append((commits[last], change.time))

    def elapsed_s(self, time: float) -> float:
        cut_s = sum(max(min(time, end) - begin, 0.0) for begin, end in self.cuts)
        return max(time - self.start - cut_s, 0.0)

    def elapsed_of(self, times: np.ndarray) -> np.ndarray:
        """The same of many times."""
        elapsed = times - self.start
        for begin, end in self.cuts:
            elapsed = elapsed - np.maximum(np.minimum(times, end) - begin, 0.0)
        return np.maximum(elapsed, 0.0)


def marks_of(
    events: Sequence[dict[str, Any]], changes: Sequence[Membership], commits: Sequence[float], clock: UpClock
) -> Iterator[Mark]:
    """Marks in order: for every membership the workers who went, then those who came with the next one."""
    losses = [event for event in events if event["event"] in ("worker_lost", "worker_evicted")]
    for now, after in zip_longest(changes, changes[1:]):
        lost: dict[str, float] = {}
        for event in losses:
            ended = after is not None and event["time"] > after.time
            if event["worker"] in now.members and event["time"] >= now.time and not ended:
                lost.setdefault(event["worker"], event["time"])
        if lost and commits[-1] > min(lost.values()):
            time = min(lost.values())
            following = commits[bisect_right(commits, time)]
            yield Mark(clock.elapsed_s(time), LOST, len(lost), following - time)
        if after is None:
            return
        at_s = clock.elapsed_s(after.time)
        if after.resumed:
            yield Mark(at_s, RESUMED, len(after.members))
            continue
        if left := now.members - after.members - set(lost):
            yield Mark(at_s, LEFT, len(left))
        if joined := after.members - now.members:
            yield Mark(at_s, JOINED, len(joined))


def _means(points: Sequence[tuple[float, float]], width_s: float) -> Points:
    """Mean point of every window that has any."""
    windows: dict[int, list[tuple[float, float]]] = {}
    for time_s, value in points:
        windows.setdefault(int(time_s / width_s), []).append((time_s, value))
    return [
        (statistics.fmean(time_s for time_s, _ in window), statistics.fmean(value for _, value in window))
        for window in windows.values()
    ]


def token_rates(commits_s: Sequence[float], tokens: Sequence[int], width_s: float, end_s: float) -> Points:
    """Tokens per second in every window. A step's tokens are spread over the time since the step before it."""
    count = max(round(end_s / width_s), 1)
    edges = np.linspace(0.0, end_s, count + 1)
    done = np.interp(edges, [0.0, *commits_s], np.concatenate([[0], np.cumsum(tokens)]))
    middles = (edges[:-1] + edges[1:]) / 2
    return list(zip(middles.tolist(), (np.diff(done) * count / end_s).tolist(), strict=True))
