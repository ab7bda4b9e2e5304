"""Plain residual, HC and mHC on the same text: same tokens, order and first weights, several seeds; loss curves drawn.

Every run is a run of the product, `elastic_moe.train` with one worker, read back from its metrics. The figures are the
training loss averaged over the last tenth of the steps, the validation loss at the end, and the difference of both to
the plain residual of the same seed. Step times stand beside them; they are those of one machine and of eager kernels.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.run_dir import EVENTS, METRICS
from scripts.benchmarks import common
from scripts.benchmarks.figures import Curve, draw_curves

KINDS = ("plain", "hc", "mhc")
MODEL = [
    "model=tiny", "model.attention=mla", "model.num_layers=8", "model.head_dim=32", "model.value_dim=32",
    "model.rope_dim=16", "model.kv_latent=64", "data.global_batch=16",
]  # fmt: skip


def train(kind: str, seed: int, steps: int, root: Path, threads: int) -> dict[str, Any]:
    """One run of the product. Returns its records."""
    run_dir = root / f"{kind}-{seed}"
    command = [
        sys.executable, "-m", "elastic_moe.train", "cluster=local", f"run.dir={run_dir}", f"run.steps={steps}",
        f"seed={seed}",
        *MODEL, f"model.residual={kind}", "cluster.workers=1", f"threads={threads}", "tracking.wandb=off",
        "run.sample_tokens=0", "checkpoint.every_steps=0", "run.eval_every_steps=0", "run.eval_sequences=256",
        f"data.cache_dir={root / 'cache'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise TimeoutError(f"{kind}, seed {seed}: exit code {done.returncode}: {done.stderr[-500:]}")
    records, events = read_jsonl(run_dir / METRICS), read_jsonl(run_dir / EVENTS)
    val_loss = [e["val_loss"] for e in events if e["event"] == "evaluated"][-1]
    shutil.rmtree(run_dir)
    tail = max(1, steps // 10)
    gains = {key: [round(r[key], 4) for r in records] for key in records[0] if key.startswith("gain")}
    return {
        "residual": kind,
        "seed": seed,
        "train_loss": statistics.fmean(r["loss"] for r in records[-tail:]),
        "val_loss": val_loss,
        "step_s": statistics.median(r["step_s"] for r in records),
        "loss": [round(r["loss"], 4) for r in records],
        "grad_norm": [round(r["grad_norm"], 4) for r in records],
        **gains,
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, and of the differences to plain with the same seed."""
    table: dict[str, Any] = {}
    plain = {r["seed"]: r for r in runs if r["residual"] == "plain"}
    for kind in KINDS:
        own = [r for r in runs if r["residual"] == kind]
        row: dict[str, Any] = {"seeds": len(own), "step_s_median": statistics.median(r["step_s"] for r in own)}
        for key in ("train_loss", "val_loss"):
            values = [r[key] for r in own]
            gaps = [r[key] - plain[r["seed"]][key] for r in own]
            row[key] = _mean_and_spread(values)
            row[f"{key}_minus_plain"] = _mean_and_spread(gaps)
        table[kind] = row
    return table


def _mean_and_spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def main() -> int:
    parser = common.arguments("residual", __doc__ or "")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--svg", type=Path, help="file that takes the drawing")
    options = parser.parse_args()
    steps, seeds = (6, 1) if options.quick else (options.steps, options.seeds)

    def body() -> dict[str, Any]:
        runs: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory(prefix="emoe-residual-") as root:
            for seed in range(seeds):
                for kind in KINDS:  # in turn, so that what else the machine does falls on all alike
                    runs.append(train(kind, seed, steps, Path(root), options.threads))
                    last = runs[-1]
                    common.say(f"{kind} seed {seed}: train {last['train_loss']:.4f} val {last['val_loss']:.4f}")
        if options.svg:
            curves = [Curve(r["residual"], r["loss"]) for r in runs]
            draw_curves(options.svg, "training loss", curves)
        return {
            "benchmark": "residual", "machine": common.machine(), "steps": steps, "model": MODEL,
            "summary": summary(runs),
            "runs": runs,
        }  # fmt: skip

    return common.run(body, options.json)


if __name__ == "__main__":
    sys.exit(main())
