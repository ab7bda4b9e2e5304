"""Goodput under failures: a worker dies every minute, and the two trainers are compared by the time that counted.

Both sides train the quickstart's model on the same data, on a simulated cluster of four nodes with one worker each, one
side after the other: this trainer, and Ray Train's own elastic TorchTrainer with a checkpoint at every step. Effective
training time is what the new steps would have taken undisturbed, by each side's own median step before the first
death. On our side the books are also held against the lives of the workers, summed from the events alone.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import psutil
from omegaconf import OmegaConf

from elastic_moe.actors.cluster import ray_session
from elastic_moe.config.build import build
from elastic_moe.config.schema import TrainConfig
from elastic_moe.control.goodput import TIME_CAUSES
from elastic_moe.data.prepare import Prepared, prepare
from elastic_moe.environment import environment
from elastic_moe.metrics.goodput import account
from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.run_dir import EVENTS
from scripts.benchmarks.common import arguments, machine, median, run, say
from scripts.benchmarks.recovery import ROOT, WORKERS, ElasticSide, Json, StockSide
from scripts.benchmarks.stock import TUNED

DEATH_EVERY_S = 60.0
ENDS = ("worker_lost", "worker_evicted", "worker_finished", "worker_left", "worker_released")


def settings(run_dir: Path) -> TrainConfig:
    """The quickstart's model and data, on four nodes."""
    model = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "model" / "small.yaml"))
    return build(
        {
            "device": "cpu",
            "model": model,
            "run": {"dir": str(run_dir), "steps": 1_000_000, "eval_every_steps": 0, "sample_tokens": 0},
            "data": {"max_bytes": 1_000_000},
            "optim": {"schedule": "constant"},
            "elastic": {"max_workers": WORKERS},
            "cluster": {"kind": "simulated", "nodes": WORKERS, "workers_per_node": 1},
            "tracking": {"wandb": "off"},
        }
    )


def new_steps(lines: list[Json]) -> list[float]:
    """Times at which a step was finished for the first time, in order."""
    highest, times = 0, []
    for line in sorted(lines, key=lambda line: line["time"]):
        if line["step"] > highest:
            highest = line["step"]
            times.append(line["time"])
    return times


def measure(lines: Callable[[], list[Json]], victim: Callable[[int], int], deaths: int) -> Json:
    """Kill a worker every minute, and tell what the time from one minute before the first death went into.

    Args:
        lines: finished steps so far, each with `step` and `time`.
        victim: process to kill at the n-th death.
        deaths: number of deaths.
    """
    began_s = time.time()
    for number in range(deaths):
        time.sleep(max(0.0, began_s + (number + 1) * DEATH_EVERY_S - time.time()))
        pid = victim(number)
        say(f"death {number + 1} of {deaths}: process {pid}")
        os.kill(pid, signal.SIGKILL)
    time.sleep(max(0.0, began_s + (deaths + 1) * DEATH_EVERY_S - time.time()))
    ended_s = time.time()
    times = new_steps(lines())
    calm = [t for t in times if began_s <= t < began_s + DEATH_EVERY_S]
    step_s = median([b - a for a, b in itertools.pairwise(calm)]) or 0.0
    count = sum(began_s + DEATH_EVERY_S <= t <= ended_s for t in times)
    disturbed_s = ended_s - began_s - DEATH_EVERY_S
    result = {
        "undisturbed_step_s": step_s,
        "disturbed_s": disturbed_s,
        "new_steps": count,
        "effective_training_time": count * step_s / disturbed_s,
    }
    say(str(result))
    return result


def lived_s(events: list[Json]) -> float:
    """Seconds of all workers from their placement to their end, from the events alone."""
    placed, total_s = {}, 0.0
    for event in events:
        worker = event.get("worker", "")
        if event["event"] == "worker_connected":
            placed[worker] = event["placed_s"]
        elif event["event"] in ENDS and worker in placed:
            total_s += event["time"] - placed.pop(worker)
    return total_s + sum(events[-1]["time"] - since_s for since_s in placed.values())


def elastic(config: TrainConfig, prepared: Prepared, deaths: int) -> Json:
    with ray_session(config):
        side = ElasticSide(config, prepared)
        try:
            side.wait_steady(WORKERS)
            result = measure(side.records, lambda n: side.members()[n % len(side.members())][2], deaths)
        finally:
            side.close()
    books, lived = account(config.run.dir, {}), lived_s(read_jsonl(Path(config.run.dir) / EVENTS))
    shares = {cause: books["worker_s"][cause] / books["total_s"] for cause in TIME_CAUSES}
    return result | {"books": books, "shares": shares, "lived_s": lived, "books_over_lived": books["total_s"] / lived}


def stock(config: TrainConfig, prepared: Prepared, deaths: int) -> Json:
    with environment(TUNED), ray_session(config):
        side = StockSide(config, prepared)
        try:
            side.wait_steady(WORKERS)

            def victim(number: int) -> int:
                """A process of the newest group; one that is being started has made no step yet, and is waited for."""

                def alive() -> list[int]:
                    return [pid for pid in sorted({line["pid"] for line in side.lines()}) if psutil.pid_exists(pid)]

                pids = side.wait("a stock worker", alive)
                return pids[number % len(pids)]

            return measure(side.lines, victim, deaths)
        finally:
            side.close()


def benchmark(quick: bool, deaths: int) -> Json:
    deaths = 1 if quick else deaths
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as root:
        config = settings(Path(root) / "elastic")
        prepared = prepare(config.data, Path(root) / "cache")
        config = replace(config, model=replace(config.model, vocab_size=prepared.vocab_size))
        Path(config.run.dir).mkdir()
        result: Json = {"benchmark": "goodput", "quick": quick, "machine": machine(), "workers": WORKERS}
        result |= {"death_every_s": DEATH_EVERY_S, "deaths": deaths, "model": asdict(config.model)}
        result["elastic"] = ours = elastic(config, prepared, deaths)
        other = replace(config, run=replace(config.run, dir=str(Path(root) / "stock")))
        result["stock"] = theirs = stock(other, prepared, deaths) | {"tuned": TUNED}
        ratio = "effective_training_time"
        result["elastic_over_stock"] = ours[ratio] / theirs[ratio] if theirs[ratio] else None
    return result


def main() -> int:
    parser = arguments("goodput", "Effective training time with a death every minute, against Ray Train's own.")
    parser.add_argument("--deaths", type=int, default=4, help="deaths on each side: 4")
    options = parser.parse_args()
    return run(lambda: benchmark(options.quick, options.deaths), options.json)


if __name__ == "__main__":
    sys.exit(main())
