"""A sweep side by side against the same sweep one by one: wall time of six trials on a cluster of four workers.

The serial side is what Hydra does by itself (`-m`): one trial after the other, each on all four workers, and nobody
disturbs it. The other side is `hydra/launcher=elastic`, with a worker and a node killed meanwhile; another node comes
in its place. Both are the user's own commands on the same cluster. Afterwards the second command runs once more: it
should pass over what is finished.
"""

from __future__ import annotations

import csv
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastic_moe.config.build import build
from elastic_moe.data.prepare import prepare
from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.run_dir import EVENTS, METRICS
from scripts.benchmarks.chaos_cluster import ChaosCluster, adopt_orphans, send
from scripts.benchmarks.common import arguments, machine, quiet_run, run, say, until

WORKERS = 4
LIMIT_S = 2400.0  # for a sweep
CORPUS_BYTES = 1_000_000
REPLACED_S = 10.0  # until another node comes in place of the lost one

PROXY = [  # so small that four workers spend their steps waiting for one another, as many a sweep's proxy model is
    "model=tiny", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1",
    "model.head_dim=16", "model.dense_hidden=64", "model.num_experts=8", "model.experts_per_token=2",
    "model.expert_hidden=16", "data.seq_len=64", "data.global_batch=16",
]  # fmt: skip
MODELS = {"proxy": PROXY, "tiny": ["model=tiny"], "small": ["model=small"]}
Json = dict[str, Any]


def overrides(root: Path, trials: int, steps: int, model: str) -> list[str]:
    """The same model and corpus, with another seed in each trial."""
    values = [*MODELS[model], f"run.steps={steps}", *quiet_run(root / "cache", CORPUS_BYTES)]
    return [*values, f"cluster.workers={WORKERS}", f"seed={','.join(map(str, range(trials)))}"]


class Sweep:
    """One sweep on a cluster."""

    def __init__(self, cluster: ChaosCluster, root: Path, trials: int, steps: int, model: str) -> None:
        self._cluster, self._root, self.trials, self.steps = cluster, root, trials, steps
        self._words = overrides(root, trials, steps, model)

    def run(self, name: str, *more: str, disturb: Callable[[Path], None] | None = None) -> Json:
        """Run the command to its end, and tell what it took.

        Args:
            name: of the sweep's directory.
            more: further arguments.
            disturb: is called with the directory while the sweep goes on.

        Raises:
            TimeoutError: it did not end in time.
        """
        folder, log = self._root / name, self._root / f"{name}.log"
        words = [*self._words, f"run.dir={folder}", *more]
        address = f"cluster.address={self._cluster.cluster.address}"
        say(f"{name}: {self.trials} trials of {self.steps} steps")
        began_s = time.monotonic()
        self._cluster.start_module(["elastic_moe.train", "-m", "cluster=address", address, *words], log)
        if disturb is not None:
            disturb(folder)
        until(f"the end of {name}", lambda: self._cluster.exit_code() is not None, LIMIT_S)
        took_s = time.monotonic() - began_s
        runs = [folder / str(trial) for trial in range(self.trials)]
        steps = [[record["step"] for record in read_jsonl(path / METRICS)] for path in runs]
        lost = sum(event["event"] == "worker_lost" for path in runs for event in read_jsonl(path / EVENTS))
        whole = sum(found == list(range(1, self.steps + 1)) for found in steps)
        result = {"wall_s": took_s, "exit_code": self._cluster.exit_code(), "trials_with_each_step_once": whole}
        result |= {"workers_lost": lost, "passed_over": log.read_text().count("is passed over")}
        say(f"{name}: {result}")
        return result | {"states": states(folder)}


def states(folder: Path) -> list[str]:
    """What became of the trials, by sweep.csv; nothing where the launcher writes none."""
    path = folder / "sweep.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return [row["state"] for row in csv.DictReader(file)]


def disturbed(cluster: ChaosCluster, steps: int) -> Callable[[Path], None]:
    """Kills a worker when three trials train, and a node once one of them is half done."""

    def made(folder: Path) -> list[int]:
        return [len(read_jsonl(path)) for path in folder.glob(f"*/{METRICS}")]

    def running() -> bool:
        return cluster.exit_code() is None

    def disturb(folder: Path) -> None:
        until("three trials that train", lambda: sum(n > 2 for n in made(folder)) >= 3, LIMIT_S, running)
        say(f"a worker is killed: {send(cluster.workers()[:1], signal.SIGKILL)}")
        until("a trial that is half done", lambda: max(made(folder)) >= steps // 2, LIMIT_S, running)
        node = cluster.nodes()[-1]
        cluster.remove_node(node)
        say("a node is killed")
        time.sleep(REPLACED_S)
        while not cluster.try_add_node():
            pass
        say("another node has come")

    return disturb


def benchmark(trials: int, steps: int, model: str, quick: bool) -> Json:
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as root, ChaosCluster(WORKERS) as cluster:
        prepare(build({"data": {"max_bytes": CORPUS_BYTES}}).data, Path(root) / "cache")  # neither side waits for it
        sweep = Sweep(cluster, Path(root), trials, steps, model)
        result: Json = {"benchmark": "sweep", "quick": quick, "machine": machine(), "workers": WORKERS}
        result |= {"trials": trials, "steps": steps, "model": model}
        result["serial"] = serial = sweep.run("serial")
        cluster.restore(WORKERS)
        elastic = sweep.run("elastic", "hydra/launcher=elastic", disturb=disturbed(cluster, steps))
        again = sweep.run("elastic", "hydra/launcher=elastic")
        result |= {"elastic": elastic, "rerun": again, "elastic_over_serial": elastic["wall_s"] / serial["wall_s"]}
    return result


def main() -> int:
    parser = arguments("sweep", "Six trials side by side, with deaths, against one by one.")
    parser.add_argument("--trials", type=int, default=6, help="trials: 6")
    parser.add_argument("--steps", type=int, default=600, help="steps of a trial: 600")
    parser.add_argument("--model", choices=MODELS, default="proxy", help="model of the trials: proxy")
    options = parser.parse_args()
    trials, steps = (3, 12) if options.quick else (options.trials, options.steps)
    return run(lambda: benchmark(trials, steps, options.model, options.quick), options.json)


if __name__ == "__main__":
    sys.exit(main())
