"""One of four workers at half speed: tokens a second of real runs against what workers of these speeds could do.

Each worker may use a part of a core, so that the throttle and not the number of cores is the limit; one gets half of
that. Runs with equal workers give the rate of a worker at full speed. With the slow one, a run could make 3.5/4 of it.
Each is made with shares that follow the measured speeds and with even ones (`balance.by_speed`), in turn. The commands
are the user's, through Ray. The throttle begins when a run trains, so that starts take no longer.

Beside that, `speed_world.py` runs the rule alone in virtual time, with up to 1,024 ranks whose steps vary by 10 %.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.plan.shares import Batching
from elastic_moe.run_dir import EVENTS, METRICS
from scripts.benchmarks.common import arguments, machine, median, quiet_run, run, say, until
from scripts.benchmarks.speed_world import SpeedWorld
from scripts.benchmarks.throttle import Throttle

Json = dict[str, Any]

WORKERS, PART, SLOWED = 4, 0.4, 0.5  # part of a core that a worker gets; of that, what the slow one gets
CORPUS_BYTES = 500_000
SETTLE_STEPS = 14  # under the throttle, before steps are measured
LIMIT_S = 300.0
SIDES = ("even", "by_speed")
MODEL = [
    "model=small", "model.residual=plain", "data.seq_len=64", "data.global_batch=128", "data.micro_batch=16",
    "optim.schedule=constant",
]  # fmt: skip


def seconds_of_steps(root: Path, name: str, by_speed: bool, slow: bool, seconds: float) -> Json:
    """One run, of which `seconds` are measured: those after the shares have come to rest."""
    folder = root / name
    words = [
        sys.executable, "-m", "elastic_moe.train", "cluster=local", f"cluster.workers={WORKERS}", f"run.dir={folder}",
        "run.steps=100000", "checkpoint.every_steps=0", "threads=1", f"balance.by_speed={str(by_speed).lower()}",
        *MODEL, *quiet_run(root / "cache", CORPUS_BYTES),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (root / "log").open("a") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:

            def alive() -> bool:
                return process.poll() is None

            until("the first steps", lambda: _trains(folder), LIMIT_S, alive)
            events = _read(folder / EVENTS)
            members = next(e["members"] for e in reversed(events) if e["event"] == "view")
            pid_of = {e["worker"]: e["pid"] for e in events if e["event"] == "worker_connected"}
            parts = {pid_of[worker]: PART for worker in members}
            if slow:
                parts[pid_of[members[-1]]] *= SLOWED
            with Throttle(parts):
                first = len(_read(folder / METRICS))
                until("steps to settle", lambda: len(_read(folder / METRICS)) >= first + SETTLE_STEPS, LIMIT_S, alive)
                settled = len(_read(folder / METRICS))
                time.sleep(seconds)
                records = _read(folder / METRICS)[settled:]
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    changes = [e for e in _read(folder / EVENTS) if e["event"] == "speeds"]
    stragglers = [e for e in _read(folder / EVENTS) if e["event"] == "straggler"]
    spans = [after["time"] - before["time"] for before, after in pairwise(records)]
    rate = sum(r["tokens"] for r in records[1:]) / (records[-1]["time"] - records[0]["time"])
    phases = ("compute", "reduce", "mirror", "vote", "apply", "publish")
    return {
        "tokens_per_s": rate,
        "steps": len(spans),
        "step_s": median(spans),
        "phases_s": {phase: median([r[f"{phase}_s"] for r in records]) for phase in phases},
        "shares": changes[-1]["shares"] if changes else None,
        "changes": len(changes),
        "stragglers": [[e["rank"], e["factor"], e["phase"]] for e in stragglers],
    }


def _trains(folder: Path) -> bool:
    """Whether all workers are there and have made steps together."""
    together = [r for r in _read(folder / METRICS) if r["world_size"] == WORKERS]
    return len(together) >= 3


def _read(path: Path) -> list[Json]:
    return read_jsonl(path) if path.exists() else []


def measured(seconds: float, rounds: int) -> Json:
    """Runs of both kinds, in turn."""
    runs: dict[str, list[Json]] = {f"{kind}, {side}": [] for kind in ("equal", "slow") for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as root:
        for number in range(rounds):
            for name, found in runs.items():
                kind, side = name.split(", ")
                found.append(
                    seconds_of_steps(Path(root), f"{kind}-{side}-{number}", side == "by_speed", kind == "slow", seconds)
                )
                say(f"{name}: {found[-1]['tokens_per_s']:.0f} tokens/s, shares {found[-1]['shares']}")
    rate = {name: median([one["tokens_per_s"] for one in found]) or 0.0 for name, found in runs.items()}
    ideal = rate["equal, even"] * (WORKERS - 1 + SLOWED) / WORKERS
    return {
        "runs": runs,
        "tokens_per_s": rate,
        "ideal": ideal,
        "by_speed_over_ideal": rate["slow, by_speed"] / ideal,
        "even_over_ideal": rate["slow, even"] / ideal,
        "by_speed_over_even_if_equal": rate["equal, by_speed"] / rate["equal, even"],
    }


def simulated(most: int, steps: int) -> Json:
    """The rule in virtual time."""
    found: Json = {}
    for ranks in (n for n in (4, 64, 1024) if n <= most):
        slow_R, two_R = np.ones(ranks), np.where(np.arange(ranks) % 3 == 0, 0.7, 1.0)
        slow_R[-1] = 0.5
        for name, speed_R in {"equal": np.ones(ranks), "one at half": slow_R, "two kinds": two_R}.items():
            world = SpeedWorld(speed_R, Batching(32 * ranks, 8), noise=0.1)
            world.run(steps)
            found[f"{ranks} ranks, {name}"] = {
                "changes": list(world.changes),
                "efficiency": world.efficiency(),
                "even_efficiency": world.even_efficiency(),
                "rule_ms_a_step": 1000 * float(np.mean(world.rule_s)),
                "rule_ms_longest": 1000 * float(np.quantile(world.rule_s, 0.99)),
            }
        say(f"simulated {ranks} ranks")
    return found


def benchmark(seconds: float, rounds: int, most: int) -> Json:
    facts = {"workers": WORKERS, "part_of_a_core": PART, "slowed_to": SLOWED, "words": MODEL}
    return {
        "benchmark": "stragglers",
        "machine": machine(),
        **facts,
        "measured": measured(seconds, rounds),
        "simulated": simulated(most, 200),
    }


def main() -> int:
    parser = arguments("stragglers", "One of four workers at half speed, with even shares and with shares by speed.")
    parser.add_argument("--seconds", type=float, default=20.0, help="that are measured in each run: 20")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each kind: 1")
    options = parser.parse_args()
    seconds, rounds, most = (4.0, 1, 64) if options.quick else (options.seconds, options.rounds, 1024)
    return run(lambda: benchmark(seconds, rounds, most), options.json)


if __name__ == "__main__":
    sys.exit(main())
