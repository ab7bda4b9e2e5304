"""Brings the newest whole checkpoint back, on all ranks together.

Every rank looks for the newest checkpoint, verifies its share of the files and reads its own units. A checkpoint counts
only if all ranks find it whole. One that is damaged is passed over. If a rank cannot read something, or the ranks see
different checkpoints, nothing is known. Then the view holds and asks again, because an older state, or none, would cost
the work of many steps.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from elastic_moe.checkpoint.bounded import Activity, Call
from elastic_moe.checkpoint.identity import never_saved
from elastic_moe.checkpoint.manifest import Manifest
from elastic_moe.checkpoint.reader import RetiredCheckpoint, newest_manifest, verify_shards
from elastic_moe.checkpoint.shards import read_units
from elastic_moe.checkpoint.storage import CorruptCheckpoint, Storage, StorageUnavailable
from elastic_moe.errors import StorageFailed, UserError
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.runtime.reconfigure import Restored
from elastic_moe.runtime.together import gather, pause, together

OK, DAMAGED, UNKNOWN = 0, 1, 2  # what a rank knows of a checkpoint
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 10.0  # between two looks at a storage that cannot be read
EMPTY_LOOKS = 3  # a storage may say for a moment that nothing is there
REPORT_S = 30.0  # between two reports of a storage that cannot be read, and of a long read

State = dict[str, dict[str, torch.Tensor]]
logger = logging.getLogger(__name__)


class DurableCheckpoints:
    """Durable checkpoints as the source of a reconfiguration; implements `reconfigure.DurableState`.

    Args:
        root: the checkpoint root.
        wait_s: longest hold for a storage that cannot be read, in seconds.
        report: takes events.
    """

    def __init__(self, root: str, wait_s: float, report: Callable[[Mapping[str, Any]], None]) -> None:
        self._root, self._wait_s, self._report = root, wait_s, report
        self._reported_s = 0.0
        self._logged_s = time.monotonic()

    def restore(self, group: Group, names: Sequence[str], expected: bool) -> Restored:
        """State of the named units from the newest checkpoint that is whole; collective.

        Args:
            group: the view's collectives.
            names: units that this rank needs.
            expected: steps were committed before, so that nothing is there is looked at several times.

        Returns:
            What it holds; step -1 if there is no whole one.

        Raises:
            GroupAborted: the generation ended.
            StorageFailed: the storage could not be read for `wait_s`.
            UserError: a run that has saved before finds no whole checkpoint for `wait_s`, or one of another model.
        """
        below: int | None = None
        empty_looks = 0
        started_s, pause_s = time.monotonic(), FIRST_PAUSE_S
        while True:
            look = together(group, lambda activity, below=below: self._look(group, below, activity))
            found = self._agreed(group, look)
            if isinstance(found, Manifest):
                call = together(group, lambda activity, m=found: self._read(group, m, names, activity), self._moved)
                verdict = self._verdict(group, found.step, call)
                if verdict == OK:
                    return Restored(found.step, found.skipped_batches, call.result())
                if verdict == DAMAGED:
                    below = found.step
                    continue
            elif found is not None:
                empty_looks += 1
                if found and (not expected or empty_looks == EMPTY_LOOKS):
                    return Restored()
                if not found:
                    self._tell("storage_unavailable", -1, str(self._nothing_found()))
                    if below is not None and empty_looks == EMPTY_LOOKS:
                        raise self._nothing_found()  # what was there is damaged
            self._check_patience(group, time.monotonic() - started_s, found is False)
            pause(group, pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    def _nothing_found(self) -> UserError:
        return UserError(
            f"checkpoint.dir={self._root} on {socket.gethostname()} has no readable checkpoint of this run: mount the "
            "right directory there; nothing was changed"
        )

    def _look(self, group: Group, below: int | None, activity: Activity) -> Manifest | bool:
        """The newest manifest of an earlier step than `below`; without one, whether the run has never saved.

        Rank 0 tells which damaged ones are passed over.
        """
        on_damage = self._tell_damage if group.rank == 0 else None
        manifest = newest_manifest(self._root, below, activity, on_damage)
        return never_saved(Storage(self._root, activity)) if manifest is None else manifest

    def _agreed(self, group: Group, look: Call[Manifest | bool]) -> Manifest | bool | None:
        """The result of the look if it is the same on every rank; None if it is not, or if a rank could not look."""
        mine, failed = False, 0
        try:
            mine = look.result()
        except StorageUnavailable as error:
            failed = 1
            self._tell("storage_unavailable", -1, f"{self._root} cannot be read: {error}")
        if isinstance(mine, Manifest):
            step, mark = mine.step, int.from_bytes(hashlib.sha256(mine.to_bytes()).digest()[:7], "big")
        else:
            step, mark = -1, int(mine)
        seen = gather(group, failed, step, mark)
        if seen[:, 0].any():
            return None
        if not bool((seen == seen[0]).all()):
            steps = seen[:, 1].tolist()
            if group.rank == 0:
                reason = f"the ranks see different checkpoints in {self._root}, of steps {steps}"
                self._tell("storage_unavailable", max(steps), f"{reason}: every node must see the same storage")
            return None
        return mine

    def _read(self, group: Group, manifest: Manifest, names: Sequence[str], activity: Activity) -> State:
        """Verify this rank's share of the files, and read its units."""
        verify_shards(manifest, group.rank, group.world_size, activity)
        return read_units(manifest, names, activity=activity)

    def _verdict(self, group: Group, step: int, call: Call[State]) -> int:
        """What the ranks together know of a checkpoint: OK, DAMAGED or UNKNOWN."""
        mine = OK
        try:
            call.result()
        except RetiredCheckpoint as error:  # the next look finds the one that took its place
            mine = UNKNOWN
            logger.warning("%s", error)
        except (CorruptCheckpoint, FileNotFoundError, KeyError) as error:  # KeyError: it lacks a unit of the model
            mine = DAMAGED
            self._tell_damage(step, str(error))
        except StorageUnavailable as error:
            mine = UNKNOWN
            self._tell("storage_unavailable", step, f"{self._root} cannot be read: {error}")
        return int(gather(group, mine).max())

    def _check_patience(self, group: Group, waited_s: float, empty: bool) -> None:
        """End the hold after `wait_s` by the clock of rank 0. `empty`: the storage answers, and shows nothing.

        Raises:
            StorageFailed, UserError: the time is over.
        """
        if int(gather(group, int(waited_s > self._wait_s))[0]):
            if empty:
                raise self._nothing_found()
            raise StorageFailed(
                f"checkpoint.dir={self._root} could not be read for {self._wait_s:g} s (checkpoint.wait_s): nothing "
                "was changed; resume when the storage answers."
            )

    def _tell_damage(self, step: int, reason: str) -> None:
        self._tell("checkpoint_damaged", step, f"{reason}; an older checkpoint is looked for", at_once=True)

    def _moved(self, moved_bytes: int) -> None:
        """Log how far the ranks have come, now and then."""
        now_s = time.monotonic()
        if now_s - self._logged_s > REPORT_S:
            self._logged_s = now_s
            logger.warning("%.1f GiB of the checkpoint verified and read by all ranks", moved_bytes / 2**30)

    def _tell(self, event: str, step: int, reason: str, at_once: bool = False) -> None:
        """Report an event, but not all of them if many come."""
        now_s = time.monotonic()
        if at_once or not self._reported_s or now_s - self._reported_s > REPORT_S:
            self._reported_s = now_s
            logger.warning("%s: %s", event, reason)
            self._report({"event": event, "step": max(step, 0), "reason": reason})
