"""The life of every worker, from the events of a run: one bar per worker, in rows that belong to its node.

A bar is cut into stretches with one state each. It ends with what happened to the worker. Bars that do not overlap
share a row, so a worker stands beside the one that it replaces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

STATES = ("starting", "waiting", "training", "re-forming", "draining", "silent", "paused", "set aside")
STARTING, WAITING, TRAINING, FORMING, DRAINING, SILENT, PAUSED, ASIDE = range(len(STATES))
LIVES, DIED, EVICTED, LEFT, FINISHED, CUT_OFF = "", "died", "evicted", "left", "finished", "cut off"
MAX_ROWS = 320  # that the page draws
MAX_STRETCHES = 20_000
_SILENCE = re.compile(r"(?:silent|no progress) for ([\d.]+) s")
_MEMBER = (TRAINING, FORMING, DRAINING, PAUSED)


@dataclass
class Bar:
    """One stay of a worker.

    Attributes:
        worker, node, pid: of the worker.
        stretches: (begin, end, state), wall clock, seconds.
        end: how it ended: LIVES, DIED, EVICTED, LEFT, FINISHED or CUT_OFF (the whole run was ended).
        reason: of the end.
        row: within its node.
    """

    worker: str
    node: str
    pid: int
    stretches: list[tuple[float, float, int]] = field(default_factory=list[tuple[float, float, int]])
    end: str = LIVES
    reason: str = ""
    row: int = 0

    @property
    def begin_s(self) -> float:
        return self.stretches[0][0]

    @property
    def end_s(self) -> float:
        return self.stretches[-1][1]


class _Open:
    """A bar that goes on: its present state, and since when."""

    def __init__(self, bar: Bar, state: int, since_s: float) -> None:
        self.bar, self.state, self.since_s = bar, state, since_s
        self.before = state  # a state that ends returns to this one

    def turn(self, state: int, now_s: float) -> None:
        if state != self.state:
            self._cut(now_s)
            self.before, self.state = self.state, state

    def close(self, end: str, reason: str, now_s: float) -> Bar:
        told = _SILENCE.search(reason)
        if end == EVICTED and told:
            silent_s = max(now_s - float(told[1]), self.bar.begin_s if self.bar.stretches else self.since_s)
            self.turn(SILENT, max(silent_s, self.since_s))
        self._cut(now_s)
        self.bar.end, self.bar.reason = end, reason
        return self.bar

    def _cut(self, now_s: float) -> None:
        if now_s > self.since_s or not self.bar.stretches:
            self.bar.stretches.append((self.since_s, max(now_s, self.since_s), self.state))
        self.since_s = max(now_s, self.since_s)


class Lives:
    """Follows the workers through the events of a run, in order."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}
        self._bars: list[Bar] = []
        self._view: frozenset[str] = frozenset()
        self._generation = 0

    def bars(self, events: Sequence[dict[str, Any]], end_s: float, goes_on: bool) -> list[Bar]:
        """The bars of all workers, by begin.

        Args:
            events: lines of events.jsonl.
            end_s: wall clock up to which the run is known.
            goes_on: whether workers without an end are taken to live.
        """
        for event in events:
            self._take(event)
        for worker in list(self._open):
            self._end(worker, LIVES if goes_on else CUT_OFF, "", max(end_s, self._open[worker].since_s))
        return sorted(self._bars, key=lambda bar: bar.begin_s)

    def _take(self, event: dict[str, Any]) -> None:
        now_s, worker, reason = float(event["time"]), event.get("worker", ""), str(event.get("reason", ""))
        match event["event"]:
            case "started" if not event.get("restarted"):
                self._end_all(CUT_OFF, "the run was ended", now_s)
            case "worker_connected" | "worker_ready" | "worker_readmitted":
                self._came(event, worker, now_s)
            case "worker_disconnected" if worker in self._open:
                self._open[worker].turn(SILENT, now_s)
            case "worker_set_aside" if worker in self._open:
                self._open[worker].turn(ASIDE, now_s)
            case "drain" if worker in self._open:
                self._open[worker].turn(DRAINING, now_s)
            case "worker_lost":
                self._end(worker, DIED, reason, now_s)
            case "worker_evicted":
                self._end(worker, EVICTED, reason, now_s)
            case "worker_left":
                self._end(worker, LEFT, reason, now_s)
            case "worker_finished":
                self._end(worker, FINISHED, reason, now_s)
            case "pause":
                self._members(lambda life: life.turn(PAUSED, now_s))
            case "view":
                self._published(event, now_s)
            case "entered" | "adopted":
                self._entered(now_s)
            case "finished" | "failed":
                self._end_all(FINISHED if event["event"] == "finished" else CUT_OFF, reason, now_s)
            case _:
                pass

    def _came(self, event: dict[str, Any], worker: str, now_s: float) -> None:
        life = self._open.get(worker)
        if life is None:
            bar = Bar(worker, str(event.get("node", "")), int(event.get("pid", 0)))
            begin_s = min(float(event.get("placed_s") or now_s), now_s)
            connected = event["event"] == "worker_connected"
            self._open[worker] = _Open(bar, STARTING if connected else WAITING, begin_s if connected else now_s)
        elif life.state == SILENT:
            life.turn(life.before, now_s)
        elif life.state == STARTING and event["event"] == "worker_ready":
            life.turn(WAITING, now_s)

    def _published(self, event: dict[str, Any], now_s: float) -> None:
        generation = int(event.get("generation", 0))
        members = frozenset(event.get("members", ()))
        if generation <= self._generation and not self._view & members:
            for worker in self._view & set(self._open):  # a new life; the end of the one before was not recorded
                self._end(worker, CUT_OFF, "the run was ended", self._open[worker].since_s)
        self._generation, self._view = generation, members
        if not event.get("planned"):
            self._members(lambda life: life.turn(FORMING, now_s) if life.state in (TRAINING, PAUSED) else None)

    def _entered(self, now_s: float) -> None:
        for worker in self._view - set(self._open):  # its beginning was not recorded
            self._open[worker] = _Open(Bar(worker, "", 0), TRAINING, now_s)
        for worker, life in self._open.items():
            if worker in self._view:
                if life.state != DRAINING:
                    life.turn(TRAINING, now_s)
            elif life.state in _MEMBER:
                life.turn(WAITING, now_s)

    def _members(self, act: Callable[[_Open], None]) -> None:
        for worker in self._view & set(self._open):
            act(self._open[worker])

    def _end(self, worker: str, end: str, reason: str, now_s: float) -> None:
        life = self._open.pop(worker, None)
        if life is not None:
            self._bars.append(life.close(end, reason, now_s))

    def _end_all(self, end: str, reason: str, now_s: float) -> None:
        for worker in list(self._open):
            self._end(worker, end, reason, now_s)


def pack(bars: Sequence[Bar]) -> list[tuple[str, int]]:
    """Give each bar a row within its node. Returns (node, rows) in the order in which the nodes came."""
    ends: dict[str, list[float]] = {}
    for bar in bars:
        rows = ends.setdefault(bar.node, [])
        free = [row for row, end_s in enumerate(rows) if end_s <= bar.begin_s]
        bar.row = max(free, key=lambda row: rows[row]) if free else len(rows)
        rows[bar.row : bar.row + 1] = [bar.end_s]
    return [(node, len(rows)) for node, rows in ends.items()]


def lanes(bars: Sequence[Bar], elapsed_s: Callable[[float], float]) -> dict[str, Any]:
    """The bars for the page, with times by this clock.

    Of very many rows those are left out whose workers did nothing but train; `hidden` counts their workers.
    """
    nodes = pack(bars)
    eventful = {bar.node for bar in bars if bar.end in (DIED, EVICTED, LEFT)}
    kept: list[str] = []
    rows = 0
    for node, count in sorted(nodes, key=lambda each: each[0] not in eventful):
        if rows + count <= MAX_ROWS or not kept:
            kept.append(node)
            rows += count
    numbers = {node: number for number, (node, _) in enumerate(nodes)}
    shown = [bar for bar in bars if bar.node in kept]
    stretches = sum(len(bar.stretches) for bar in shown)
    return {
        "states": STATES,
        "nodes": [{"id": node, "number": numbers[node], "rows": count} for node, count in nodes if node in kept],
        "bars": [_drawn(bar, elapsed_s, whole=stretches <= MAX_STRETCHES) for bar in shown],
        "hidden": len({bar.worker for bar in bars if bar.node not in kept}),
    }


def _drawn(bar: Bar, elapsed_s: Callable[[float], float], whole: bool) -> dict[str, Any]:
    """One bar; unless `whole`, a stretch of less than a thousandth of the bar is joined to the one before it."""
    least_s = 0.0 if whole else 1e-3 * (bar.end_s - bar.begin_s)
    parts: list[list[float]] = []
    for begin_s, end_s, state in bar.stretches:
        if parts and (parts[-1][2] == state or end_s - begin_s < least_s):
            parts[-1][1] = round(elapsed_s(end_s), 3)
        else:
            parts.append([round(elapsed_s(begin_s), 3), round(elapsed_s(end_s), 3), state])
    return {
        "worker": bar.worker, "node": bar.node, "pid": bar.pid, "row": bar.row, "parts": parts, "end": bar.end,
        "reason": bar.reason,
    }  # fmt: skip
