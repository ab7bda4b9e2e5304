"""The faults of a chaos run: a schedule drawn from a seed, and how each fault is caused and ended."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil

from scripts.benchmarks.chaos_cluster import CONTROLLER, COORDINATOR, ChaosCluster, Json, descendants, send
from tests.storage_faults import set_fault

NODES, ROOM = 4, 5  # nodes at the start, and most workers: one more may join
STORAGE = ("error read", "error write", "hang read", "hang write", "full write")
FATAL = ("kill_controller", "kill_driver")  # these may end the driver, which is then started again
WEIGHTS = {
    "kill_one": 4,
    "kill_two": 2,
    "stop_one": 3,
    "stop_some": 2,
    "stop_all": 2,
    "remove_node": 2,
    "drain_node": 3,
    "join_node": 2,
    "kill_coordinator": 3,
    "kill_controller": 1,
    "kill_driver": 1,
    "storage": 5,
    "reset_control": 3,
    "reset_peers": 2,
}


def schedule(seed: int, steps: int, kinds: tuple[str, ...] = tuple(WEIGHTS)) -> list[Json]:
    """Faults of one run, by the step at which they are caused.

    Args:
        seed: the same seed gives the same schedule.
        steps: steps of the run.
        kinds: the faults to draw from.

    Returns:
        For each fault `kind`, `step`, `lasts_s` where it ends by itself, and `pick` (0 to 1), which says whom it meets.
    """
    rng = random.Random(seed)
    weights = [WEIGHTS[kind] for kind in kinds]
    count = rng.randint(4, 8)
    at = sorted(rng.randint(2, steps - 1) for _ in range(count))
    for i in range(1, count):
        if rng.random() < 0.3:
            at[i] = min(at[i - 1] + rng.randint(0, 2), steps - 1)  # while the one before is still being dealt with
    found: list[Json] = []
    for step in sorted(at):
        kind = rng.choices(kinds, weights)[0]
        if kind in FATAL and any(fault["kind"] in FATAL for fault in found):
            kind = "kill_one"
        fault: Json = {"kind": kind, "step": step, "pick": round(rng.random(), 3)}
        if kind.startswith("stop"):
            fault["lasts_s"] = round(rng.choice([rng.uniform(0.2, 3.0), rng.uniform(3.0, 15.0)]), 2)
        if kind in ("remove_node", "drain_node"):
            fault["lasts_s"] = round(rng.uniform(1.0, 12.0), 2)
        if kind == "storage":
            fault |= {"fault": rng.choice(STORAGE), "lasts_s": round(rng.uniform(1.0, 15.0), 2)}
        found.append(fault)
    return found


class Faults:
    """Causes faults on one cluster, and ends those that last for a time.

    Args:
        cluster: where the run is.

    Attributes:
        storage_fails: now.
    """

    def __init__(self, cluster: ChaosCluster) -> None:
        self._cluster, self.storage_fails = cluster, False
        self._later: list[tuple[float, Callable[[], Any]]] = []

    def cause(self, fault: Json) -> Json:
        """Cause one fault. Returns it with its time, and what it met."""
        action = getattr(self, f"_{fault['kind']}")
        started_s = time.time()
        return fault | {"time": started_s, "met": action(fault)}

    def end_due(self, everything: bool = False) -> None:
        """End the faults whose time is over, or all of them."""
        now_s = time.monotonic()
        due = [later for later in self._later if everything or later[0] <= now_s]
        for later in due:
            self._later.remove(later)
            later[1]()

    def _after(self, seconds: float, action: Callable[[], Any]) -> None:
        self._later.append((time.monotonic() + seconds, action))

    def _chosen(self, fault: Json, count: int) -> list[psutil.Process]:
        workers = self._cluster.workers()
        first = int(fault["pick"] * len(workers))
        return (workers[first:] + workers[:first])[:count]

    def _kill_one(self, fault: Json) -> list[int]:
        return send(self._chosen(fault, 1), signal.SIGKILL)

    def _kill_two(self, fault: Json) -> list[int]:
        return send(self._chosen(fault, 2), signal.SIGKILL)

    def _stop(self, fault: Json, count: int) -> list[int]:
        chosen = self._chosen(fault, count)
        self._after(fault["lasts_s"], lambda: send(chosen, signal.SIGCONT))
        return send(chosen, signal.SIGSTOP)

    def _stop_one(self, fault: Json) -> list[int]:
        return self._stop(fault, 1)

    def _stop_some(self, fault: Json) -> list[int]:
        return self._stop(fault, 2)

    def _stop_all(self, fault: Json) -> list[int]:
        return self._stop(fault, ROOM)

    def _node(self, fault: Json) -> Any:
        nodes = self._cluster.nodes()
        return nodes[int(fault["pick"] * len(nodes))] if nodes else None

    def _refill(self) -> None:
        if len(self._cluster.nodes()) < NODES:
            self._cluster.try_add_node()

    def _remove_node(self, fault: Json) -> str:
        if (node := self._node(fault)) is None:
            return ""
        self._cluster.remove_node(node)
        self._after(fault["lasts_s"], self._refill)
        return node.node_id[:8]

    def _drain_node(self, fault: Json) -> str:
        if (node := self._node(fault)) is None:
            return ""
        self._cluster.drain(node, fault["lasts_s"])

        def take() -> None:
            self._cluster.remove_node(node)
            self._refill()

        self._after(fault["lasts_s"], take)
        return node.node_id[:8]

    def _join_node(self, _: Json) -> int:
        if len(self._cluster.nodes()) < ROOM:
            self._cluster.try_add_node()
        return len(self._cluster.nodes())

    def _kill_coordinator(self, _: Json) -> list[int]:
        return send(descendants(COORDINATOR), signal.SIGKILL)

    def _kill_controller(self, _: Json) -> list[int]:
        return send(descendants(CONTROLLER), signal.SIGKILL)

    def _kill_driver(self, _: Json) -> list[int]:
        driver = self._cluster.driver
        assert driver is not None
        driver.kill()
        return [driver.pid]

    def _storage(self, fault: Json) -> str:
        self._set_storage(fault["fault"])
        self._after(fault["lasts_s"], lambda: self._set_storage(""))
        return fault["fault"]

    def _set_storage(self, fault: str) -> None:
        set_fault(self._cluster.control, fault)
        self.storage_fails = bool(fault)

    def _reset_control(self, fault: Json) -> int:
        one = self._chosen(fault, ROOM if fault["pick"] < 0.5 else 1)
        return self._cluster.reset(one, descendants(COORDINATOR))

    def _reset_peers(self, fault: Json) -> int:
        one = self._chosen(fault, 1)
        return self._cluster.reset(one, [w for w in self._cluster.workers() if w not in one])
