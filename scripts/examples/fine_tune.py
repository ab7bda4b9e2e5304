"""Continue the training of a Hugging Face model on texts of your own, and write it back for transformers.

    python scripts/examples/fine_tune.py MODEL TEXTS --to OUT [--run DIR] [--steps N]

MODEL is a directory with config.json and safetensors: DeepSeek-V3, Qwen3-MoE, GLM-4.5 and their kin.
"""

from __future__ import annotations

import argparse
import sys

import elastic_moe


def main() -> int:
    parser = argparse.ArgumentParser(description="Continue the training of a Hugging Face model.")
    parser.add_argument("model", help="directory of the model")
    parser.add_argument("texts", help="a text file, or a directory of them")
    parser.add_argument("--to", required=True, help="directory to write the trained model to")
    parser.add_argument("--run", default="runs/fine_tune", help="the run directory")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    try:
        run = elastic_moe.train(
            model={"init_from": options.model},
            run={"dir": options.run, "steps": options.steps},
            data={"corpus": options.texts},
            optim={"lr": 1e-4, "warmup_steps": 10},
            cluster={"workers": 2},
            tracking={"wandb": "off"},
        )
        print(run.export(options.to))
    except elastic_moe.UserError as error:
        print(f"fine_tune: {error}", file=sys.stderr)
        return error.exit_code
    losses = run.metrics()["loss"]
    print(f"loss {losses.iloc[0]:.3f} -> {losses.iloc[-1]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
