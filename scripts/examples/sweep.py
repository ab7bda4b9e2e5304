"""Compare learning rates: a run for each, one after the other, and a table of what came out.

    python scripts/examples/sweep.py TEXTS [--dir DIR] [--steps N] [--lr LR ...]

A run that is finished is not made again. `elastic-moe train -m` makes the same sweep from the command line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas

import elastic_moe


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare learning rates.")
    parser.add_argument("texts", help="a text file, or a directory of them")
    parser.add_argument("--dir", default="runs/example_sweep", help="directory of the runs")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="the learning rates")
    options = parser.parse_args()
    rows = []
    try:
        for lr in options.lr:
            run = elastic_moe.train(
                model="tiny",
                run={"dir": Path(options.dir) / f"lr_{lr:g}", "steps": options.steps, "resume": "auto"},
                data={"corpus": options.texts},
                optim={"lr": lr},
                cluster={"workers": 2},
                tracking={"wandb": "off"},
            )
            losses = run.metrics()["loss"]
            rows.append({"lr": lr, "loss": losses.tail(10).mean(), "best": losses.min(), "run": run.dir.name})
    except elastic_moe.UserError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return error.exit_code
    print(pandas.DataFrame(rows).sort_values("loss").to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
