"""A learning rate found on a small model, on wider ones: with `optim.base_width` and without.

Every width is trained with each learning rate by the user's command, once with the settings as they are and once scaled
from the smallest width. The rate that is best there is then used on the wider models: what it costs there, beside the
best rate of their own, is the loss of a setting that was not searched again.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks.common import arguments, machine, run, say
from scripts.benchmarks.trial_runs import MODEL, train

Json = dict[str, Any]
RULES = ("as they are", "scaled")
PLAIN = ["model.residual=plain", "optim.warmup_steps=10"]


def shape(width: int) -> list[str]:
    """A model of this width: all its widths in the same proportion, heads of 32, the same number of experts."""
    return [
        f"model.hidden_size={width}", f"model.num_heads={width // 32}", f"model.kv_latent={width // 2}",
        f"model.dense_hidden={3 * width}", f"model.expert_hidden={width // 2}",
    ]  # fmt: skip


def final_losses(root: Path, steps: int, widths: Sequence[int], lrs: Sequence[float]) -> dict[str, dict[int, Json]]:
    """Rule -> width -> learning rate -> bits per byte at the end. At the smallest width both rules are the same."""
    found: dict[str, dict[int, Json]] = {rule: {} for rule in RULES}
    for width in widths:
        for rule in RULES if width > widths[0] else RULES[:1]:
            scaled = [f"optim.base_width={widths[0]}"] if rule == "scaled" else []
            losses: Json = {}
            for lr in lrs:
                losses[f"{lr:g}"] = train(root, steps, [*PLAIN, *shape(width), *scaled, f"optim.lr={lr}"]).final
                say(f"width {width}, {rule}, lr {lr:g}: {losses[f'{lr:g}']:.4f} bits per byte")
            found[rule][width] = losses
    found["scaled"] = {widths[0]: found["as they are"][widths[0]]} | found["scaled"]
    return found


def transferred(losses: dict[int, Json]) -> Json:
    """What the smallest width's best learning rate gives at each width, beside the best of its own."""
    first = next(iter(losses.values()))
    rate = min(first, key=lambda lr: first[lr])
    return {
        str(width): {
            "own_lr": min(of, key=lambda lr: of[lr]),
            "own": min(of.values()),
            "lr": rate,
            "with_it": of[rate],
            "costs": of[rate] - min(of.values()),
        }
        for width, of in losses.items()
    }


def benchmark(steps: int, widths: Sequence[int], lrs: Sequence[float]) -> Json:
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as root:
        found = final_losses(Path(root), steps, sorted(widths), lrs)
    return {
        "benchmark": "width",
        "machine": machine(),
        "steps": steps,
        "model": [*MODEL, *PLAIN],
        "lrs": list(lrs),
        "bits_per_byte": {rule: {str(width): of for width, of in losses.items()} for rule, losses in found.items()},
        "transferred": {rule: transferred(losses) for rule, losses in found.items()},
    }


def main() -> int:
    parser = arguments("width", (__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of a run: 150")
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256], help="multiples of 32: 64 128 256")
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2])
    given = parser.parse_args()
    sizes = (10, [32, 64], [2e-3, 8e-3]) if given.quick else (given.steps, given.widths, given.lrs)
    return run(lambda: benchmark(*sizes), given.json)


if __name__ == "__main__":
    sys.exit(main())
