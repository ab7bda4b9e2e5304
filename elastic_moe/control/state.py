"""What the coordinator knows, as frozen values: one `WorkerRecord` per living worker, and the state of the run around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from elastic_moe.types import Member, View

WAITING, RUNNING, FINISHING, FINISHED, FAILED = "waiting", "running", "finishing", "finished", "failed"


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One living worker.

    Attributes:
        member: who it is; its `draining` flag is not used, the view's is.
        ready_s: when it became ready; None before.
        last_heard_s: when anything was last heard of it.
        last_progress: newest (generation, step, progress) of its main thread.
        last_progress_s: when `last_progress` last grew.
        drain_s: by when it must have left; None if it may stay.
        missing: it is in an adopted view and has not re-registered with this coordinator.
        finished: it did all steps.
        released: it was told to end itself.
    """

    member: Member
    ready_s: float | None = None
    last_heard_s: float = 0.0
    last_progress: tuple[int, int, int] = (0, 0, 0)
    last_progress_s: float = 0.0
    drain_s: float | None = None
    missing: bool = False
    finished: bool = False
    released: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """The whole membership.

    Attributes:
        target: number of workers to start with, and the largest number where the configuration names none.
        phase: waiting (for the first view, or for enough workers), running, finishing, finished, failed.
        reason: why the phase is what it is.
        records: living workers by id, in order of arrival.
        removed: ids of workers that were lost or evicted; they never come back.
        view: the newest view; `generation` is the highest number ever used and never decreases.
        entered: members that have entered the newest view.
        adopted_s: when the newest view was taken over from workers after a restart; None if this coordinator published it.
        suspected_s: when the first unexplained failure of the newest view was reported; None if there is none.
        reforms: views in a row that were published only because the one before failed to work.
        waiting_s: since when the run has waited; None while it runs.
        draining_nodes: nodes that take no new workers, with the time until which this holds.
        stopping: a stop was asked for.
        finishing_s: when the first member finished.
        step: newest step heard of.
        ticked_s: when the machine last saw the time.
    """

    target: int
    phase: str = WAITING
    reason: str = "waiting for workers"
    records: Mapping[str, WorkerRecord] = field(default_factory=dict[str, WorkerRecord])
    removed: frozenset[str] = frozenset()
    view: View | None = None
    generation: int = 0
    entered: frozenset[str] = frozenset()
    adopted_s: float | None = None
    suspected_s: float | None = None
    reforms: int = 0
    waiting_s: float | None = None
    draining_nodes: Mapping[str, float] = field(default_factory=dict[str, float])
    stopping: bool = False
    finishing_s: float | None = None
    step: int = 0
    ticked_s: float | None = None

    @property
    def over(self) -> bool:
        return self.phase in (FINISHED, FAILED)

    @property
    def view_workers(self) -> tuple[str, ...]:
        """Ids of the newest view's members that still live, in rank order."""
        return tuple(m.worker for m in self.view.members if m.worker in self.records) if self.view else ()

    @property
    def all_entered(self) -> bool:
        """Every active member of the newest view has entered it."""
        return self.view is not None and all(m.draining or m.worker in self.entered for m in self.view.members)

    def in_view(self, worker: str) -> bool:
        return self.view is not None and self.view.rank_of(worker) is not None

    def with_record(self, worker: str, **changes: Any) -> State:
        """The state with one seat changed; unchanged if there is no such worker."""
        if worker not in self.records:
            return self
        return replace(self, records={**self.records, worker: replace(self.records[worker], **changes)})

    def without(self, worker: str) -> State:
        """The state with a worker gone for good."""
        records = {name: record for name, record in self.records.items() if name != worker}
        return replace(self, records=records, removed=self.removed | {worker})
