"""Turns records, events and the coordinator's status into values of the metrics in `exported.py`.

Nothing here knows Ray or a clock. Counters count what was written to the run's files, where each step and each event
stands once, so a coordinator that is started again counts nothing twice. What describes the standing state, such as
the age of a checkpoint, is made anew at each call, so it is right while nothing happens.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any, NamedTuple, TypedDict

from elastic_moe.control.causes import COORDINATOR, DEATH, EVICTION, gravest
from elastic_moe.metrics.exported import FAILED, FINISHED, FROM_RECORDS, LEFT, PAUSED, PHASES, RUNNING

REMEMBERED = 1024  # newest steps of which the time of the commit is known, and newest checkpoints
_ENDS = {"worker_lost": DEATH, "worker_evicted": EVICTION, "worker_left": LEFT}
_CAME = (1, 2)  # kinds of moves of experts: a copy or a home has come

Json = Mapping[str, Any]


class Status(TypedDict):
    """The used part of the coordinator's status, see `coordination.membership.RunStatus`."""

    steps: int
    world_size: int
    generation: int
    phase: str
    workers: int
    limit: int
    paused: bool


class Sample(NamedTuple):
    """A value: of a gauge the present one, of a counter the increase, of a histogram one observation.

    Attributes:
        name: of the metric, without prefixes.
        value: the value; nan: it is not known, or was not finite.
        tag: value of the metric's own tag; "" where it has none.
    """

    name: str
    value: float
    tag: str = ""


def of_goodput(line: Json) -> list[Sample]:
    """The samples of a line of goodput.jsonl. What is not known, such as a cost without prices, has none."""
    samples = [Sample("worker_time_s", seconds, cause) for cause, seconds in line["worker_s"].items()]
    names = ("goodput", "ettr", "mttr_s", "mtbf_s", "failures", "cost")
    return samples + [Sample(name, float(line[name])) for name in names if line[name] is not None]


class RunMetrics:
    """The metrics of one run.

    Args:
        max_workers: largest number of workers.
        began_s: wall clock at the start of this process.
    """

    def __init__(self, max_workers: int, began_s: float) -> None:
        self._max_workers, self._began_s = max_workers, began_s
        self._last: Json = {}
        self._values: dict[str, float] = {}  # gauges that events and records set
        self._counts: Counter[tuple[str, str]] = Counter()  # since the last call of `samples`
        self._observed: list[Sample] = []  # the same
        self._committed_s: dict[int, float] = {}  # step -> wall clock, in order
        self._checkpoints: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)  # step, wall clock
        self._cause = ""  # gravest cause of the views that were published since the last one was entered

    def recall(self, last: Json | None, events: Iterable[Json]) -> None:
        """Take over what an earlier coordinator has written. It has counted it too, so nothing is counted here."""
        for event in events:
            self.event(event)
        if last:
            self.record(last)
        self._counts.clear()
        self._observed.clear()

    def record(self, record: Json) -> None:
        """A step was committed, and its record written."""
        self._last = record
        for metric in FROM_RECORDS:
            self._set(metric.name, record.get(metric.name))
        self._count("steps")
        self._count("tokens", record.get("tokens"))
        self._count("skipped_steps", bool(record.get("skipped")))
        self._observe("step_s", record.get("step_s"))
        self._committed_s[int(record["step"])] = float(record.get("time") or 0.0)
        while len(self._committed_s) > REMEMBERED:
            del self._committed_s[next(iter(self._committed_s))]
        if loads := record.get("layer_max_load"):
            self._set("max_vio", mean(loads) - 1)
            self._set("max_vio_worst_layer", max(loads) - 1)
        if balances := record.get("layer_balance"):
            factors = [1 / max(balance, 1e-9) for balance in balances]
            self._set("avg_overload_factor", mean(factors))
            self._set("max_overload_factor", max(factors))

    def event(self, event: Json) -> None:
        """A line of events.jsonl or experts.jsonl was written."""
        match event.get("event"):
            case "view" if event.get("generation", 0) > 1:
                self._cause = gravest(filter(None, (self._cause, event.get("cause", ""))))
            case "entered":
                if event.get("generation", 0) > 1:
                    self._count("recoveries", 1, self._cause or COORDINATOR)
                    self._observe("recovery_s", event.get("total_s"))
                self._count("lost_steps", event.get("lost_steps"))
                self._cause = ""
            case "worker_lost" | "worker_evicted" | "worker_left" as kind:
                self._count("ended_workers", 1, _ENDS[kind])
            case "checkpoint":
                self._checkpoint(int(event["step"]), float(event["time"]), event.get("bytes"))
            case "checkpoint_failed":
                self._count("checkpoint_failures")
            case "timeline":
                kept = [found for found in self._checkpoints if found[0] <= event["step"]]
                self._checkpoints = deque(kept, maxlen=REMEMBERED)
            case "evaluated":
                self._set("val_loss", event.get("val_loss"))
            case "expert_load":
                self._set("dead_experts", sum(tokens == 0 for layer in event["load"] for tokens in layer))
            case "placement" if event.get("cause") == "load":
                self._count("expert_moves", sum(move[3] in _CAME for move in event["moves"]))

    def samples(self, status: Status, now_s: float) -> list[Sample]:
        """All gauges, and what counters and histograms have got since the last call.

        Args:
            status: present status of the run.
            now_s: wall clock.
        """
        gauges = [Sample(name, value) for name, value in self._values.items()]
        gauges += self._membership(status)
        step = int(self._last.get("step", 0))
        saved, saved_s = max(self._checkpoints, default=(0, self._began_s))
        committed_s = float(self._last.get("time") or self._began_s)
        gauges += [
            Sample("planned_steps", status["steps"]),
            Sample("step_age_s", max(0.0, now_s - committed_s)),
            Sample("checkpoint_step", saved),
            Sample("checkpoint_age_s", max(0.0, now_s - saved_s)),
            Sample("checkpoint_lag_steps", max(0, step - saved)),
        ]
        counted = [Sample(name, count, tag) for (name, tag), count in self._counts.items()]
        observed, self._observed = self._observed, []
        self._counts.clear()
        return gauges + counted + observed

    def _membership(self, status: Status) -> list[Sample]:
        over = status["phase"] in (FINISHED, FAILED)
        phase = PAUSED if status["paused"] and not over else status["phase"]
        works = phase == RUNNING
        wanted = 0 if over else min(status["limit"] or self._max_workers, self._max_workers)
        still = [] if works or "tokens_per_s" not in self._values else [Sample("tokens_per_s", 0.0)]
        return [
            *still,
            *(Sample("phase", float(name == phase), name) for name in PHASES),
            Sample("generation", status["generation"]),
            Sample("world_size", status["world_size"] if works else 0),
            Sample("workers", status["workers"]),
            Sample("wanted_workers", wanted),
            Sample("missing_workers", max(0, wanted - status["workers"])),
        ]

    def _checkpoint(self, step: int, now_s: float, size: float | None) -> None:
        self._checkpoints.append((step, now_s))
        self._set("checkpoint_bytes", size)
        self._count("checkpoints")
        if step in self._committed_s:
            self._observe("checkpoint_s", max(0.0, now_s - self._committed_s[step]))

    def _set(self, name: str, value: float | None) -> None:
        self._values[name] = math.nan if value is None else float(value)

    def _count(self, name: str, amount: float | None = 1, tag: str = "") -> None:
        if amount and amount > 0:
            self._counts[name, tag] += amount  # type: ignore[assignment]

    def _observe(self, name: str, value: float | None) -> None:
        if value is not None:
            self._observed.append(Sample(name, float(value)))
