"""The state of one worker that it tells the coordinator when it registers, and with every heartbeat."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from elastic_moe.control import messages as msg
from elastic_moe.sources import sources_digest


@dataclass
class Registration:
    """The state of this worker that a `hello` and a heartbeat tell.

    Attributes:
        token: shared secret of the run.
        worker, node, pid, slots: who this is, as in `Member`.
        ready: it has warmed up.
        entered: generation that it entered last.
        progress: returns (step in the making, collectives begun and completed).
        address: at which other workers try their links to it, as in `Member`.
        updates_on, placed_s, node_kind: as in `HelloMessage`.
    """

    token: str
    worker: str
    node: str
    pid: int
    slots: int
    ready: bool = False
    entered: int = 0
    progress: Callable[[], tuple[int, int]] = lambda: (0, 0)
    address: tuple[str, int] = ("", 0)
    updates_on: str = ""
    placed_s: float = 0.0
    node_kind: str = ""

    def hello(self, newest: msg.ViewMessage | None, lapsed: bool) -> msg.HelloMessage:
        """Everything that a coordinator without memory must know of this worker."""
        return msg.HelloMessage(
            self.token,
            self.worker,
            self.node,
            self.pid,
            self.slots,
            ready=self.ready,
            view=newest.view if newest is not None else None,
            entered=self.entered,
            step=max(0, self.progress()[0] - 1),
            lapsed=lapsed,
            address=self.address,
            sources=sources_digest(),
            updates_on=self.updates_on,
            placed_s=self.placed_s,
            node_kind=self.node_kind,
        )

    def heartbeat(self, generation: int) -> msg.HeartbeatMessage:
        step, progress = self.progress()
        return msg.HeartbeatMessage(generation, step, progress, time.monotonic())
