"""From the command to the first step: two workers, here and with Ray Train's own elastic trainer.

Both sides are commands of a user that start a Ray of their own, train the same model on the same prepared corpus, and
end after two steps. They run in turn, some rounds, after one round that only warms the caches of files.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from elastic_moe.config.build import build
from elastic_moe.data.prepare import prepare
from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.run_dir import EVENTS, METRICS
from scripts.benchmarks.common import arguments, call, machine, median, quiet_run, run, say
from scripts.benchmarks.stock import TUNED

Json = dict[str, Any]

WORKERS, STEPS = 2, 2
LIMIT_S = 600.0  # for one command
CORPUS_BYTES = 1_000_000


class Start:
    """The commands of both sides, in directories below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        values = {"max_bytes": CORPUS_BYTES}
        config = build({"device": "cpu", "data": values, "tracking": {"wandb": "off"}})
        self._prepared = prepare(config.data, root / "cache")
        self.config = replace(config, model=replace(config.model, vocab_size=self._prepared.vocab_size))

    def elastic(self, number: int) -> Json:
        folder = self._root / f"elastic-{number}"
        words = [f"run.dir={folder}", f"run.steps={STEPS}", f"cluster.workers={WORKERS}"]
        words += quiet_run(self._root / "cache", CORPUS_BYTES)
        began_s, took_s = self._took(["elastic_moe.train", *words], {})
        events = [event for event in read_jsonl(folder / EVENTS) if event["event"] == "worker_connected"]
        return {
            "placed_s": max(event["placed_s"] for event in events) - began_s,
            "connected_s": max(event["time"] for event in events) - began_s,
            "first_step_s": read_jsonl(folder / METRICS)[0]["time"] - began_s,
            "end_s": took_s,
        }

    def stock(self, number: int) -> Json:
        folder = self._root / f"stock-{number}"
        folder.mkdir()
        loop = {"model": asdict(self.config.model), "data": asdict(self.config.data), "steps": STEPS}
        loop |= {"shard": self._prepared.train_path, "log": str(folder / "log"), "stop_file": str(folder / "stop")}
        given = {"loop": loop, "min_workers": WORKERS, "max_workers": WORKERS, "storage": str(folder / "ray")}
        began_s, took_s = self._took(["scripts.benchmarks.stock", "local", json.dumps(given)], TUNED)
        return {"first_step_s": read_jsonl(folder / "log")[0]["time"] - began_s, "end_s": took_s}

    def _took(self, words: list[str], variables: dict[str, str]) -> tuple[float, float]:
        """Run a module to its end. Returns the wall clock at its start, and the seconds that it took."""
        began_s = time.time()
        call(words, self._root / "log", LIMIT_S, variables)
        return began_s, time.time() - began_s


def benchmark(quick: bool, rounds: int) -> Json:
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as root:
        start = Start(Path(root))
        found: dict[str, list[Json]] = {"elastic": [], "stock": []}
        for number in range(1 if quick else rounds + 1):
            for name, results in found.items():
                result = getattr(start, name)(number)
                say(f"{name}, round {number}: {result}")
                if number or quick:
                    results.append(result)
        result: Json = {"benchmark": "start", "quick": quick, "machine": machine(), "workers": WORKERS}
        result |= {"model": asdict(start.config.model), "rounds": found}
        for key in ("first_step_s", "end_s"):
            ours, theirs = (median([r[key] for r in results]) for results in found.values())
            result[key] = {"elastic": ours, "stock": theirs, "elastic_over_stock": (ours or 0.0) / (theirs or 1.0)}
        return result


def main() -> int:
    parser = arguments("start", "From the command to the first step, against Ray Train's own elastic trainer.")
    parser.add_argument("--rounds", type=int, default=4, help="commands of each side that count: 4")
    options = parser.parse_args()
    return run(lambda: benchmark(options.quick, options.rounds), options.json)


if __name__ == "__main__":
    sys.exit(main())
