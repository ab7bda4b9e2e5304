"""Who may die: each kind of process of a run is killed in turn, and the time to the next committed step is measured.

One run of the real program on a simulated cluster of four nodes with one worker each. A driver that ends is started
again at once, as an operator or a job queue would. Steps lost are committed steps that had to be made again.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastic_moe.run_dir import METRICS
from scripts.benchmarks.chaos_cluster import (
    CONTROLLER,
    COORDINATOR,
    ChaosCluster,
    Json,
    adopt_orphans,
    descendants,
    events,
    records,
    send,
)
from scripts.benchmarks.chaos_faults import NODES
from scripts.benchmarks.chaos_run import overrides
from scripts.benchmarks.common import arguments, machine, run, say, until

WAIT_S = 300.0
STEADY_STEPS = 10
CHECKPOINT_STEPS = 15
QUICK = ("worker", "driver")
IN_A_LATER_VIEW = ("worker", "node", "all workers")  # the next step without the dead


class Rows:
    """A run in progress, and the rows of the table.

    Args:
        cluster: where it runs.
        root: directory of its files.
    """

    def __init__(self, cluster: ChaosCluster, root: Path) -> None:
        self._cluster, self._root, self._dir = cluster, root, root / "run"
        self.events: dict[str, Callable[[], Any]] = {
            "worker": lambda: send(cluster.workers()[:1], signal.SIGKILL),
            "Ray Train controller": lambda: send(descendants(CONTROLLER), signal.SIGKILL),
            "node": lambda: cluster.remove_node(cluster.nodes()[0]),
            "coordinator": lambda: send(descendants(COORDINATOR), signal.SIGKILL),
            "all workers": lambda: send(cluster.workers(), signal.SIGKILL),
            "driver": self._kill_driver,
            "everything": self._kill_all,
        }

    def start(self) -> None:
        """Start the driver, and again after its death."""
        given = overrides(self._dir, self._root / "cache", 1_000_000, 1)
        changed = [f"checkpoint.every_steps={CHECKPOINT_STEPS}", f"elastic.max_workers={NODES}"]
        self._cluster.start([*given, *changed], self._root / "driver.log")

    def measure(self, name: str) -> Json:
        """Cause a death, and follow it to the next committed step."""
        self._cluster.restore(NODES)
        self._wait(f"{STEADY_STEPS} steps with {NODES} workers", self._steady)
        before, started_s = self._all()[-1], time.time()
        from_s = started_s
        self.events[name]()
        ended = name in ("driver", "everything")
        if ended:
            self._wait("the driver's end", lambda: self._cluster.exit_code() is not None)
            self.start()
            from_s = self._wait("another start's first view", lambda: self._resumed_s(started_s))
        same = before["generation"] if name in IN_A_LATER_VIEW else -1
        first = self._wait(f"a step after the death of the {name}", lambda: self._first(from_s, same))
        done = [r["step"] for r in self._all() if r["time"] < first["time"]]
        result = {
            "death": name,
            "to_next_step_s": round(first["time"] - started_s, 3),
            "steps_lost": max(0, max(done) + 1 - first["step"]),
            "driver_started_again": ended,
        }
        say(str(result))
        return result

    def stop(self) -> None:
        """Ask for a clean end, and wait for it."""
        driver = self._cluster.driver
        if driver is not None and driver.poll() is None:
            driver.terminate()
            driver.wait(WAIT_S)

    def _kill_driver(self) -> None:
        assert self._cluster.driver is not None
        self._cluster.driver.kill()

    def _kill_all(self) -> None:
        self._kill_driver()
        send([*descendants(COORDINATOR), *descendants(CONTROLLER), *self._cluster.workers()], signal.SIGKILL)

    def _resumed_s(self, from_s: float) -> float | None:
        """When a later start took its state from storage. What outlives a driver trains on until it has saved."""
        entered = [e for e in events(self._dir) if e["event"] == "entered" and e["source"] == "checkpoint"]
        return next((e["time"] for e in entered if e["time"] > from_s), None)

    def _first(self, from_s: float, generation: int) -> Json | None:
        """The first step after a time in another view than this one."""
        return next((r for r in self._all() if r["time"] > from_s and r["generation"] != generation), None)

    def _all(self) -> list[Json]:
        """Records of all timelines, in the order of their time."""
        names = [METRICS, *(path.name for path in self._dir.glob("metrics.t*.jsonl"))]
        return sorted((r for name in names for r in records(self._dir, name)), key=lambda record: record["time"])

    def _steady(self) -> bool:
        """Some steps of one view with all workers, and not the first ones after a checkpoint."""
        last = records(self._dir)[-STEADY_STEPS:]
        views = {(record["world_size"], record["generation"]) for record in last}
        halfway = bool(last) and last[-1]["step"] % CHECKPOINT_STEPS >= CHECKPOINT_STEPS // 2
        return len(last) == STEADY_STEPS and len(views) == 1 and last[-1]["world_size"] == NODES and halfway

    def _wait(self, what: str, holds: Callable[[], Any]) -> Any:
        return until(what, holds, WAIT_S)


def benchmark(quick: bool) -> Json:
    adopt_orphans()
    result: Json = {"benchmark": "failures", "quick": quick, "machine": machine(), "checkpoint_steps": CHECKPOINT_STEPS}
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as root, ChaosCluster(NODES) as cluster:
        rows = Rows(cluster, Path(root))
        rows.start()
        try:
            result["rows"] = [rows.measure(name) for name in (QUICK if quick else rows.events)]
        finally:
            rows.stop()
    return result


def main() -> int:
    options = arguments("failures", "Time to the next step after the death of each kind of process.").parse_args()
    return run(lambda: benchmark(options.quick), options.json)


if __name__ == "__main__":
    sys.exit(main())
