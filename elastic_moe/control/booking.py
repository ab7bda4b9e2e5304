"""Books the workers' time from a run's events and step records, in the order of their times. Pure.

It takes events.jsonl and metrics.jsonl line by line, so it serves a run that goes on, one that has ended, and a
simulated one. A record costs the same however many workers there are; only a view costs time for each member.

The members' time since the last record is kept apart, until the next line tells what became of it: a step, a view that
the members agreed on, or a failure. All other workers' time is booked at once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from elastic_moe.control import causes
from elastic_moe.control.goodput import (
    CHECKPOINT,
    EVALUATION,
    IMBALANCE,
    RECOVERING,
    REDONE,
    START,
    STRAGGLERS,
    TIME_CAUSES,
    TRAINING,
    WAITING,
    Goodput,
)
from elastic_moe.control.roster import LOADING, MEMBER, READY, Life, Roster

Json = Mapping[str, Any]

IDLE, FORMING, STEPS, HOLD, ENDING = "idle", "forming", "steps", "hold", "ending"  # phases of a run
FAILURES = (causes.DEATH, causes.EVICTION, causes.HANG, causes.COLLECTIVE, causes.COORDINATOR)
SMOOTH = 0.2  # weight of the newest step in the usual length of a step
MAX_PLACING_S = 3600.0  # a worker that says it was placed longer ago has another clock


@dataclass
class Ledger:
    """The sums, and the members' time since the last mark, which is not booked yet.

    Attributes:
        booked: cause -> seconds of workers.
        node_s: kind of node -> seconds.
        up_s: seconds in which a worker lived.
        now_s: time of the newest line.
        since_s: time of the last mark.
        open_s: seconds of members since then.
        eval_s: seconds of evaluations since then.
    """

    booked: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TIME_CAUSES, 0.0))
    node_s: dict[str, float] = field(default_factory=dict[str, float])
    up_s: float = 0.0
    now_s: float = 0.0
    since_s: float = 0.0
    open_s: float = 0.0
    eval_s: float = 0.0

    def copy(self) -> Ledger:
        """Another one with the same content."""
        return replace(self, booked=dict(self.booked), node_s=dict(self.node_s))

    def count_node(self, kind: str, seconds: float) -> None:
        """Nodes of a kind had a worker."""
        self.node_s[kind] = self.node_s.get(kind, 0.0) + seconds

    def take(self, cause: str, share: float) -> None:
        """Book a share of the members' time."""
        taken_s = share * self.open_s
        self.booked[cause] += taken_s
        self.open_s -= taken_s

    def part(self, wall_s: float, cause: str, part_s: float) -> float:
        """Book so many seconds of each member, out of `wall_s`. Returns the seconds that are left."""
        part_s = min(part_s, wall_s)
        if wall_s > 0:
            self.take(cause, part_s / wall_s)
        return wall_s - part_s

    def evaluated(self, wall_s: float) -> float:
        """Book the evaluations; as `part`."""
        eval_s, self.eval_s = self.eval_s, 0.0
        return self.part(wall_s, EVALUATION, eval_s)

    def close(self, cause: str) -> None:
        """Book what is left, evaluations first, and set a new mark."""
        self.evaluated(self.now_s - self.since_s)
        self.take(cause, 1.0)
        self.since_s = self.now_s


class Books:
    """The books of one run."""

    def __init__(self) -> None:
        self._ledger, self._roster, self._phase = Ledger(), Roster(), IDLE
        self._failures, self._repairs, self._repair_s = 0, 0, 0.0
        self._views: dict[int, tuple[tuple[str, ...], bool]] = {}  # published: members, and whether it may wait
        self._unheard: set[str] = set()  # members that a restarted coordinator has not heard
        self._usual_s = 0.0  # length of a step
        self._highest = 0  # step
        self._failed, self._broken_s = False, -1.0  # a worker has failed since the last mark; begin of the repair

    def lines(self, lines: Iterable[tuple[bool, Json]]) -> None:
        """Take lines in the order of their times. Each: whether it is an event, and the line."""
        for is_event, line in lines:
            (self.event if is_event else self.step)(line)

    def step(self, record: Json) -> None:
        """A record of metrics.jsonl: a step was committed."""
        self._advance(float(record.get("time") or self._ledger.now_s))
        generation = int(record.get("generation", 0))
        if self._phase == FORMING and generation in self._views:
            self._enter(generation)  # the line that told so is lost
        if self._phase == STEPS:
            self._settle(record)
        self._highest = max(self._highest, int(record["step"]))

    def event(self, event: Json) -> None:
        """A line of events.jsonl."""
        now_s, worker = float(event.get("time") or self._ledger.now_s), str(event.get("worker", ""))
        if event["event"] == "started":
            self._start(now_s, bool(event.get("restarted")))
        self._advance(now_s)
        match event["event"]:
            case "worker_connected" | "worker_readmitted":
                self._connect(worker, event)
            case "worker_ready" if worker in self._roster.lives:
                if self._roster.lives[worker].place == LOADING:
                    self._roster.move(worker, READY)
            case "worker_lost" | "worker_evicted":
                self._lose(worker)
            case "worker_disconnected" if worker in self._roster.lives and not self._in_view(worker):
                self._roster.set_away(worker, self._ledger.now_s)
            case "worker_finished":
                self._ledger.close(CHECKPOINT)
                self._phase = ENDING
                self._roster.end(worker)
            case "worker_left" | "worker_released":
                self._roster.end(worker)
            case "view":
                self._publish(event)
            case "entered":
                self._enter(int(event.get("generation", 0)))
            case "pause":
                self._cut_off(broken=self._failed)
                self._phase = HOLD
            case "evaluated" | "sample":
                self._ledger.eval_s += float(event.get("eval_s") or event.get("sample_s") or 0.0)
            case "finished" | "failed":
                self._end_all()
            case _:
                pass

    def at(self, now_s: float) -> Goodput:
        """The books at a time. Time whose outcome is not known yet counts as what the run is at."""
        now = copy.copy(self)
        now._ledger = ledger = self._ledger.copy()
        if now._roster.lives:
            now._advance(now_s)
        ledger.close(CHECKPOINT if self._phase == ENDING else TRAINING)
        return Goodput(ledger.booked, ledger.node_s, ledger.up_s, self._failures, self._repairs, self._repair_s)

    def _advance(self, now_s: float) -> None:
        """Time passes. A line that is older than one before it finds its time booked."""
        ledger, counts = self._ledger, self._roster.counts
        passed_s = now_s - ledger.now_s
        if passed_s <= 0:
            return
        ledger.now_s = now_s
        if not self._roster.lives:
            ledger.since_s = now_s
            return
        ledger.up_s += passed_s
        for kind, nodes in self._roster.kinds.items():
            ledger.count_node(kind, nodes * passed_s)
        waits = self._phase in (IDLE, HOLD)
        ledger.booked[START] += passed_s * (counts[LOADING] + (0 if waits else counts[READY]))
        ledger.booked[WAITING] += passed_s * (counts[READY] if waits else 0)
        if self._phase in (STEPS, ENDING):
            ledger.open_s += passed_s * counts[MEMBER]
        else:
            ledger.booked[WAITING if self._phase == HOLD else RECOVERING] += passed_s * counts[MEMBER]

    # --- the members' time since the last mark ---

    def _settle(self, record: Json) -> None:
        """It went into a step."""
        ledger, members = self._ledger, self._roster.counts[MEMBER]
        draining = max(0, members - int(record.get("world_size", members)))
        if members and draining:
            ledger.take(RECOVERING, draining / members)
        left_s = ledger.part(ledger.now_s - ledger.since_s, CHECKPOINT, float(record.get("held_s") or 0.0))
        left_s = ledger.evaluated(left_s)
        if left_s > 0:
            self._usual_s += (SMOOTH if self._usual_s else 1.0) * (left_s - self._usual_s)
        again = int(record["step"]) <= self._highest
        if not again:
            left_s = ledger.part(left_s, IMBALANCE, float(record.get("imbalance_s") or 0.0))
            ledger.part(left_s, STRAGGLERS, float(record.get("straggler_s") or 0.0))
        ledger.close(REDONE if again else TRAINING)
        self._failed = False

    def _cut_off(self, broken: bool) -> None:
        """The step was cut off: as much as a step takes is lost work, the rest is the time until that was noticed.

        Args:
            broken: by a failure, so a repair begins.
        """
        ledger = self._ledger
        if broken and self._broken_s < 0 and self._phase == STEPS:
            self._broken_s = ledger.since_s
        ledger.part(ledger.evaluated(ledger.now_s - ledger.since_s), REDONE, self._usual_s)
        ledger.close(RECOVERING)

    # --- views ---

    def _publish(self, event: Json) -> None:
        """A view was published. Where it may wait, the members make steps until all have agreed on it."""
        waits = bool(event.get("planned")) and self._phase == STEPS
        self._views[int(event["generation"])] = tuple(event.get("members", ())), waits
        if not waits:
            self._cut_off(broken=event.get("cause") in FAILURES)
            self._phase = FORMING

    def _enter(self, generation: int) -> None:
        """Steps go on in a view, unless one that does not wait was published since."""
        if generation not in self._views:
            return
        members = set(self._views[generation][0])
        self._views = {later: view for later, view in self._views.items() if later > generation}
        self._ledger.close(RECOVERING)
        for worker in list(self._roster.lives):
            if worker in members:
                self._roster.move(worker, MEMBER)
            elif self._roster.lives[worker].place == MEMBER:
                self._roster.move(worker, READY)
                if worker in self._unheard:
                    self._roster.end(worker)
        self._unheard &= members
        if not all(waits for _, waits in self._views.values()):
            return
        self._phase, self._failed = STEPS, False
        if self._broken_s >= 0:
            self._repairs, self._repair_s = self._repairs + 1, self._repair_s + self._ledger.now_s - self._broken_s
            self._broken_s = -1.0

    def _in_view(self, worker: str) -> bool:
        is_member = self._roster.lives[worker].place == MEMBER
        return is_member or any(worker in members for members, _ in self._views.values())

    # --- workers ---

    def _connect(self, worker: str, event: Json) -> None:
        """A worker has registered: a new one, one that comes back, or one that a restarted coordinator did not know."""
        ledger = self._ledger
        self._unheard.discard(worker)
        if worker in self._roster.lives:
            return
        life, since_s = self._roster.gone.pop(worker, (None, 0.0))
        if life is None:
            life = Life(str(event.get("node", "")), str(event.get("node_kind", "")))
            since_s = float(event.get("placed_s") or ledger.now_s)
            since_s = since_s if ledger.now_s - MAX_PLACING_S < since_s < ledger.now_s else ledger.now_s
        away_s, was_member = ledger.now_s - since_s, life.place == MEMBER
        ledger.booked[RECOVERING if was_member else START] += away_s
        life.place = READY if was_member else life.place
        if not self._roster.lives:
            ledger.up_s += away_s
        if self._roster.add(worker, life):
            ledger.count_node(life.kind, away_s)

    def _lose(self, worker: str) -> None:
        """A worker was removed: it has died, or it gives no sign and may come back."""
        if worker in self._roster.lives:
            self._failures, self._failed = self._failures + 1, True
        self._roster.set_away(worker, self._ledger.now_s)

    def _start(self, now_s: float, restarted: bool) -> None:
        """A coordinator begins: of a new start of the run, or in place of one that was lost."""
        if restarted:
            self._advance(now_s)
            for worker in [w for w in self._roster.lives if not self._in_view(w)]:
                self._roster.set_away(worker, now_s)
            self._unheard = set(self._roster.lives)
            return
        if self._roster.lives:
            self._failures += 1  # the start before was cut off: its workers were seen last at its last line
        self._end_all()
        self._ledger.now_s = self._ledger.since_s = max(now_s, self._ledger.now_s)

    def _end_all(self) -> None:
        self._cut_off(broken=False) if self._phase == STEPS else self._ledger.close(CHECKPOINT)
        for worker in list(self._roster.lives):
            self._roster.end(worker)
        self._roster.gone.clear()
        self._views, self._phase, self._broken_s = {}, IDLE, -1.0
        self._unheard.clear()
