"""The coordinator's checkpoint book: collects reports of written shards, and completes a checkpoint when every unit is in one.

Storage may stall or fail for a while, so all that touches it happens in a thread of its own; a checkpoint that cannot be completed is reported
and left unfinished, and training goes on.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from elastic_moe.checkpoint.ledger import PendingShards
from elastic_moe.checkpoint.storage import CorruptCheckpoint
from elastic_moe.checkpoint.writer import discard_after, retain, write_manifest

CLOSE_TIMEOUT_S = 60.0


class CheckpointCommitter:
    """Completes checkpoints.

    Args:
        root: directory or URI of the checkpoints.
        keep: complete checkpoints to keep.
        unit_names: every unit that a complete checkpoint holds.
        meta: written into every manifest.
        report: takes events, called from the book's thread.
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
        self._ledger = PendingShards()
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="checkpoint-book", daemon=True)
        self._thread.start()

    def add(self, shard: Mapping[str, Any]) -> None:
        """A worker has written a shard: its `ShardInfo` as a dictionary, with `step` and `generation`."""
        shard = dict(shard)
        self._jobs.put(lambda: self._add(shard))

    def roll_back_to(self, step: int) -> None:
        """The run goes on from this step: later checkpoints belong to a past that no longer is."""
        self._jobs.put(lambda: self._roll_back_to(step))

    def close(self) -> None:
        """Finish what was reported so far."""
        self._jobs.put(None)
        self._thread.join(timeout=CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _add(self, shard: dict[str, Any]) -> None:
        step = int(shard["step"])
        if step not in self._ledger.pending:
            self._ledger.expect(step, self._units)
        if not self._ledger.add(step, shard):
            return
        started = time.perf_counter()
        generation = shard.get("generation")
        try:
            shards = self._ledger.shards(step)
            manifest = write_manifest(self._root, step, shards, self._meta | {"generation": generation})
            self._report(
                {
                    "event": "checkpoint",
                    "step": step,
                    "generation": generation,
                    "shards": len(shards),
                    "bytes": manifest.bytes,
                    "manifest_s": time.perf_counter() - started,
                }
            )
            retain(self._root, self._keep)
        except (OSError, CorruptCheckpoint) as error:
            self._report({"event": "checkpoint_failed", "step": step, "generation": generation, "reason": str(error)})

    def _roll_back_to(self, step: int) -> None:
        self._ledger.discard_after(step)
        try:
            discard_after(self._root, step)
        except OSError as error:
            self._report({"event": "checkpoint_failed", "step": step, "reason": f"cannot discard later ones: {error}"})
