"""One of four workers at half speed: tokens a second of real runs against what workers of these speeds could do.

Each worker may use a part of a core, so that the throttle and not the number of cores is the limit; one gets half of
that. Each run is measured with equal workers first, and then with the slow one, with which it could make 3.5/4 of the
tokens. One run has shares that follow the measured speeds, the other one even ones (`balance.by_speed`). The commands
are the user's, through Ray. The throttle begins when a run trains, so that starts take no longer.

Beside that, `speed_world.py` runs the rule alone in virtual time, with up to 1,024 ranks whose steps vary by 10 %.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from elastic_moe.plan.shares import Batching
from elastic_moe.run_dir import EVENTS, METRICS
from scripts.benchmarks.common import arguments, in_progress, lines_of, machine, median, quiet_run, run, say, until
from scripts.benchmarks.speed_world import SpeedWorld
from scripts.benchmarks.throttle import Throttle

Json = dict[str, Any]

WORKERS, PART, SLOWED = 4, 0.15, 0.5  # part of a core that a worker gets; of that, what the slow one gets
CORPUS_BYTES = 500_000
SETTLE_STEPS = 12  # under the throttle, before steps are measured
LIMIT_S = 300.0
SIDES = ("even", "by_speed")
MODEL = [
    "model=small", "model.residual=plain", "model.num_layers=2", "data.seq_len=32", "data.global_batch=128",
    "data.micro_batch=16", "optim.schedule=constant",
]  # fmt: skip


def one_run(root: Path, name: str, by_speed: bool, steps: int) -> Json:
    """One run: first with equal workers, then with a slow one. Each time the shares come to rest before it counts."""
    folder = root / name
    words = [
        "elastic_moe.train", "cluster=local", f"cluster.workers={WORKERS}", f"run.dir={folder}",
        "run.steps=100000", "checkpoint.every_steps=0", "threads=1", f"balance.by_speed={str(by_speed).lower()}",
        *MODEL, *quiet_run(root / "cache", CORPUS_BYTES),
    ]  # fmt: skip
    found: Json = {}
    # Ray's niceness of 15 would slow workers down beside any other work; only the throttle is to do so
    with in_progress(words, root / "log", {"RAY_worker_niceness": "0"}) as alive:
        until("the first steps", lambda: _trains(folder), LIMIT_S, alive)
        events = lines_of(folder / EVENTS)
        members = next(e["members"] for e in reversed(events) if e["event"] == "view")
        pid_of = {e["worker"]: e["pid"] for e in events if e["event"] == "worker_connected"}
        parts = {pid_of[worker]: PART for worker in members}
        for kind, settle in (("equal", SETTLE_STEPS // 2), ("slow", SETTLE_STEPS)):
            if kind == "slow":
                parts[pid_of[members[-1]]] *= SLOWED
            with Throttle(parts):
                first = len(lines_of(folder / METRICS)) + settle
                last = first + steps
                until("steps", lambda last=last: len(lines_of(folder / METRICS)) > last, LIMIT_S, alive)
            found[kind] = _figures(folder, first, last)
            say(f"{name}, {kind}: {found[kind]['tokens_per_s']:.0f} tokens/s, shares {found[kind]['shares']}")
    return found


def _figures(folder: Path, first: int, last: int) -> Json:
    """Of the steps after record `first` up to record `last`."""
    records, events = lines_of(folder / METRICS)[first : last + 1], lines_of(folder / EVENTS)
    changes = [e for e in events if e["event"] == "speeds"]
    spans = [after["time"] - before["time"] for before, after in pairwise(records)]
    phases = ("compute", "reduce", "mirror", "vote", "apply", "publish")
    return {
        "tokens_per_s": sum(r["tokens"] for r in records[1:]) / sum(spans),
        "tokens_per_s_median": (records[-1]["tokens"]) / (median(spans) or 1.0),
        "step_s": spans,
        "phases_s": {phase: median([r[f"{phase}_s"] for r in records]) for phase in phases},
        "shares": changes[-1]["shares"] if changes else None,
        "changes": [e["step"] for e in changes],
        "stragglers": [[e["step"], e["rank"], e["factor"], e["phase"]] for e in events if e["event"] == "straggler"],
    }


def _trains(folder: Path) -> bool:
    """Whether all workers are there and have made steps together."""
    together = [r for r in lines_of(folder / METRICS) if r["world_size"] == WORKERS]
    return len(together) >= 3


def measured(steps: int, rounds: int) -> Json:
    """Runs of both kinds, in turn."""
    runs: dict[str, list[Json]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as root:
        for number in range(rounds):
            for side, found in runs.items():
                found.append(one_run(Path(root), f"{side}-{number}", side == "by_speed", steps))
    rate = {
        f"{kind}, {side}": median([one[kind]["tokens_per_s_median"] for one in found]) or 0.0
        for side, found in runs.items()
        for kind in ("equal", "slow")
    }
    of_ideal = {side: rate[f"slow, {side}"] / rate[f"equal, {side}"] for side in SIDES}
    part = (WORKERS - 1 + SLOWED) / WORKERS
    return {
        "runs": runs,
        "tokens_per_s": rate,
        "by_speed_over_ideal": of_ideal["by_speed"] / part,
        "even_over_ideal": of_ideal["even"] / part,
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


def benchmark(steps: int, rounds: int, most: int) -> Json:
    facts = {"workers": WORKERS, "part_of_a_core": PART, "slowed_to": SLOWED, "words": MODEL}
    return {
        "benchmark": "stragglers",
        "machine": machine(),
        **facts,
        "measured": measured(steps, rounds),
        "simulated": simulated(most, 200),
    }


def main() -> int:
    parser = arguments("stragglers", "One of four workers at half speed, with even shares and with shares by speed.")
    parser.add_argument("--steps", type=int, default=12, help="that are measured in each part of a run: 12")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each kind: 1")
    options = parser.parse_args()
    steps, rounds, most = (3, 1, 64) if options.quick else (options.steps, options.rounds, 1024)
    return run(lambda: benchmark(steps, rounds, most), options.json)


if __name__ == "__main__":
    sys.exit(main())
