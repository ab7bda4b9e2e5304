"""Decides when a worker's part of a checkpoint is due, and sees to it that the last one is complete.

A checkpoint is due at every `checkpoint.every_steps`-th step and where one stays for good (`coordination.save_steps`),
at the last step, and after the step whose vote has a wish for one. A rank wishes for one when the coordinator asks for
it, when `checkpoint.every_minutes` have passed on its clock, and when the run has left data out
(`optim.spike=rollback`): only checkpoints tell a resumed run of that. The sum of the wishes is the same on every rank,
so all ranks save the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from elastic_moe.checkpoint.bounded import Activity, Call
from elastic_moe.checkpoint.reader import newest_manifest
from elastic_moe.config.schema import TrainConfig
from elastic_moe.coordination.save_steps import SaveSteps
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.run_dir import checkpoint_root
from elastic_moe.runtime.checkpoints import CONFIRM_S, ShardWriter
from elastic_moe.runtime.durable import FIRST_PAUSE_S, LAST_PAUSE_S
from elastic_moe.runtime.local_state import LocalState
from elastic_moe.runtime.reporter import Reporter
from elastic_moe.runtime.session import GenerationContext
from elastic_moe.runtime.state import HeldState, union
from elastic_moe.runtime.together import gather, pause, together


@dataclass(frozen=True)
class Share:
    """One rank's share of a checkpoint.

    Attributes:
        rank, leader: of this worker, and of the rank that looks for the manifest.
        generation: of the group.
        held: state that has the units.
        units: indices of the units that the rank saves.
    """

    rank: int
    leader: int
    generation: int
    held: HeldState
    units: Sequence[int]


class Saver:
    """One worker's part in the checkpoints of its run.

    Args:
        config: the run's configuration.
        local: this worker's state.
        writer: writes checkpoint shards.
        reporter: sends events.
        asked: returns the step for which, or for a later one, the coordinator wants a checkpoint; -1 if for none.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: TrainConfig,
        local: LocalState,
        writer: ShardWriter,
        reporter: Reporter,
        asked: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._local, self._writer, self._reporter = config, local, writer, reporter
        self._asked, self._clock = asked, clock
        self._steps = SaveSteps(config)
        self._saved_step = self._answered = -1
        self._saved_s: float | None = None  # None before the first view
        self._skipped = 0  # batches left out, as far as this rank need not see to it that they are saved

    def begin_view(self) -> None:
        """A view is entered, perhaps at an earlier step than the last checkpoint."""
        self._saved_step = min(self._saved_step, self._local.committed)
        self._answered = min(self._answered, self._local.committed)
        if self._saved_s is None:
            self._saved_s, self._skipped = self._clock(), self._local.position.skipped

    def wishes(self) -> bool:
        """Whether this rank wishes for a checkpoint of the step in flight."""
        every_s = 60 * self._config.checkpoint.every_minutes
        too_long = 0 < every_s <= self._clock() - (self._saved_s or 0.0)
        return too_long or self._asked() > self._answered or self._local.position.skipped != self._skipped

    def save_if_due(self, context: GenerationContext, wished: bool) -> bool:
        """Save the committed step if that is due, and return whether it was.

        Args:
            context: of the view.
            wished: a rank wished for it in the step's vote.
        """
        due = wished or self._steps.due(self._local.committed)
        if due:
            self.save(context)
        return due

    def save(self, context: GenerationContext) -> None:
        """Save the committed step, unless it is being saved already."""
        if self._local.committed != self._saved_step:
            self._write(_share_of(context))

    def confirm(self, context: GenerationContext) -> None:
        """Wait until the last checkpoint is complete; its shards are written again where something failed. Collective.

        The wait ends after `checkpoint.wait_s`, and that the state is not saved is then reported.
        """
        self._confirm(context.group, _share_of(context))

    def save_held(self, group: Group, roles_RU: np.ndarray, may_go_on: Callable[[], None]) -> None:
        """Save the committed step from what the ranks of a hold have, however long the hold lasts; collective.

        Args:
            group: the hold's collectives.
            roles_RU: uint8 [R, U], the role in which each rank has each unit; every unit is held.
            may_go_on: called before each further try; it raises where this worker should rather end.
        """
        step, leader = self._local.committed, int(roles_RU.any(axis=1).argmax())
        if group.rank == leader:
            for record in self._local.records:
                self._reporter.record(record)
        look = together(group, lambda activity: group.rank == leader and self._is_complete(step, activity))
        if int(gather(group, int(_holds(look)))[leader]):
            return
        units = np.flatnonzero(roles_RU.argmax(axis=0) == group.rank).tolist()
        held = union(self._local.holdings) if units else HeldState((), np.zeros(0), ())
        share = Share(group.rank, leader, group.generation, held, units)
        self._write(share)
        self._confirm(group, share, may_go_on)

    def wait_written(self, context: GenerationContext) -> None:
        """Wait until this step's shards are written, at most `CONFIRM_S`; collective."""
        together(context.group, lambda _: self._writer.wait_written(self._local.committed, CONFIRM_S))

    def _is_complete(self, step: int, activity: Activity) -> bool:
        """Whether the newest checkpoint is of this step."""
        manifest = newest_manifest(checkpoint_root(self._config), None, activity)
        return manifest is not None and manifest.step == step

    def _confirm(self, group: Group, share: Share, may_go_on: Callable[[], None] | None = None) -> None:
        """Wait until the shards and the manifest are there, for `checkpoint.wait_s`; with `may_go_on` without an end.

        That the time is over is told once.
        """
        step, started_s = self._local.committed, time.monotonic()
        pause_s, told = FIRST_PAUSE_S, False
        leads = share.rank == share.leader
        while True:
            wait = self._writer.wait_complete if leads else self._writer.wait_written
            call = together(group, lambda _, wait=wait: wait(step, CONFIRM_S))
            waited_s = time.monotonic() - started_s
            seen = gather(group, int(call.result()), int(waited_s > self._config.checkpoint.wait_s))
            if bool(seen[:, 0].all()):
                return
            if bool(seen[0, 1]) and not told:
                told = True
                if leads:
                    root, wait_s = checkpoint_root(self._config), self._config.checkpoint.wait_s
                    reason = f"{root} was not written within {wait_s:g} s"
                    self._reporter.event("checkpoint_failed", step, reason=reason)
                if may_go_on is None:
                    return
            if may_go_on is not None:
                may_go_on()
            pause(group, pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)
            self._write(share)

    def _write(self, share: Share) -> None:
        step, generation = self._local.committed, share.generation
        tag, skipped = f"g{generation:05d}-r{share.rank:05d}", self._local.position.skipped
        self._writer.save(step, tag, share.held, share.units, generation, skipped)
        self._saved_step, self._saved_s, self._skipped = step, self._clock(), skipped
        self._answered = max(self._asked(), step)  # this state, or a later one, is all there is


def _share_of(context: GenerationContext) -> Share:
    """A rank saves the units that it owns."""
    view, owned = context.layout.view, context.layout.ownership.owned(context.rank).tolist()
    return Share(context.rank, view.active_ranks[0], view.generation, context.held, owned)


def _holds(call: Call[bool]) -> bool:
    """The result of a look at the storage; one that failed tells nothing."""
    try:
        return call.result()
    except OSError:
        return False
