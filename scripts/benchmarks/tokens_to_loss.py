"""Tokens and seconds to a fixed validation loss: AdamW and Muon, with the plain residual and with mHC.

Every run is the user's command on one worker, read back from its metrics. Both optimizers are tuned by the same trials
(the learning rates of `--lrs`, with the first seed); the other seeds have the best one. The validation loss that both
must reach, per residual, is the worst of their final ones. Between two evaluations it is interpolated.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from scripts.benchmarks.common import arguments, machine, run, say
from scripts.benchmarks.figures import Curve, draw_curves
from scripts.benchmarks.trial_runs import MODEL, Curves, train

Json = dict[str, Any]
OPTIMIZERS, RESIDUALS = ("adamw", "muon"), ("plain", "mhc")


@dataclass(frozen=True)
class Run:
    """A run with these settings."""

    optimizer: str
    residual: str
    lr: float
    seed: int
    curves: Curves

    @property
    def final(self) -> float:
        return self.curves.final


@dataclass(frozen=True)
class Bench:
    """Makes runs of so many steps, in directories below `root`."""

    root: Path
    steps: int

    def train(self, optimizer: str, residual: str, lr: float, seed: int) -> Run:
        words = [f"seed={seed}", f"model.residual={residual}", f"optim.name={optimizer}", f"optim.lr={lr}"]
        made = Run(optimizer, residual, lr, seed, train(self.root, self.steps, words))
        say(f"{optimizer}, {residual}, lr {lr:g}, seed {seed}: {made.final:.4f} bits per byte")
        return made


def reached(made: Run, target: float) -> tuple[float, float]:
    """Tokens and seconds at which the validation loss came down to the target."""
    points = made.curves.points
    if points[0][2] <= target:
        return points[0][:2]
    for (tokens, seconds, loss), (more, later, less) in pairwise(points):
        if less <= target:
            part = (loss - target) / (loss - less)
            return tokens + part * (more - tokens), seconds + part * (later - seconds)
    raise AssertionError("every run reaches the worst final loss")


def compare(tuning: Sequence[Run], runs: Sequence[Run]) -> Json:
    """Both optimizers with one residual."""
    target = max(made.final for made in runs)
    found: Json = {"target_bits_per_byte": target}
    for optimizer in OPTIMIZERS:
        own = [made for made in runs if made.optimizer == optimizer]
        at = [reached(made, target) for made in own]
        found[optimizer] = {
            "trials": {f"{made.lr:g}": made.final for made in tuning if made.optimizer == optimizer},
            "lr": own[0].lr,
            "final": [made.final for made in own],
            "tokens": [tokens for tokens, _ in at],
            "seconds": [seconds for _, seconds in at],
            "points": [made.curves.points for made in own],
        }
    for unit in ("tokens", "seconds"):
        found[f"muon_over_adamw_{unit}"] = statistics.fmean(found["muon"][unit]) / statistics.fmean(
            found["adamw"][unit]
        )
    return found


def benchmark(steps: int, seeds: int, lrs: Sequence[float], residuals: Sequence[str], svg: Path | None) -> Json:
    result: Json = {
        "benchmark": "tokens_to_loss",
        "machine": machine(),
        "steps": steps,
        "model": list(MODEL),
        "lrs": list(lrs),
    }
    curves: list[Curve] = []
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as root:
        bench = Bench(Path(root), steps)
        for residual in residuals:
            tuning = [bench.train(optimizer, residual, lr, 0) for lr in lrs for optimizer in OPTIMIZERS]
            runs: list[Run] = []
            for optimizer in OPTIMIZERS:
                best = min((made for made in tuning if made.optimizer == optimizer), key=lambda made: made.final)
                runs += [best, *(bench.train(optimizer, residual, best.lr, seed) for seed in range(1, seeds))]
            result[residual] = compare(tuning, runs)
            ratios = {unit: round(result[residual][f"muon_over_adamw_{unit}"], 3) for unit in ("tokens", "seconds")}
            say(f"{residual}: Muon over AdamW {ratios}")
            curves += [Curve(f"{made.optimizer}, {residual}", made.curves.loss) for made in runs]
    if svg:
        draw_curves(svg, "training loss, nats per byte,", curves)
    return result


def main() -> int:
    parser = arguments("tokens_to_loss", (__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of a run: 300")
    parser.add_argument("--seeds", type=int, default=3, help="runs with the best learning rate: 3")
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3], help="learning rates tried")
    parser.add_argument("--residuals", nargs="+", default=list(RESIDUALS), choices=RESIDUALS)
    parser.add_argument("--svg", type=Path, help="file that takes the drawing")
    given = parser.parse_args()
    sizes = (20, 1, [2e-3], ["plain"]) if given.quick else (given.steps, given.seeds, given.lrs, given.residuals)
    return run(lambda: benchmark(*sizes, given.svg), given.json)


if __name__ == "__main__":
    sys.exit(main())
