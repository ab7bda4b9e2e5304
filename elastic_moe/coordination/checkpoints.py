"""Completes checkpoints: collects the reports of written shards, and writes the manifest once shards hold every unit.

Storage may stall or fail for a while, so one thread of its own touches it. A checkpoint that cannot be completed is
reported and stays unfinished, and training goes on.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from elastic_moe.checkpoint.pending_shards import PendingShards
from elastic_moe.checkpoint.storage import CorruptCheckpoint
from elastic_moe.checkpoint.writer import discard_after, retain, write_manifest

CLOSE_TIMEOUT_S = 60.0

logger = logging.getLogger(__name__)


class CheckpointCommitter:
    """Completes the checkpoints of one run.

    Args:
        root: directory or URI of the checkpoints.
        keep: complete checkpoints to keep.
        unit_names: every unit that a complete checkpoint holds.
        meta: written into every manifest.
        report: takes events; called in the committer's thread.
    """

    def __init__(
        self,
        root: str,
        keep: int,
        unit_names: Iterable[str],
        meta: Mapping[str, Any],
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        self._root, self._keep, self._units, self._meta = root, keep, tuple(unit_names), dict(meta)
        self._report = report
        self._shards = PendingShards()
        self._jobs: queue.Queue[tuple[int, Callable[[], None]] | None] = queue.Queue()  # step, work
        self._thread = threading.Thread(target=self._run, name="checkpoint-committer", daemon=True)
        self._thread.start()

    def add(self, shard: Mapping[str, Any]) -> None:
        """Take the report of a written shard: its `ShardInfo` as a dictionary, with `step` and `generation`."""
        shard, step = dict(shard), int(shard["step"])
        self._jobs.put((step, lambda: self._add(step, shard)))

    def roll_back_to(self, step: int) -> None:
        """Discard checkpoints of later steps: the run goes on from this step, and will compute them anew."""
        self._jobs.put((step, lambda: self._roll_back_to(step)))

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
        if step not in self._shards.pending:
            self._shards.expect(step, self._units)
        if not self._shards.add(step, shard):
            return
        started_s = time.perf_counter()
        generation = shard.get("generation")
        try:
            shards = self._shards.shards(step)
            manifest = write_manifest(self._root, step, shards, self._meta | {"generation": generation})
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
            retain(self._root, self._keep)
        except (OSError, CorruptCheckpoint) as error:
            self._report({"event": "checkpoint_failed", "step": step, "generation": generation, "reason": str(error)})

    def _roll_back_to(self, step: int) -> None:
        self._shards.discard_after(step)
        try:
            discard_after(self._root, step)
        except OSError as error:
            reason = f"cannot discard later checkpoints: {error}"
            self._report({"event": "checkpoint_failed", "step": step, "reason": reason})
