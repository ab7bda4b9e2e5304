"""How long training stands still when workers and nodes die and join: this trainer against Ray Train's own elastic
TorchTrainer.

Both sides train the same model on the same data on a simulated cluster of four nodes with one worker each, and get the
same events. Recovery is the time from the event to the commit of the first step that the new membership made. Steps
lost are committed steps that had to be redone. The elastic side keeps two mirrors, so that any two workers may die at
once.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from omegaconf import OmegaConf
from ray.exceptions import RayError

from elastic_moe.actors.cluster import GIB, ray_session
from elastic_moe.actors.driver import start_coordinator
from elastic_moe.actors.fit import make_trainer
from elastic_moe.actors.link import CoordinatorLink, actor_name
from elastic_moe.config.build import build
from elastic_moe.config.schema import TrainConfig
from elastic_moe.data.prepare import Prepared, prepare
from elastic_moe.environment import environment
from elastic_moe.metrics.jsonl import Tail
from elastic_moe.run_dir import EVENTS, METRICS
from scripts.benchmarks.common import arguments, machine, median, run, say, until
from scripts.benchmarks.stock import TUNED, fit_stock

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 4
WAIT_S = 240.0  # stock Ray needs about 80 s to see that a node is gone
STEADY_STEPS = 10  # between two events, and on either side of a join when its pause is measured

Json = dict[str, Any]


def settings(run_dir: Path, redundancy: int) -> TrainConfig:
    """The tiny model with steps of a fraction of a second, on four nodes."""
    model = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "model" / "tiny.yaml"))
    return build(
        {
            "device": "cpu",
            "model": model,
            "run": {"dir": str(run_dir), "steps": 1_000_000, "eval_every_steps": 0, "sample_tokens": 0},
            "data": {"tokenizer": "bytes", "max_bytes": 1_000_000, "seq_len": 64, "global_batch": 16, "micro_batch": 4},
            "optim": {"schedule": "constant"},
            "elastic": {"max_workers": WORKERS, "redundancy": redundancy},
            "cluster": {"kind": "simulated", "nodes": WORKERS, "workers_per_node": 1},
            "tracking": {"wandb": "off"},
        }
    )


class ElasticSide:
    """Our trainer in progress: what its coordinator and its logs say."""

    def __init__(self, config: TrainConfig, prepared: Prepared) -> None:
        self._dir = Path(config.run.dir)
        self._metrics, self._events = Tail(self._dir / METRICS), Tail(self._dir / EVENTS)
        name, token = actor_name(secrets.token_hex(4)), secrets.token_hex(16)
        self._coordinator = start_coordinator(config, name, token)
        self._link = CoordinatorLink(name)
        self._error: BaseException | None = None
        self._fit = threading.Thread(target=self._train, args=(config, prepared, name), daemon=True)
        self._fit.start()

    def _train(self, config: TrainConfig, prepared: Prepared, name: str) -> None:
        try:
            make_trainer(config, prepared, name).fit()
        except Exception as error:  # noqa: BLE001 - how the run ended is told by whoever waits for it
            self._error = error
            say(f"the elastic run ended: {error}")

    def status(self) -> Json:
        return ray.get(self._coordinator.status.remote(), timeout=30)

    def members(self) -> list[tuple[str, str, int]]:
        """(worker, node, pid) by rank."""
        return [(worker, node, pid) for worker, node, pid, _ in self.status()["members"]]

    def records(self) -> list[Json]:
        return self._metrics.lines()

    def events(self) -> list[Json]:
        return self._events.lines()

    def wait(self, what: str, holds: Callable[[], Any]) -> Any:
        return until(what, holds, WAIT_S, self._fit.is_alive)

    def wait_steady(self, world: int) -> None:
        """Wait for some steps of one generation with that many workers."""

        def steady() -> bool:
            last = self.records()[-STEADY_STEPS:]
            return len(last) == STEADY_STEPS and {(r["world_size"], r["generation"]) for r in last} == {
                (world, last[-1]["generation"])
            }

        self.wait(f"{STEADY_STEPS} steps with {world} workers", steady)

    def measure(self, name: str, act: Callable[[], object], victims: set[int], world: int) -> Json:
        """Cause an event and follow it until `world` workers train steadily."""
        before, generation = self.members(), self.status()["generation"]
        started_s = time.time()
        act()
        first = self.wait("the next committed step", lambda: _first(self.records(), generation, started_s))
        full = self.wait(f"{world} workers", lambda: _first(self.records(), generation, started_s, world))
        self.wait_steady(world)
        after = {pid for _, _, pid in self.members()}
        survivors = {pid for _, _, pid in before} - victims
        entered = [e for e in self.events() if e["event"] == "entered" and generation < e["generation"]]
        result = {
            "event": name,
            "to_next_step_s": first["time"] - started_s,
            "to_full_strength_s": full["time"] - started_s,
            "pause_s": _longest_gap([r["time"] for r in self.records()], started_s, first["time"]),
            "steps_lost": sum(e["lost_steps"] for e in entered),
            "survivors_kept_pid": survivors <= after,
            "survivors": len(survivors),
            "world_size_after": world,
        }
        if world > (first["world_size"] if victims else len(before)):
            result["join_pause_s"] = _pause(self.records(), full)
        say(f"elastic, {name}: {json.dumps({k: v for k, v in result.items() if k != 'event'})}")
        return result

    def close(self) -> None:
        """Stop the run; what does not stop is ended with the cluster."""
        self._link.submit({"event": "stop", "reason": "benchmark over"})
        self._fit.join(60)
        try:
            ray.get(self._coordinator.close.remote(), timeout=30)
        except (RayError, TimeoutError) as error:
            say(f"the coordinator did not end cleanly: {error}")
        ray.kill(self._coordinator)


def _first(records: list[Json], generation: int, started_s: float, world: int = 0) -> Json | None:
    """The first step after an event, by a newer generation, and with that many workers if a number is given."""
    newer = (r for r in records if r["generation"] > generation and r["time"] > started_s)
    return next((r for r in newer if world in (0, r["world_size"])), None)


def _longest_gap(times: list[float], started_s: float, first_s: float) -> float:
    """Longest time without a finished step from the last one before the event to the first one after it.

    A lost node's worker trains on until it is ended, so the time from the event itself counts steps that went well.
    """
    before = max((t for t in times if t <= started_s), default=started_s)
    inside = sorted(t for t in times if before <= t <= first_s)
    return max(b - a for a, b in itertools.pairwise(inside))


def _pause(records: list[Json], joined: Json) -> float | None:
    """How much longer than a median step the survivors waited at a join: the longest gap around its first step."""
    around = [r for r in records if abs(r["step"] - joined["step"]) <= STEADY_STEPS]
    inside = [r for r in around if r["generation"] >= joined["generation"] - 1]
    gaps = [b["time"] - a["time"] for a, b in itertools.pairwise(inside)]
    return max(gaps) - (median(gaps) or 0.0) if gaps else None


def add_node(cluster: Any, config: TrainConfig) -> None:
    cluster.add_node(
        num_cpus=1, object_store_memory=int(config.cluster.object_store_gib * GIB), include_dashboard=False
    )


def remove_node(cluster: Any, node_id: str) -> None:
    node = next(n for n in cluster.list_all_nodes() if n.node_id == node_id)
    cluster.remove_node(node, allow_graceful=False)


def elastic(config: TrainConfig, prepared: Prepared, quick: bool) -> list[Json]:
    """All events on our side, in one run."""
    with ray_session(config) as cluster:
        side = ElasticSide(config, prepared)
        try:
            side.wait_steady(WORKERS)
            say("elastic: 4 workers train")
            results = []
            for ranks in [(1,)] if quick else [(0,), (1,), (2,), (3,), (0, 2)]:
                members = side.members()
                pids = [members[r][2] for r in ranks]
                name = f"kill rank {ranks[0]}" if len(ranks) == 1 else "kill two"
                results.append(side.measure(name, lambda pids=pids: _kill(pids), set(pids), WORKERS))
            _, node, pid = side.members()[1]
            results.append(side.measure("lose node", lambda: remove_node(cluster, node), {pid}, WORKERS - 1))
            results.append(side.measure("add node", lambda: add_node(cluster, config), set(), WORKERS))
            return results
        finally:
            side.close()


def _kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


class StockSide:
    """Ray's elastic trainer in progress, seen through the log of its workers' finished steps."""

    def __init__(self, config: TrainConfig, prepared: Prepared) -> None:
        root = Path(config.run.dir)
        root.mkdir(parents=True)
        log, self._stop_file = root / "steps.jsonl", root / "stop"
        self._log = Tail(log)
        loop = {
            "model": asdict(config.model),
            "data": asdict(config.data),
            "shard": prepared.train_path,
            "log": str(log),
            "stop_file": str(self._stop_file),
            "steps": config.run.steps,
        }
        self._fit = threading.Thread(target=self._train, args=(loop, str(root / "ray")), daemon=True)
        self._fit.start()

    def _train(self, loop: Json, storage: str) -> None:
        try:
            fit_stock(loop, 1, WORKERS, storage)
        except Exception as error:  # noqa: BLE001 - how the run ended is told by whoever waits for it
            say(f"the stock run ended: {type(error).__name__}")

    def lines(self) -> list[Json]:
        return self._log.lines()

    def wait(self, what: str, holds: Callable[[], Any]) -> Any:
        return until(what, holds, WAIT_S, self._fit.is_alive)

    def wait_steady(self, world: int) -> None:
        """Wait until `world` processes finished some steps together."""

        def steady() -> bool:
            last = self.lines()[-STEADY_STEPS * world :]
            pids = {line["pid"] for line in last}
            return len(last) == STEADY_STEPS * world and {line["world"] for line in last} == {world} == {len(pids)}

        self.wait(f"{STEADY_STEPS} steps with {world} stock workers", steady)

    def group(self) -> dict[int, Json]:
        """Newest line of each rank of the newest group."""
        lines = self.lines()
        return {line["rank"]: line for line in lines[-STEADY_STEPS * lines[-1]["world"] :]}

    def measure(self, name: str, act: Callable[[], object], victims: set[int], world: int) -> Json:
        old = {line["pid"] for line in self.lines()}
        group = {line["pid"] for line in self.group().values()}
        started_s = time.time()
        act()

        def resumed(size: int) -> Json | None:
            return next((li for li in self.lines() if li["pid"] not in old and size in (0, li["world"])), None)

        first = self.wait("the first resumed step", lambda: resumed(0))
        full = self.wait(f"{world} stock workers", lambda: resumed(world))
        last = [line for line in self.lines() if line["pid"] in group and line["time"] < first["time"]]
        self.wait_steady(world)
        after = {line["pid"] for line in self.group().values()}
        result = {
            "event": name,
            "to_next_step_s": first["time"] - started_s,
            "to_full_strength_s": full["time"] - started_s,
            "pause_s": _longest_gap([line["time"] for line in self.lines()], started_s, first["time"]),
            "steps_lost": max(0, max(line["step"] for line in last) + 1 - first["step"]),
            "survivors_kept_pid": (group - victims) <= after,
            "world_size_after": world,
        }
        if not victims:
            times = [line["time"] for line in last if line["rank"] == 0][-STEADY_STEPS:]
            steps = [b - a for a, b in itertools.pairwise(times)]
            result["join_pause_s"] = first["time"] - times[-1] - (median(steps) or 0.0)
        say(f"stock, {name}: {json.dumps({k: v for k, v in result.items() if k != 'event'})}")
        return result

    def close(self) -> None:
        """Ask for an end; what goes on is ended with the cluster."""
        self._stop_file.touch()
        self._fit.join(120)  # Ray ends the process where its threads outlive it


def stock(config: TrainConfig, prepared: Prepared, quick: bool) -> list[Json]:
    """The comparable events on Ray's side, in one run."""
    with environment(TUNED), ray_session(config) as cluster:
        side = StockSide(config, prepared)
        try:
            side.wait_steady(WORKERS)
            say("stock: 4 workers train")
            results = []
            for rank in [1] if quick else [0, 1]:
                pid = side.group()[rank]["pid"]
                results.append(side.measure(f"kill rank {rank}", lambda pid=pid: _kill([pid]), {pid}, WORKERS))
            victim = side.group()[1]
            remove = lambda: remove_node(cluster, victim["node"])  # noqa: E731
            results.append(side.measure("lose node", remove, {victim["pid"]}, WORKERS - 1))
            results.append(side.measure("add node", lambda: add_node(cluster, config), set(), WORKERS))
            return results
        finally:
            side.close()


def summary(results: list[Json]) -> Json:
    """The numbers that the two sides are compared by."""
    kills = [r["to_next_step_s"] for r in results if r["event"].startswith("kill rank")]
    by_name = {r["event"]: r for r in results}
    return {
        "kill_to_next_step_s": median(kills),
        "kill_pause_s": median([r["pause_s"] for r in results if r["event"].startswith("kill rank")]),
        "lose_node_to_next_step_s": by_name["lose node"]["to_next_step_s"],
        "lose_node_pause_s": by_name["lose node"]["pause_s"],
        "add_node_to_full_strength_s": by_name["add node"]["to_full_strength_s"],
        "join_pause_s": by_name["add node"]["join_pause_s"],
        "steps_lost": sum(r["steps_lost"] for r in results),
        "survivors_kept_pid": all(r["survivors_kept_pid"] for r in results),
    }


def benchmark(quick: bool, with_stock: bool) -> Json:
    result: Json = {"benchmark": "recovery", "quick": quick, "machine": machine()}
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as root:
        config = settings(Path(root) / "elastic", redundancy=2)
        prepared = prepare(config.data, Path(root) / "cache")
        config = replace(config, model=replace(config.model, vocab_size=prepared.vocab_size))
        Path(config.run.dir).mkdir()
        result["settings"] = {
            "nodes": WORKERS,
            "redundancy": config.elastic.redundancy,
            "model": asdict(config.model),
            "data": {k: getattr(config.data, k) for k in ("tokenizer", "seq_len", "global_batch", "micro_batch")},
        }
        ours = elastic(config, prepared, quick)
        result["elastic"] = {"events": ours, "summary": summary(ours)}
        if with_stock:
            other = replace(config, run=replace(config.run, dir=str(Path(root) / "stock")))
            try:
                theirs = stock(other, prepared, quick)
            except TimeoutError as error:  # our side's numbers are worth having without the other's
                say(f"stock side failed: {error}")
                return result | {"stock": {"failed": str(error)}}
            result["stock"] = {"events": theirs, "summary": summary(theirs), "tuned": TUNED}
            result["stock_over_elastic"] = _ratios(result["stock"]["summary"], result["elastic"]["summary"])
    return result


def _ratios(theirs: Json, ours: Json) -> Json:
    """Their time over ours. The pause at a join is left out where ours is too short to divide by."""
    return {name: theirs[name] / ours[name] for name in ours if name.endswith("_s") and (ours[name] or 0) > 1e-3}


def main() -> int:
    parser = arguments("recovery", "Recovery from deaths and joins, against Ray Train's own elastic trainer.")
    parser.add_argument("--no-stock", action="store_true", help="only our side")
    parser.add_argument("--stock", action="store_true", help="with --quick: Ray's side too")
    options = parser.parse_args()
    with_stock = options.stock if options.quick else not options.no_stock
    return run(lambda: benchmark(options.quick, with_stock), options.json)


if __name__ == "__main__":
    sys.exit(main())
