"""Completes checkpoints: collects the reports of written shards, and writes the manifest once shards hold every unit.

Storage may stall or fail for a while, so one thread of its own touches it. A checkpoint that cannot be completed is
reported and stays unfinished, and training goes on. Going back to a checkpoint deletes nothing: a new timeline begins
(`checkpoint.identity`), and the later checkpoints of the old one are retired when the new one has passed them.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from elastic_moe.checkpoint.manifest import SKIPPED_BATCHES, STAYS
from elastic_moe.checkpoint.pending_shards import NUM_UNITS, PendingShards
from elastic_moe.checkpoint.storage import CorruptCheckpoint, Storage
from elastic_moe.checkpoint.writer import list_steps, retain, write_manifest
from elastic_moe.coordination.identity import IdentityFiles

CLOSE_TIMEOUT_S = 60.0

logger = logging.getLogger(__name__)


class CheckpointCommitter:
    """Completes the checkpoints of one run.

    Args:
        root: directory or URI of the checkpoints.
        keep: complete checkpoints to keep.
        meta: written into every manifest.
        report: takes events; called in the committer's thread.
        identity: of the run; only the committer's thread changes it.
        completed: generation and step of the newest checkpoint that a coordinator before this one has completed in the
            same start of the run. Workers tell it and earlier ones again.
        stays: whether the checkpoint of a step is kept for good.
    """

    def __init__(
        self,
        root: str,
        keep: int,
        meta: Mapping[str, Any],
        report: Callable[[dict[str, Any]], None],
        identity: IdentityFiles,
        completed: tuple[int, int] = (0, 0),
        stays: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self._root, self._keep, self._stays, self._meta = root, keep, stays, dict(meta)
        self._stay: set[int] = set()  # steps whose checkpoints are known to stay
        self._report, self._identity, self._completed = report, identity, completed
        self._forked = identity.identity.last_fork  # generation that went back last, and to which step
        self._shards = PendingShards()
        self._jobs: queue.Queue[tuple[int, Callable[[], None]] | None] = queue.Queue()  # step, work
        self._thread = threading.Thread(target=self._run, name="checkpoint-committer", daemon=True)
        self._thread.start()

    def add(self, shard: Mapping[str, Any]) -> None:
        """Take a report of a shard: its `ShardInfo` as a dictionary, with `step`, `generation`, `num_units`."""
        shard, step = dict(shard), int(shard["step"])
        self._jobs.put((step, lambda: self._add(step, shard)))

    def roll_back_to(self, step: int, generation: int, lost_steps: int) -> None:
        """Begin a new timeline at this step, if the run has come further before.

        Args:
            step: the run goes on from here, and will compute later steps anew.
            generation: the generation that went back.
            lost_steps: recorded steps that it went back behind.
        """
        self._jobs.put((step, lambda: self._roll_back_to(step, generation, lost_steps)))

    def close(self) -> None:
        """Finish all jobs taken so far, within `CLOSE_TIMEOUT_S`, and end the thread."""
        self._jobs.put(None)
        self._thread.join(timeout=CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            step, work = job
            try:
                work()
            except Exception as error:
                logger.exception("the coordinator could not complete a checkpoint of step %d", step)
                self._report_unexpected(step, error)

    def _report_unexpected(self, step: int, error: Exception) -> None:
        reason = f"unexpected {type(error).__name__}: {error}"
        try:
            self._report({"event": "checkpoint_failed", "step": step, "reason": reason})
        except Exception:  # the report is what fails: the next job may still succeed
            logger.exception("the coordinator could not report a failed checkpoint")

    def _add(self, step: int, shard: dict[str, Any]) -> None:
        generation = int(shard.get("generation") or 0)
        forked_at, fork = self._forked
        if generation < forked_at and step > fork:
            return  # the run has gone back behind this step since
        if generation <= self._completed[0] and step <= self._completed[1]:
            return  # it is complete, or was retired since
        if step not in self._shards.pending:
            self._shards.expect(step, int(shard[NUM_UNITS]))
        if not self._shards.add(step, shard, generation):
            return
        started_s = time.perf_counter()
        try:
            self._identity.write()  # before a checkpoint of a new timeline
            shards = self._shards.shards(step)
            meta = self._meta | self._identity.identity.meta() | {"generation": generation, "time": time.time()}
            meta[SKIPPED_BATCHES] = int(shard.get(SKIPPED_BATCHES) or 0)
            meta |= {STAYS: True} if self._stays(step) else {}
            manifest = write_manifest(self._root, step, shards, meta)
            self._report(
                {
                    "event": "checkpoint",
                    "step": step,
                    "generation": generation,
                    "shards": len(shards),
                    "bytes": manifest.bytes,
                    "manifest_s": time.perf_counter() - started_s,
                }
            )
            if not self._identity.identity.first_checkpoint:
                self._identity.change(replace(self._identity.identity, first_checkpoint=step))
            retain(self._root, self._keep, self._stay)
        except (OSError, CorruptCheckpoint) as error:
            self._shards.forget(step)  # the workers may write the step again
            self._report({"event": "checkpoint_failed", "step": step, "generation": generation, "reason": str(error)})

    def _roll_back_to(self, step: int, generation: int, lost_steps: int) -> None:
        self._shards.discard_after(step, generation)
        self._forked = (generation, step)
        self._stay.clear()  # some may lie behind the fork
        try:
            abandoned = [later for later in list_steps(Storage(self._root)) if later > step]
            if not abandoned and not lost_steps:
                return
            self._identity.change(self._identity.identity.forked(step, generation))
            timeline = self._identity.identity.timeline
            event = {"event": "timeline", "generation": generation, "step": step, "timeline": timeline}
            self._report(event | {"abandoned": abandoned})
        except OSError as error:
            reason = f"cannot note that the run went back to step {step}: {error}"
            self._report({"event": "checkpoint_failed", "step": step, "reason": reason})
