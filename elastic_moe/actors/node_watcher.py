"""Watches Ray's nodes: a draining one (preemption notice, scale-down) and a dead one become events for the coordinator.

It watches Ray's head too. Where its GCS process has died and is not started again, every process of the cluster ends
after `gcs_rpc_server_reconnect_timeout_s` (60 s). Until then the state is saved every ten seconds.

Ray marks a node as draining with a deadline, a wall-clock time in ms (0: none), and removes the mark when the node is
gone. Ray Train has such a loop too (ray/train/v2/_internal/execution/preemption.py). Stock Ray Train restarts the
worker group when a node drains; here the state moves to other nodes first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.state import state as cluster_state

Event = dict[str, Any]
POLL_S = 0.5
HEAD_AWAY_S = 10.0  # a head that has not answered for so long may be gone
AWAY = "Ray's head does not answer: where it is gone, everything ends within a minute"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeSnapshot:
    """The nodes at one poll: draining ones with their deadline in ms, and living ones."""

    draining: Mapping[str, int] = field(default_factory=dict)
    alive: frozenset[str] = frozenset()


def node_events(
    last: NodeSnapshot, draining: Mapping[str, int], alive: Iterable[str], now_s: float, default_deadline_s: float
) -> tuple[list[Event], NodeSnapshot]:
    """Events since the last poll.

    Args:
        last: the nodes at the last poll.
        draining: node id to deadline, wall-clock ms; 0 for none.
        alive: ids of living nodes.
        now_s: wall-clock seconds.
        default_deadline_s: seconds from now for a node that names no deadline.

    Returns:
        `drain` events with `deadline_s` seconds from now, `node_lost` events, and the nodes now.
    """
    known = frozenset(alive)
    events: list[Event] = [{"event": "node_lost", "node": node} for node in sorted(last.alive - known)]
    for node, deadline_ms in sorted(draining.items()):
        if node in known and last.draining.get(node) != deadline_ms:
            left_s = max(0.0, deadline_ms / 1000 - now_s) if deadline_ms else default_deadline_s
            events.append({"event": "drain", "node": node, "deadline_s": left_s})
    return events, NodeSnapshot(dict(draining), known)


def list_nodes() -> tuple[dict[str, int], list[str]]:
    """Draining and living nodes, from Ray."""
    draining = cluster_state.get_draining_nodes() or {}
    return draining, [node["NodeID"] for node in ray.nodes() if node["Alive"]]


class NodeWatcher:
    """Polls Ray in a thread and submits events.

    Args:
        submit: takes an event; called from the thread.
        default_deadline_s: seconds for a drain that names no deadline.
        list_nodes: returns draining and living nodes.
        interval_s: seconds between two polls.
        head_away_s: while Ray does not answer, a checkpoint is asked for every so many seconds.
    """

    def __init__(
        self,
        submit: Callable[[Event], None],
        default_deadline_s: float,
        list_nodes: Callable[[], tuple[Mapping[str, int], Iterable[str]]] = list_nodes,
        interval_s: float = POLL_S,
        head_away_s: float = HEAD_AWAY_S,
    ) -> None:
        self._submit, self._list_nodes = submit, list_nodes
        self._default_deadline_s, self._interval_s = default_deadline_s, interval_s
        self._head_away_s = head_away_s
        self._answered_s = 0.0
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name="node-watcher", daemon=True),
            threading.Thread(target=self._watch_head, name="head-watcher", daemon=True),
        ]

    def start(self) -> None:
        self._answered_s = time.monotonic()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def _watch_head(self) -> None:
        """Ask for a checkpoint again and again while the head is silent. A question to it may hang."""
        asked_s = 0.0
        while not self._stopped.wait(self._interval_s):
            now_s = time.monotonic()
            if now_s - max(self._answered_s, asked_s) > self._head_away_s:
                asked_s = now_s
                try:
                    self._submit({"event": "checkpoint", "reason": AWAY})
                except Exception as error:  # noqa: BLE001 - it is asked for again
                    logger.warning("cannot ask for a checkpoint: %s", error)

    def _run(self) -> None:
        last = NodeSnapshot()
        while not self._stopped.wait(self._interval_s):
            try:
                draining, alive = self._list_nodes()
                self._answered_s = time.monotonic()
                events, last = node_events(last, draining, alive, time.time(), self._default_deadline_s)
                for event in events:
                    self._submit(event)
            except Exception as error:  # noqa: BLE001 - the cluster's head is busy or away: report it, and poll again
                logger.warning("cannot ask Ray for its nodes: %s", error)
