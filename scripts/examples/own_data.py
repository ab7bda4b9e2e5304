"""Train a small model on texts of your own, look at its losses, and let it write.

    python scripts/examples/own_data.py TEXTS [--run DIR] [--steps N]

TEXTS is a text file or a directory of them. The run goes on where an earlier one in the same directory stopped.
"""

from __future__ import annotations

import argparse
import sys

import elastic_moe


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a small model on texts of your own.")
    parser.add_argument("texts", help="a text file, or a directory of them")
    parser.add_argument("--run", default="runs/own_data", help="the run directory")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    try:
        config = elastic_moe.configure(
            model="tiny",
            run={"dir": options.run, "steps": options.steps, "resume": "auto", "eval_every_steps": 50},
            data={"corpus": options.texts},
            cluster={"workers": 2},
            tracking={"wandb": "off"},
        )
        run = elastic_moe.train(config)
    except elastic_moe.UserError as error:
        print(f"own_data: {error}", file=sys.stderr)
        return error.exit_code
    print(run.metrics()[["step", "loss", "tokens_per_s", "world_size"]].tail(5).to_string(index=False))
    print(run.generate("The ", max_tokens=40))
    print(f"drawn in {run.report()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
