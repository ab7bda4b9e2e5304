"""A worker's side of durable checkpoints: it reads units that no living worker holds, and writes shards in a thread."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from elastic_moe.checkpoint.identity import read_identity
from elastic_moe.checkpoint.reader import find_latest, load_manifest, read_units
from elastic_moe.checkpoint.storage import CorruptCheckpoint, Storage
from elastic_moe.checkpoint.writer import write_shard
from elastic_moe.errors import UserError
from elastic_moe.runtime.state import HeldState


class CheckpointStorage:
    """Durable checkpoints as the source of a reconfiguration; implements `reconfigure.DurableState`.

    Args:
        root: the checkpoint root.
    """

    def __init__(self, root: str) -> None:
        self._root = root

    def latest_step(self) -> int:
        """Step of the newest complete checkpoint that verifies, or -1 if the run has not written one yet.

        Raises:
            UserError: the run has written one, or this is not the run's checkpoint root. It must not begin anew then.
            StorageUnavailable: the storage cannot be read now.
        """
        manifest = find_latest(self._root)
        if manifest is not None:
            return manifest.step
        try:
            identity = read_identity(Storage(self._root))
        except CorruptCheckpoint:
            identity = None
        if identity is None or identity.first_checkpoint:
            raise UserError(
                f"checkpoint.dir={self._root} on {socket.gethostname()} has no readable checkpoint of this run: mount "
                "the right directory there; nothing was changed"
            )
        return -1

    def read(self, step: int, names: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
        """State of the named units at that step: unit name -> field name -> tensor on the CPU."""
        return read_units(load_manifest(self._root, step), names)


class Reports(Protocol):
    """Receiver of a writer's reports."""

    def shard(self, shard: Mapping[str, Any]) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None: ...


class ShardWriter:
    """Writes this worker's checkpoint shards in a thread, while training goes on. Failures are reported, never raised.

    Args:
        root: the checkpoint root.
        reports: receives a report of every written shard, and an event for every failed one.
    """

    def __init__(self, root: str, reports: Reports) -> None:
        self._root, self._reports = root, reports
        self._jobs: queue.Queue[tuple[int, str, dict[str, torch.Tensor], int] | None] = queue.Queue(maxsize=2)
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def save(self, step: int, tag: str, held: HeldState, primary: Sequence[int], generation: int) -> None:
        """Copy the state of the owned units now, and write it later.

        Args:
            step: the committed step of the state.
            tag: begins the file's name, so that people see the writer.
            held: the held state.
            primary: indices of the units to save, all of which are held.
            generation: generation of the view.
        """
        tensors = {
            f"{held.units[u].name}/{name}": tensor.clone()
            for u in primary
            for name, tensor in held.states[u].fields.items()
        }
        self._jobs.put((step, tag, tensors, generation))

    def drain(self) -> None:
        """Wait until every shard saved so far is written or has failed."""
        self._jobs.join()

    def close(self) -> None:
        """Write the shards that wait, at most 30 s long, and end the thread."""
        self._jobs.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            step, tag, tensors, generation = job
            started = time.perf_counter()
            try:
                info = write_shard(self._root, step, tag, tensors)
                self._reports.shard(
                    {"step": step, "generation": generation, **info.as_dict(), "write_s": time.perf_counter() - started}
                )
            except OSError as error:
                self._reports.event({"event": "checkpoint_failed", "step": step, "reason": str(error)})
            finally:
                self._jobs.task_done()
        self._jobs.task_done()
