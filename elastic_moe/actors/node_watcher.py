"""Watches Ray's nodes: a draining one (preemption notice, scale-down) and a dead one become events for the coordinator.

Ray marks a node as draining with a deadline, a wall-clock time in ms (0: none), and drops it from that table when it is gone. The loop is
that of ray/train/v2/_internal/execution/preemption.py, which restarts the worker group on what it sees; here the group migrates.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

Event = dict[str, Any]
POLL_S = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """What was known at the last look: draining nodes with their deadline in ms, and living nodes."""

    draining: Mapping[str, int] = field(default_factory=dict)
    alive: frozenset[str] = frozenset()


def changes(
    seen: Seen, draining: Mapping[str, int], alive: Iterable[str], now_s: float, default_deadline_s: float
) -> tuple[list[Event], Seen]:
    """Events since the last look.

    Args:
        seen: result of the last look.
        draining: node id to deadline, wall-clock ms; 0 for none.
        alive: ids of living nodes.
        now_s: wall-clock seconds.
        default_deadline_s: seconds from now for a node that names no deadline.

    Returns:
        `drain` events with `deadline_s` seconds from now, `node_lost` events, and what is known now.
    """
    known = frozenset(alive)
    events: list[Event] = [{"event": "node_lost", "node": node} for node in sorted(seen.alive - known)]
    for node, deadline_ms in sorted(draining.items()):
        if node in known and seen.draining.get(node) != deadline_ms:
            left_s = max(0.0, deadline_ms / 1000 - now_s) if deadline_ms else default_deadline_s
            events.append({"event": "drain", "node": node, "deadline_s": left_s})
    return events, Seen(dict(draining), known)


def list_nodes() -> tuple[dict[str, int], list[str]]:
    """Draining and living nodes, from Ray."""
    draining = ray._private.state.state.get_draining_nodes() or {}
    return draining, [node["NodeID"] for node in ray.nodes() if node["Alive"]]


class NodeWatcher:
    """Polls Ray in a thread and submits events.

    Args:
        submit: takes an event; called from the thread.
        default_deadline_s: seconds for a drain that names no deadline.
        look: returns draining and living nodes.
        interval_s: seconds between two looks.
    """

    def __init__(
        self,
        submit: Callable[[Event], None],
        default_deadline_s: float,
        list_nodes: Callable[[], tuple[Mapping[str, int], Iterable[str]]] = list_nodes,
        interval_s: float = POLL_S,
    ) -> None:
        self._submit, self._default_deadline_s, self._list_nodes, self._interval_s = (
            submit,
            default_deadline_s,
            list_nodes,
            interval_s,
        )
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="node-watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        seen = Seen()
        while not self._stopped.wait(self._interval_s):
            try:
                draining, alive = self._list_nodes()
            except (RayError, RuntimeError, OSError) as error:  # the cluster's head is busy or away; look again
                logger.warning("cannot ask Ray for its nodes: %s", error)
                continue
            events, seen = changes(seen, draining, alive, time.time(), self._default_deadline_s)
            for event in events:
                self._submit(event)
