"""A worker's lease: it may commit steps only while the coordinator has been heard lately.

A coordinator that hears nothing of its workers may start others from storage, but not before every lease has run out
(`control/doubt.py`). So two groups of workers never commit at the same time.
"""

from __future__ import annotations

import logging
import math
import time

from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.runtime.mailbox import Inbox

HOLD_POLL_S = 0.05

logger = logging.getLogger(__name__)


class Lease:
    """The permission to commit steps. It counts from the newest heartbeat that the coordinator has answered.

    Args:
        inbox: knows when that heartbeat was sent.
        seconds: length of the lease.
    """

    def __init__(self, inbox: Inbox, seconds: float) -> None:
        self._inbox, self._seconds = inbox, seconds

    def hold(self, abort: AbortSignal, patience_s: float = math.inf) -> None:
        """Return at once while the lease lasts; else wait for a sign of the coordinator, and keep the state.

        A worker calls it before it votes. The end of the generation ends the wait too.

        Raises:
            GroupAborted: the generation is over.
            CoordinatorLost: the coordinator was not heard for `patience_s`.
        """
        told = False
        while time.monotonic() - self._inbox.heard_s > self._seconds:
            if not told:
                told = True
                logger.warning(
                    "the coordinator was not heard for %g s (elastic.lease_s): this worker commits no step until it is",
                    self._seconds,
                )
            abort.wait(HOLD_POLL_S)
            abort.check()
            self._inbox.check_heard(patience_s)
