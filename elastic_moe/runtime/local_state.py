"""Everything of a run that one worker keeps from one generation to the next."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from elastic_moe.control.protocol import Status
from elastic_moe.control.speeds import MemberSpeed
from elastic_moe.control.spikes import DataPosition, SpikeGuard
from elastic_moe.control.vote import VoteResult
from elastic_moe.runtime.state import HeldState

MAX_RECORDS = 4096  # without a coordinator, older records are given up

logger = logging.getLogger(__name__)


@dataclass
class LocalState:
    """State of this worker, and how far it has come.

    Attributes:
        committed: last step whose update is in the held state; -1 before any state exists.
        reduced: step whose reduced gradients are complete here (own and mirrored); -1 for none.
        vote: result of the last committed step's vote; None if the state came from a checkpoint or is new.
        evaluated: last step that was evaluated.
        records: records of committed steps that may not be in the run's files. The next leader reports those that a
            dead one did not.
        dropped: steps whose records were given up, because the coordinator was away for too long; reported once.
        holdings: the state at step `committed`. It has more than one entry while the state moves to its new owners:
            what a unit is in several of them is the same memory.
        guard: the history of losses, from which spikes are told; None if `optim.spike` is off.
        goes_back: `optim.spike` is rollback.
        position: in the data.
        held_s: seconds since the last step in which training stood still for a checkpoint.
        speed: of this worker, as it was last measured.
        timeline: generation in which the state was last read from storage or initialised; 0 before.
    """

    committed: int = -1
    reduced: int = -1
    vote: VoteResult | None = None
    evaluated: int = -1
    records: deque[dict[str, Any]] = field(default_factory=deque[dict[str, Any]])
    dropped: int = 0
    holdings: list[HeldState] = field(default_factory=list)
    guard: SpikeGuard | None = None
    goes_back: bool = False
    position: DataPosition = field(default_factory=DataPosition)
    held_s: float = 0.0
    speed: MemberSpeed = field(default_factory=MemberSpeed)
    timeline: int = 0

    @classmethod
    def empty(cls, spike: str) -> LocalState:
        """No state yet. `spike`: as `optim.spike`."""
        return cls(guard=None if spike == "off" else SpikeGuard(), goes_back=spike == "rollback")

    def commit(self, vote: VoteResult) -> None:
        """The update of a step is in the held state."""
        self.committed, self.vote = vote.step, vote
        if vote.spike and self.goes_back:
            self.position = self.position.after_spike(vote.step)
        elif self.guard is not None:
            self.guard.add(vote.loss, vote.grad_norm)

    def add_record(self, record: dict[str, Any]) -> None:
        """Keep the record of a committed step until it is known to be in the run's files."""
        self.records.append(record)
        if len(self.records) > MAX_RECORDS:
            if not self.dropped:
                logger.warning("the coordinator has confirmed no record for %d steps: older ones are lost", MAX_RECORDS)
            self.records.popleft()
            self.dropped += 1

    def forget_recorded(self, step: int) -> None:
        """The records of all steps up to this one are in the run's files."""
        while self.records and self.records[0]["step"] <= step:
            self.records.popleft()

    def begin_timeline(self, generation: int, step: int, skipped: int) -> None:
        """The state of this step, reached with so many batches left out, comes from storage, or is new.

        Nothing is known about the steps before, but for the history of losses if the run has gone back by itself.
        """
        self.vote, self.timeline = None, generation
        if self.guard is not None and self.position.go_on_at < 0:
            self.guard.clear()
        self.position = self.position.back_at(step, skipped)

    @property
    def status(self) -> Status:
        """This worker's report for the recovery.

        A state without a vote counts as voted on: it is complete. A worker without state has committed nothing, even if
        it knows the last vote. So it never counts as a rank that can roll forward.
        """
        voted = self.committed if self.vote is None else self.vote.step
        known = (self.committed, self.reduced) if self.holdings else (-1, -1)
        return Status(*known, voted, self.timeline)
