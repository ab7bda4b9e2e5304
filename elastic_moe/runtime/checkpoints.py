"""A worker's side of saving: it copies its units and writes them as a shard in a thread, while training goes on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from elastic_moe.checkpoint.manifest import SKIPPED_BATCHES
from elastic_moe.checkpoint.pending_shards import NUM_UNITS
from elastic_moe.checkpoint.reader import load_manifest
from elastic_moe.checkpoint.shards import write_shard
from elastic_moe.checkpoint.storage import CorruptCheckpoint, StorageUnavailable
from elastic_moe.runtime.state import HeldState

CLOSE_TIMEOUT_S = 30.0  # at the end of the worker, for a shard that is being written
CONFIRM_S = 30.0  # one wait for the manifest, before the shards are written again
POLL_S = 0.1  # between two looks for the manifest

logger = logging.getLogger(__name__)


class Reports(Protocol):
    """Receiver of a writer's reports."""

    def shard(self, shard: Mapping[str, Any]) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class _Job:
    """A shard to write; the arguments of `ShardWriter.save`."""

    step: int
    tag: str
    tensors: dict[str, torch.Tensor]
    generation: int
    skipped_batches: int
    num_units: int


class ShardWriter:
    """Writes this worker's checkpoint shards in a thread, while training goes on. Failures are reported, never raised.

    A step that is tried again and fails for the same reason is reported once.

    The step loop never waits for the storage. While a shard is written, one copy may wait; a newer one replaces it.

    Args:
        root: the checkpoint root.
        reports: receives a report of every written shard, and an event for every failed or skipped one.
    """

    def __init__(self, root: str, reports: Reports) -> None:
        self._root, self._reports = root, reports
        self._changed = threading.Condition()
        self._waiting: _Job | None = None
        self._writing = False
        self._closed = False
        self._written_step = -1  # of the newest shard that was written
        self._told: tuple[int, str] | None = None  # step and kind of the newest failure
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def save(
        self, step: int, tag: str, held: HeldState, primary: Sequence[int], generation: int, skipped_batches: int = 0
    ) -> None:
        """Copy the state of the owned units now, and write it later.

        Args:
            step: the committed step of the state.
            tag: begins the file's name, so that people see the writer.
            held: the held state.
            primary: indices of the units to save, all of which are held.
            generation: generation of the view.
            skipped_batches: batches that the run has left out so far.
        """
        with self._changed:
            skipped, self._waiting = self._waiting, None  # its memory is free before the new copy is made
        if skipped is not None:
            reason = f"the storage is slow: step {step} is written instead"
            self._event({"event": "checkpoint_skipped", "step": skipped.step, "reason": reason})
        del skipped
        tensors = _host_copies(
            {f"{held.units[u].name}/{name}": tensor for u in primary for name, tensor in held.states[u].fields.items()}
        )
        with self._changed:
            self._waiting = _Job(step, tag, tensors, generation, skipped_batches, len(held.units))
            self._changed.notify_all()

    def wait_written(self, step: int, timeout_s: float) -> bool:
        """Wait until nothing is left to write, at most `timeout_s`. Returns whether the shard of `step` is written."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and not self._writing, timeout_s)
            return self._written_step >= step

    def wait_complete(self, step: int, timeout_s: float) -> bool:
        """Wait for the shard and the manifest of `step`, at most `timeout_s` each. Returns whether both are there."""
        if not self.wait_written(step, timeout_s):
            return False
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                load_manifest(self._root, step)
                return True
            except (FileNotFoundError, CorruptCheckpoint, StorageUnavailable):
                if time.monotonic() >= deadline_s:
                    return False
                time.sleep(POLL_S)

    def close(self) -> None:
        """Write the shards that wait, at most `CLOSE_TIMEOUT_S` long, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=CLOSE_TIMEOUT_S)

    # --- the thread ---

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._write(job)
            except Exception as error:  # the thread must outlive it, or nothing is ever saved again
                if not isinstance(error, OSError):
                    logger.exception("the shard of step %d could not be written", job.step)
                reason = str(error) or repr(error)
                failure = (job.step, os.strerror(error.errno) if isinstance(error, OSError) and error.errno else reason)
                if failure != self._told:
                    self._event({"event": "checkpoint_failed", "step": job.step, "reason": reason})
                self._told = failure
            del job

    def _next(self) -> _Job | None:
        """The next job; None at the end."""
        with self._changed:
            self._writing = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting is not None or self._closed)
            job, self._waiting = self._waiting, None
            self._writing = job is not None
            return job

    def _write(self, job: _Job) -> None:
        started = time.perf_counter()
        info = write_shard(self._root, job.step, job.tag, job.tensors)
        write_s = time.perf_counter() - started
        about = {"step": job.step, "generation": job.generation, SKIPPED_BATCHES: job.skipped_batches}
        self._reports.shard({**about, **info.as_dict(), NUM_UNITS: job.num_units, "write_s": write_s})
        with self._changed:
            self._written_step = job.step

    def _event(self, event: Mapping[str, Any]) -> None:
        try:
            self._reports.event(event)
        except Exception:  # the report is what fails; the shard's outcome stays
            logger.exception("an event about a checkpoint could not be reported")


def _host_copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in host memory; those of a GPU's tensors are made side by side, into pinned memory."""
    copies: dict[str, torch.Tensor] = {}
    devices: set[torch.device] = set()
    for name, tensor in tensors.items():
        if tensor.device.type == "cpu":
            copies[name] = tensor.clone()
        else:
            devices.add(tensor.device)
            copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    for device in devices:
        torch.accelerator.synchronize(device)
    return copies
