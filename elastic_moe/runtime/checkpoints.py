"""A worker's side of durable checkpoints: reading them where no living holder is left, and writing shards while training goes on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

import torch

from elastic_moe.checkpoint.reader import find_latest, load_manifest, read_units
from elastic_moe.checkpoint.writer import write_shard
from elastic_moe.runtime.coordinator_client import CoordinatorClient
from elastic_moe.runtime.reconfigure import Storage
from elastic_moe.runtime.state import HeldState


class CheckpointStorage(Storage):
    """Durable checkpoints as a reconfiguration sees them."""

    def __init__(self, root: str) -> None:
        self._root = root

    def latest_step(self) -> int:
        manifest = find_latest(self._root)
        return -1 if manifest is None else manifest.step

    def read(self, step: int, names: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
        return read_units(load_manifest(self._root, step), names)


class ShardWriter:
    """Writes this worker's checkpoint shards in a thread, while training goes on; a failure is reported, never raised."""

    def __init__(self, root: str, line: CoordinatorClient) -> None:
        self._root, self._line = root, line
        self._jobs: queue.Queue[tuple[int, str, dict[str, torch.Tensor], int] | None] = queue.Queue(maxsize=2)
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def save(self, step: int, tag: str, held: HeldState, primary: Sequence[int], generation: int) -> None:
        """Take a consistent copy of the owned units now, write it later."""
        tensors = {
            f"{held.units[u].name}/{name}": tensor.clone()
            for u in primary
            for name, tensor in held.states[u].fields.items()
        }
        self._jobs.put((step, tag, tensors, generation))

    def drain(self) -> None:
        """Wait until everything saved so far is written or has failed."""
        self._jobs.join()

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            step, tag, tensors, generation = job
            started = time.perf_counter()
            try:
                info = write_shard(self._root, step, tag, tensors)
                self._line.shard(
                    {"step": step, "generation": generation, **info.as_dict(), "write_s": time.perf_counter() - started}
                )
            except OSError as error:
                self._line.event({"event": "checkpoint_failed", "step": step, "reason": str(error)})
            finally:
                self._jobs.task_done()
        self._jobs.task_done()
