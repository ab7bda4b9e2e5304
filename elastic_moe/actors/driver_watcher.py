"""Ends a run whose driver has died: its workers save their state first, and nothing of the run is left behind.

Coordinator and workers are detached (`actors/kept.py`). Ray marks a job as dead when its driver's process is gone. The
coordinator then stops the run as the driver would have done after Ctrl-C. The next start with `run.resume=auto` goes on
from that step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from ray._private.state import jobs

from elastic_moe.actors.kept import end_actor, end_all
from elastic_moe.actors.link import OVER

POLL_S = 1.0
LEAVE_S = 10.0  # after the end of the run, for workers to end by themselves
REASON = "the run's driver has died"

logger = logging.getLogger(__name__)


def is_dead(job: str) -> bool:
    """Whether Ray says that the driver of this job (id in hex) is gone. A job that Ray does not know lives."""
    return any(entry["JobID"] == job and entry["IsDead"] for entry in jobs())


class DriverWatcher(threading.Thread):
    """Watches the driver from within the coordinator actor.

    Args:
        name: name of the coordinator actor.
        coordinator: takes requests and tells its status: `submit`, `status`, `close`.
        patience_s: the run gets at most so long to stop, and as long again to fail, each with its state saved.
        dead: whether the driver is dead.
        end: ends everything that Ray knows of the run, the coordinator last.
    """

    def __init__(
        self,
        name: str,
        coordinator: Any,
        patience_s: float,
        dead: Callable[[], bool],
        end: Callable[[str], None],
    ) -> None:
        super().__init__(name="driver-watcher", daemon=True)
        self._name, self._coordinator, self._patience_s = name, coordinator, patience_s
        self._dead, self._end = dead, end
        self._closed = threading.Event()

    def close(self) -> None:
        """Stop to watch: the driver ends the run itself."""
        self._closed.set()

    def run(self) -> None:
        while not self._closed.wait(POLL_S):
            try:
                if self._dead():
                    break
            except Exception as error:  # noqa: BLE001 - the cluster's head is busy or away: report it, and ask again
                logger.warning("cannot ask Ray for the driver: %s", error)
        if not self._closed.is_set():
            self._end_run()

    def _end_run(self) -> None:
        logger.warning("%s: the run stops, and its state is saved", REASON)
        try:
            if not self._asked("stop"):
                self._asked("fail")
            left_s = time.monotonic() + LEAVE_S
            while self._coordinator.status()["workers"] and time.monotonic() < left_s:
                time.sleep(POLL_S / 10)
            self._coordinator.close()
        except Exception:
            logger.exception("the run of a dead driver could not be ended in order")
        self._end(self._name)

    def _asked(self, event: str) -> bool:
        """Ask for the end of the run. Returns whether it came in time."""
        self._coordinator.submit({"event": event, "reason": REASON})
        deadline_s = time.monotonic() + self._patience_s
        while self._coordinator.status()["phase"] not in OVER:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(POLL_S / 10)
        return True


def end_run(name: str) -> None:
    """End the run's workers and its coordinator, which may be this process."""
    end_all(name)
    end_actor(name)
