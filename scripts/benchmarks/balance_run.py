"""Balancing on and off in real runs: same tokens, same first weights, step time and slowest rank's load side by side,
losses compared.

The corpus is skewed: two thirds of its bytes are one character, and hash layers send equal bytes to equal experts, so
that imbalance is real and lasts. Both sides are whole runs of the product, a few steps in turn: run A trains to step n,
then run B, and so on, so a noisy machine disturbs both alike. Step times are compared step by step; the first steps of
each piece are left out (workers warm up).
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.run_dir import EVENTS, METRICS
from scripts.benchmarks import common

SIDES = {
    "off": ["balance.every_steps=0", "elastic.spare_slots=0"],
    "off, same slots": ["balance.every_steps=0", "elastic.spare_slots=1"],
    "on": ["balance.every_steps=1", "elastic.spare_slots=1", "balance.home_every_steps=5", "balance.home_moves=4"],
}
MODEL = [
    "balance.copies=1",
    "model.hidden_size=128", "model.num_layers=4", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=32",
    "model.num_experts=8", "model.experts_per_token=1", "model.num_hash_layers=3",
    "model.expert_hidden=1024", "model.num_shared_experts=0",
    "model.bias_update_speed=0", "model.seq_balance_weight=0", "model.init_std=0.1", "model.dense_hidden=128",
]  # fmt: skip
WARM_UP = 3  # steps at the beginning of a piece that are not timed


def skewed_corpus(directory: Path) -> Path:
    """Lines of the standard library's source in a table: two thirds of all bytes are its rules and padding."""
    lines_of = [line.strip() for line in Path(os.__file__).read_text().splitlines() if len(line.strip()) > 20]
    rng = random.Random(0)
    path = directory / "skewed.txt"
    rows = (f"|{rng.choice(lines_of)[:40]:-<120}|" for _ in range(20_000))
    path.write_text("\n".join(rows))
    return path


def piece(side: str, run_dir: Path, steps: int, workers: int, corpus: Path, final: int) -> None:
    """Train one side on to `steps`; the schedule is that of `final` steps."""
    command = [
        sys.executable, "-m", "elastic_moe.train", "cluster=local", f"run.dir={run_dir}", f"run.steps={steps}",
        "run.resume=auto", "seed=0",
        *MODEL, *SIDES[side], f"cluster.workers={workers}", "threads=1", "tracking.wandb=off", "run.sample_tokens=0",
        "checkpoint.every_steps=0", "run.eval_every_steps=0", "run.eval_sequences=8",
        f"data.corpus={corpus}", "data.tokenizer=bytes", "data.seq_len=128",
        "data.global_batch=64", "data.micro_batch=8", "optim.schedule=constant", "optim.lr=2e-4",
        f"data.cache_dir={run_dir.parent / 'cache'}",
        f"optim.warmup_steps={min(10, final)}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise TimeoutError(f"balancing {side}: exit code {done.returncode}: {done.stderr[-800:]}")


def measure(pieces: int, steps: int, workers: int) -> dict[str, Any]:
    """Both sides in turn."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        corpus = skewed_corpus(root)
        names = {side: root / f"run{index}" for index, side in enumerate(SIDES)}
        for number in range(1, pieces + 1):
            for side, run_dir in names.items():
                piece(side, run_dir, number * steps, workers, corpus, pieces * steps)
                common.say(f"balancing {side}: {number * steps} of {pieces * steps} steps")
        records = {side: read_jsonl(run_dir / METRICS) for side, run_dir in names.items()}
        changes = [e for e in read_jsonl(names["on"] / EVENTS) if e["event"] == "rebalanced"]
    timed = [i for i in range(pieces * steps) if i % steps >= WARM_UP]
    result: dict[str, Any] = {
        "benchmark": "balance_run",
        "machine": common.machine(),
        "workers": workers,
        "steps": pieces * steps,
    }
    for side, rows in records.items():
        result[side] = {
            "step_s": statistics.median(rows[i]["step_s"] for i in timed),
            "balance": statistics.fmean(rows[i]["balance"] for i in timed),
            "slowest_rank_over_mean": statistics.fmean(1 / rows[i]["balance"] for i in timed),
            "hottest_expert_over_mean": statistics.fmean(max(rows[i]["layer_max_load"]) for i in timed),
            "cross_node_rows": statistics.fmean(rows[i]["cross_node_rows"] for i in timed),
            "loss": [round(row["loss"], 5) for row in rows],
        }
    for other in ("off", "off, same slots"):
        ratios = [records["on"][i]["step_s"] / records[other][i]["step_s"] for i in timed]
        result[f"step time, on over {other}"] = {
            "median": round(statistics.median(ratios), 4),
            "quartiles": [round(q, 4) for q in statistics.quantiles(ratios)],
        }
        gaps = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(records["on"], records[other], strict=True)]
        result[f"largest relative difference of losses, on and {other}"] = max(gaps)
    result["changes"] = {
        "number": len(changes),
        "expected_gain_s": sum(e["expected"]["gain_s"] * e["measured"]["steps"] for e in changes),
        "measured_gain_s": sum(e["measured"]["gain_s"] * e["measured"]["steps"] for e in changes),
        "switch_s": statistics.fmean(e["measured"]["switch_s"] for e in changes) if changes else None,
    }
    return result


if __name__ == "__main__":
    parser = common.arguments("balance_run", __doc__.split("\n")[0])
    parser.add_argument("--pieces", type=int, default=4, help="turns of each side")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()
    pieces, steps = (1, 6) if args.quick else (args.pieces, args.steps)
    raise SystemExit(common.run(lambda: measure(pieces, steps, args.workers), args.json))
