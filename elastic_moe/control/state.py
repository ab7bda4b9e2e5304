"""The coordinator's knowledge as frozen values: one `WorkerRecord` per living worker, and the `State` of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from elastic_moe.control.frozen import replace
from elastic_moe.types import Member, View

WAITING, RUNNING, FINISHING, FINISHED, FAILED = "waiting", "running", "finishing", "finished", "failed"


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One living worker.

    Attributes:
        member: its identity. Its `draining` flag is not used; the flag in the view counts.
        ready_s: time at which it became ready; None before.
        last_heard_s: time of its last message.
        last_progress: newest (generation, step, progress) of its main thread.
        last_progress_s: time at which `last_progress` last changed.
        drain_s: deadline for its end; None if it may stay.
        hold_s: time from which the run does not count on it any more, some time before the deadline.
        closed_s: time at which its connection closed; None while it is connected.
        incarnation: how often it has registered after it was removed without proof of its death.
        entered: generation that it entered last; 0 before.
        joined_step: step of the run when it first entered a view; None before.
        aside_until_s: it stays outside of views until then, because no view formed with it.
        aside: how often it was set aside.
        reached: workers to which its links were proven by itself.
        ask_again_s: it is not asked to try its links before.
        refused_s: time at which another worker last reported that its port refused a connection.
        missing: it is in an adopted view and has not registered with this coordinator.
        finished: it did all steps.
        released: it was told to end itself.
        on_spot: its node is a spot machine.

    Times are monotonic seconds.
    """

    member: Member
    ready_s: float | None = None
    last_heard_s: float = 0.0
    last_progress: tuple[int, int, int] = (0, 0, 0)
    last_progress_s: float = 0.0
    drain_s: float | None = None
    hold_s: float | None = None
    closed_s: float | None = None
    incarnation: int = 0
    entered: int = 0
    joined_step: int | None = None
    aside_until_s: float = 0.0
    aside: int = 0
    reached: frozenset[str] = frozenset()
    ask_again_s: float = 0.0
    refused_s: float | None = None
    missing: bool = False
    finished: bool = False
    released: bool = False
    on_spot: bool = False

    @property
    def bears_state(self) -> bool:
        """It has entered a view, so it holds state."""
        return self.entered > 0


@dataclass(frozen=True, slots=True)
class Absent:
    """A worker that was removed without proof of its death. Its process may live and hold state.

    Attributes:
        last_heard_s: time of its last message.
        incarnation: as in `WorkerRecord`.
        bears_state: as in `WorkerRecord`.
        since_s: time of its removal.
        silent: it was removed with its connection open.
    """

    last_heard_s: float
    incarnation: int
    bears_state: bool
    since_s: float
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Backoff:
    """A node whose workers die before they make a step.

    Attributes:
        failures: such deaths in a row.
        until_s: no worker of the node joins until then.
    """

    failures: int
    until_s: float


@dataclass(frozen=True, slots=True)
class LinkCheck:
    """The members of the newest view try one another.

    Attributes:
        number: of the check.
        asked_s: time at which they were asked.
        since_s: time of the first of several such checks in a row.
        answered: members that have answered.
        broken: (member that reports, member that it does not reach).
        told: it was told that the run waits for broken links.
    """

    number: int
    asked_s: float
    since_s: float
    answered: frozenset[str] = frozenset()
    broken: frozenset[tuple[str, str]] = frozenset()
    told: bool = False


@dataclass(frozen=True, slots=True)
class HoldSave:
    """The save of the hold that the run is in.

    Attributes:
        members: those that save together, of the newest try.
        tries: of the save in this hold.
        again_s: time of the next try; None while one is under way, and when none is due.
        done: the state is saved, or there is none to save.
        told: it was told that a try has failed.
    """

    members: frozenset[str] = frozenset()
    tries: int = 0
    again_s: float | None = None
    done: bool = False
    told: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """The whole membership.

    Attributes:
        target: number of workers to start with, and the largest number where the configuration names none.
        phase: waiting (for the first view, or for enough workers), running, finishing, finished, failed.
        reason: cause of the phase.
        records: living workers by id, in order of arrival.
        removed: ids of workers that are dead or were evicted for good; they never come back.
        unheard: members of an adopted view that have not registered with this coordinator, and are not proven dead.
        lapsed: workers whose lease had run out in the view with which they registered, so that a newer one may exist.
        absent: workers that were removed without proof of their death, by id; they are taken in again when they say
            hello.
        fence_s: until then, no view may take its state from storage: a coordinator that was restarted does not know
            whether cut-off workers still commit.
        slots_needed: expert slots per MoE layer that the members must have together, where their number is limited.
        backoff: nodes whose workers die before they make a step.
        open_views: views of which a step may still be committed, the newest last.
        view: the newest view; `generation` is the highest number ever used and never decreases.
        entered: members that have entered the newest view.
        adopted_s: time at which a restarted coordinator took the newest view over from a worker; None if this
            coordinator published it.
        suspected_s: time of the first unexplained failure in the newest view; None if there is none.
        checks: number of the newest check of links.
        links: check of the members' links; None if there was no reason for one in the newest view.
        worked: members of the last view that all its active members have entered.
        in_doubt: members whose silence is waited out, because their state may be the last; told once.
        reforms: views in a row that were published only because the view before failed to work.
        waiting_s: time at which the run began to wait; None while it runs.
        saving: members of a hold that have not reported yet that they have saved their state, or cannot.
        saving_until_s: they are waited for until then.
        hold_save: the save of the hold; None outside of holds.
        failing: the run ends as failed for this reason once they have reported; "" if it does not.
        draining_nodes: nodes that take no new workers, with the time until which this holds.
        stopping: a stop was asked for.
        limit: largest number of workers that an operator asked for; 0 if none did.
        paused: an operator asked for a pause.
        finishing_s: time at which the first member finished.
        step: newest committed step that a worker has reported.
        ticked_s: time of the newest event.
    """

    target: int
    phase: str = WAITING
    reason: str = "waiting for workers"
    records: Mapping[str, WorkerRecord] = field(default_factory=dict[str, WorkerRecord])
    removed: frozenset[str] = frozenset()
    unheard: frozenset[str] = frozenset()
    lapsed: frozenset[str] = frozenset()
    absent: Mapping[str, Absent] = field(default_factory=dict[str, Absent])
    fence_s: float = 0.0
    slots_needed: int = 0
    backoff: Mapping[str, Backoff] = field(default_factory=dict[str, Backoff])
    open_views: tuple[View, ...] = ()
    view: View | None = None
    generation: int = 0
    entered: frozenset[str] = frozenset()
    adopted_s: float | None = None
    suspected_s: float | None = None
    checks: int = 0
    links: LinkCheck | None = None
    worked: frozenset[str] = frozenset()
    in_doubt: frozenset[str] = frozenset()
    reforms: int = 0
    waiting_s: float | None = None
    saving: frozenset[str] = frozenset()
    saving_until_s: float = 0.0
    hold_save: HoldSave | None = None
    failing: str = ""
    draining_nodes: Mapping[str, float] = field(default_factory=dict[str, float])
    stopping: bool = False
    limit: int = 0
    paused: bool = False
    finishing_s: float | None = None
    step: int = 0
    ticked_s: float | None = None

    @property
    def over(self) -> bool:
        """The run has finished or failed."""
        return self.phase in (FINISHED, FAILED)

    @property
    def view_workers(self) -> tuple[str, ...]:
        """Ids of the newest view's members that still live, in rank order."""
        records = self.records
        return tuple([m.worker for m in self.view.members if m.worker in records]) if self.view else ()

    @property
    def all_entered(self) -> bool:
        """Every active member of the newest view has entered it."""
        if self.view is None:
            return False
        entered = self.entered
        return not [m for m in self.view.members if m.worker not in entered and not m.draining]

    def in_view(self, worker: str) -> bool:
        """Whether the worker is a member of the newest view."""
        return self.view is not None and self.view.rank_of(worker) is not None

    def may_bear_state(self, worker: str) -> bool:
        """Whether a living worker is in a view, or has entered one."""
        return self.in_view(worker) or self.records[worker].bears_state

    def with_record(self, worker: str, **changes: Any) -> State:
        """The state with one worker's record changed; unchanged if there is no such worker."""
        if worker not in self.records:
            return self
        return replace(self, records={**self.records, worker: replace(self.records[worker], **changes)})

    def without(self, worker: str) -> State:
        """The state with a worker removed for good."""
        absent = {name: away for name, away in self.absent.items() if name != worker}
        unheard = self.unheard - {worker}
        return replace(self.forgetting(worker), removed=self.removed | {worker}, absent=absent, unheard=unheard)

    def forgetting(self, worker: str) -> State:
        """The state without a worker's record. It may register again."""
        return replace(self, records={name: record for name, record in self.records.items() if name != worker})

    def unproven(self, worker: str, now_s: float) -> State:
        """The state with a worker removed that may still live."""
        record = self.records[worker]
        silent = record.closed_s is None
        away = Absent(record.last_heard_s, record.incarnation, record.bears_state, now_s, silent)
        return replace(self.forgetting(worker), absent={**self.absent, worker: away})
