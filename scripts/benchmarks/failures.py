"""Who may die: each kind of process of a run is killed in turn, and the time to the next committed step is measured.

One run of the real program on a simulated cluster of four nodes with one worker each; then the same model and data on
Ray Train's own elastic TorchTrainer, with a checkpoint as often. A driver that ends is started again at once, as an
operator or a job queue would. Steps lost are committed steps that had to be made again.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from elastic_moe.cli.compose import check, register_schema
from elastic_moe.data.prepare import prepare
from elastic_moe.environment import environment
from elastic_moe.metrics.jsonl import Tail
from elastic_moe.run_dir import METRICS
from scripts.benchmarks.chaos_cluster import (
    CONTROLLER,
    COORDINATOR,
    WORKER,
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
from scripts.benchmarks.common import arguments, machine, run, say, until, write
from scripts.benchmarks.stock import TUNED

WAIT_S = 400.0  # Ray may need some minutes until the last process of a cluster without a head has ended
STEADY_STEPS = 10
CHECKPOINT_STEPS = 15
HEAD = "Ray's head"
ROWS = ("worker", "Ray Train controller", "node", "coordinator", "all workers", "driver", "everything", HEAD)
QUICK = ("worker", "driver")
STOCK_SETTINGS = TUNED | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60"}  # on a crowded machine 20 s never suffice
STOCK_WORKER, STOCK_CONTROLLER = "ray::RayTrainWorker", "ray::TrainController"


@dataclass(frozen=True)
class Step:
    """A finished step. `view`: the same for the steps that one set of workers has made without a change."""

    time: float
    step: int
    world: int
    view: int


class Side(Protocol):
    """One trainer's run in progress.

    Attributes:
        name: of the trainer.
        processes: titles of the processes that can be killed, by the row's name.
        ending: rows after which the driver ends, and is started again.
        in_a_later_view: rows after which the next step counts only if other workers make it.
    """

    name: str
    processes: ClassVar[Mapping[str, tuple[str, ...]]]
    ending: tuple[str, ...]
    in_a_later_view: tuple[str, ...]

    def start(self) -> None:
        """Start the driver, and again after its death."""
        ...

    def steps(self) -> list[Step]:
        """All finished steps in the order of their time, those that were made again too."""
        ...

    def resumed_s(self, from_s: float) -> float | None:
        """When a driver that was started later than `from_s` had its state from storage; None before."""
        ...


class Ours(Side):
    """The real program.

    Args:
        cluster: where it runs.
        root: directory of its files.
    """

    name = "elastic_moe"
    processes: ClassVar = {
        "worker": (WORKER,),
        "all workers": (WORKER,),
        "Ray Train controller": (CONTROLLER,),
        "coordinator": (COORDINATOR,),
        "everything": (COORDINATOR, CONTROLLER, WORKER),
    }
    ending = ("driver", "everything", HEAD)
    in_a_later_view = ("worker", "node", "all workers")

    def __init__(self, cluster: ChaosCluster, root: Path) -> None:
        self._cluster, self._root, self._dir = cluster, root, root / "run"

    def start(self) -> None:
        self._cluster.start(settings(self._root), self._root / "driver.log")

    def steps(self) -> list[Step]:
        names = [METRICS, *(path.name for path in self._dir.glob("metrics.t*.jsonl"))]
        found = [record for name in names for record in records(self._dir, name)]
        steps = [Step(r["time"], r["step"], r["world_size"], r["generation"]) for r in found]
        return sorted(steps, key=lambda step: step.time)

    def resumed_s(self, from_s: float) -> float | None:
        """What outlives a driver trains on until it has saved, so its steps do not count."""
        entered = [e for e in events(self._dir) if e["event"] == "entered" and e["source"] == "checkpoint"]
        return next((e["time"] for e in entered if e["time"] > from_s), None)


class Stock(Side):
    """Ray Train's own elastic trainer, with every interval set for speed. Arguments as `Ours`."""

    name = "stock Ray Train"
    processes: ClassVar = {
        "worker": (STOCK_WORKER,),
        "all workers": (STOCK_WORKER,),
        "Ray Train controller": (STOCK_CONTROLLER,),
        "everything": (STOCK_CONTROLLER, STOCK_WORKER),
    }
    ending = ("Ray Train controller", "driver", "everything", HEAD)
    in_a_later_view = ROWS

    def __init__(self, cluster: ChaosCluster, root: Path) -> None:
        self._cluster, self._root = cluster, root
        register_schema()
        (config,) = check(settings(root))
        prepared = prepare(config.data, root / "cache")
        self._log = Tail(root / "steps.jsonl")
        self._loop = {
            "model": asdict(replace(config.model, vocab_size=prepared.vocab_size)),
            "data": asdict(config.data),
            "shard": prepared.train_path,
            "log": str(root / "steps.jsonl"),
            "stop_file": str(root / "stop"),
            "steps": config.run.steps,
            "checkpoint_steps": CHECKPOINT_STEPS,
        }

    def start(self) -> None:
        given = {"loop": self._loop, "min_workers": 1, "max_workers": NODES, "storage": str(self._root / "ray")}
        command = ["scripts.benchmarks.stock", self._cluster.cluster.address, json.dumps(given)]
        self._cluster.start_module(command, self._root / "driver.log")

    def steps(self) -> list[Step]:
        first = [line for line in self._log.lines() if line["rank"] == 0]
        return [Step(line["time"], line["step"], line["world"], line["pid"]) for line in first]

    def resumed_s(self, from_s: float) -> float | None:
        return from_s  # its steps are told from those before by their processes


def settings(root: Path) -> list[str]:
    """Overrides of our run; the other side takes model and data from them."""
    given = overrides(root / "run", root / "cache", 1_000_000, 1)
    return [*given, f"checkpoint.every_steps={CHECKPOINT_STEPS}", f"elastic.max_workers={NODES}"]


class Rows:
    """The rows of the table, on one side.

    Args:
        cluster: where it runs.
        side: the run.
    """

    def __init__(self, cluster: ChaosCluster, side: Side) -> None:
        self._cluster, self._side = cluster, side

    def measure(self, name: str) -> Json:
        """Cause a death, and follow it to the next committed step."""
        self._cluster.restore(NODES)
        self._wait(f"{STEADY_STEPS} steps with {NODES} workers", self._steady)
        before, started_s = self._side.steps()[-1], time.time()
        from_s = started_s
        self._cause(name)
        ended = name in self._side.ending
        if ended:
            self._wait("the driver's end", lambda: self._cluster.exit_code() is not None)
            if name == HEAD:
                self._cluster.start_again()
            self._side.start()
            from_s = self._wait("another start's first view", lambda: self._side.resumed_s(started_s))
        view = before.view if name in self._side.in_a_later_view else -1
        first = self._wait(f"a step after the death of the {name}", lambda: self._first(from_s, view))
        done = [step.step for step in self._side.steps() if step.time < first.time]
        result = {
            "death": name,
            "to_next_step_s": round(first.time - started_s, 3),
            "steps_lost": max(0, max(done) + 1 - first.step),
            "driver_started_again": ended,
        }
        say(f"{self._side.name}: {result}")
        return result

    def stop(self) -> None:
        """Ask for a clean end, and wait for it."""
        driver = self._cluster.driver
        if driver is not None and driver.poll() is None:
            driver.terminate()
            driver.wait(WAIT_S)

    def _cause(self, name: str) -> None:
        if name == "node":
            self._cluster.remove_node(self._cluster.nodes()[0])
        elif name == HEAD:
            self._cluster.kill_head()
        if name in ("driver", "everything"):
            assert self._cluster.driver is not None
            self._cluster.driver.kill()
        found = [process for title in self._side.processes.get(name, ()) for process in descendants(title)]
        send(found[:1] if name == "worker" else found, signal.SIGKILL)

    def _first(self, from_s: float, view: int) -> Step | None:
        """The first step after a time in another view than this one."""
        return next((step for step in self._side.steps() if step.time > from_s and step.view != view), None)

    def _steady(self) -> bool:
        """Some steps of one view with all workers, and not the first ones after a checkpoint."""
        last = self._side.steps()[-STEADY_STEPS:]
        late = bool(last) and last[-1].step > CHECKPOINT_STEPS  # there is a checkpoint
        halfway = late and last[-1].step % CHECKPOINT_STEPS >= CHECKPOINT_STEPS // 2
        one = len({(step.world, step.view) for step in last}) == 1
        return len(last) == STEADY_STEPS and one and last[-1].world == NODES and halfway

    def _wait(self, what: str, holds: Callable[[], Any]) -> Any:
        return until(what, holds, WAIT_S)


def measured(side: Callable[[ChaosCluster, Path], Side], names: tuple[str, ...], take: Callable[[Json], None]) -> None:
    """Hand over all rows of one side, in one run on a cluster of its own.

    Raises:
        TimeoutError: a row did not end in time.
    """
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as root, ChaosCluster(NODES) as cluster:
        run_of = side(cluster, Path(root))
        rows = Rows(cluster, run_of)
        run_of.start()
        try:
            for name in names:
                take(rows.measure(name))
        except TimeoutError as error:
            said = (Path(root) / "driver.log").read_text().strip().splitlines() or ["nothing"]
            raise TimeoutError(f"{run_of.name}: {error}; its driver said last: {said[-1]}") from error
        finally:
            rows.stop()


def benchmark(quick: bool, with_stock: bool, path: Path) -> Json:
    """All rows. The file is written after each of them, so an interrupted run leaves what it has measured."""
    adopt_orphans()
    names = QUICK if quick else ROWS
    result: Json = {"benchmark": "failures", "quick": quick, "machine": machine(), "checkpoint_steps": CHECKPOINT_STEPS}
    result |= {"rows": [], "tuned": STOCK_SETTINGS}

    def take(row: Json) -> None:
        result["rows"].append(row)
        write(result, path)

    def take_stock(row: Json) -> None:
        next(ours for ours in result["rows"] if ours["death"] == row["death"])["stock"] = row
        write(result, path)

    measured(Ours, names, take)
    if with_stock:
        try:
            with environment(STOCK_SETTINGS):
                measured(Stock, tuple(name for name in names if name != "coordinator"), take_stock)
        except TimeoutError as error:  # our side's numbers are worth having without the other's
            say(str(error))
            result["stock_failed"] = str(error)
    return result


def main() -> int:
    parser = arguments("failures", "Time to the next step after the death of each kind of process.")
    parser.add_argument("--no-stock", action="store_true", help="only our side")
    options = parser.parse_args()
    return run(lambda: benchmark(options.quick, not options.no_stock, options.json), options.json)


if __name__ == "__main__":
    sys.exit(main())
