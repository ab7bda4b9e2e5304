"""Tokens a second of real runs against plain DistributedDataParallel scripts.

The product's side is the user's command, through Ray, with a mirror of all state: with rows that travel
(`balance.copies=1`), and as it decides by itself (`auto`); over a link also with gradients that travel in bf16
(`auto_bf16`: `reduce_precision=bf16`), which those of the other sides do not. The other sides are `plain_ddp.py`, which
survives nothing: with the project's model (`plain`), and with transformers' DeepSeek-V3 of the same shape, with the
plain residual, under Accelerate (`transformers`). All train on the same prepared corpus with the same batches. Rounds
are made in turn; a step's time is the median of those after the first ones, and the ratios are of medians over the
rounds.

With `--link RATE` all of it happens in a network of its own, in which all ranks of a run share a link of this rate,
and each worker of the product is on a node of its own (`cluster=simulated`). With `--machines RATE` half of the ranks
are on each of two machines (`two_machines.py`), which such a link joins; then copies on every worker (`all`) and on
every node (`node`) are measured too. Both need root, `ip` and `tc`, the first one `unshare`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from elastic_moe.cli.compose import check, register_schema
from elastic_moe.data.prepare import prepare
from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.run_dir import METRICS
from scripts.benchmarks.common import WIDE, arguments, call, machine, median, quiet_run, run, say
from scripts.benchmarks.two_machines import TwoMachines

Json = dict[str, Any]

WARM_UP = 4  # steps that do not count
LIMIT_S = 900.0  # for one run
CORPUS_BYTES = 1_000_000
PLAIN = ["model=small", "model.residual=plain"]
SHAPES = {
    "tiny": [*PLAIN, "model.num_layers=2", "model.hidden_size=64"],
    "small": PLAIN,
    "small_mhc": ["model=small"],
    "wide": [*PLAIN, *WIDE],
}
LINK = "EMOE_BENCH_LINK"  # variable with the rate of the network that this process is in
OTHERS = ("plain", "transformers")
OWN = {"rows": ["balance.copies=1"], "auto": ["balance.copies=auto"]}  # side -> its settings
BF16 = {"auto_bf16": ["balance.copies=auto", "reduce_precision=bf16"]}
LINKED = OWN | BF16
APART = OWN | {"node": ["balance.copies=node"], "all": ["balance.copies=all"]} | BF16


class Bench:
    """The runs of one shape on so many workers, in directories below `root`; on two machines, if there are any."""

    def __init__(self, root: Path, shape: str, workers: int, steps: int, machines: TwoMachines | None) -> None:
        self._root, self._workers, self.steps, self._machines = root, workers, steps, machines
        self._own = APART if machines is not None else LINKED if os.environ.get(LINK) else OWN
        self._words = [*SHAPES[shape], "optim.schedule=constant", *quiet_run(root / "cache", CORPUS_BYTES)]
        register_schema()
        (self.config,) = check(self._words)
        self._prepared = prepare(self.config.data, root / "cache")
        self.config = replace(self.config, model=replace(self.config.model, vocab_size=self._prepared.vocab_size))

    def seconds_of_steps(self, side: str, number: int) -> list[float]:
        """Seconds of each step that counts."""
        folder = self._root / f"{side}-{number}"
        folder.mkdir()
        if side in OTHERS:
            data, log = asdict(self.config.data), folder / "log"
            words = {"model": asdict(self.config.model), "data": data, "shard": self._prepared.train_path}
            words |= {"transformers": side == "transformers"}
            words |= {"log": str(log), "steps": self.steps, "workers": self._workers}
            words |= {"lr": self.config.optim.lr, "grad_clip": self.config.optim.grad_clip}
            words |= {"networks": self._machines.networks if self._machines is not None else ()}
            call(["scripts.benchmarks.plain_ddp", json.dumps(words)], self._root / "log", LIMIT_S)
        else:
            words = [*self._words, f"run.dir={folder}", f"run.steps={self.steps}", *self._cluster()]
            words += ["checkpoint.every_steps=0", *self._own[side]]
            where = () if self._machines is None else (self._machines.variables, self._machines.inside(0))
            call(["elastic_moe.train", *words], self._root / "log", LIMIT_S, *where)
            log = folder / METRICS
        times = [line["time"] for line in read_jsonl(log)]
        return [after - before for before, after in itertools.pairwise(times)][WARM_UP - 1 :]

    def _cluster(self) -> list[str]:
        if os.environ.get(LINK):
            return ["cluster=simulated", f"cluster.nodes={self._workers}", "cluster.workers_per_node=1"]
        if self._machines is not None:
            address = f"cluster.address={self._machines.address}"
            return ["cluster=address", address, f"cluster.workers={self._workers}"]
        return [f"cluster.workers={self._workers}"]

    def measure(self, rounds: int) -> Json:
        steps_s: dict[str, list[float]] = {side: [] for side in (*self._own, *OTHERS)}
        for number in range(rounds):
            for side, found in steps_s.items():
                found.append(median(self.seconds_of_steps(side, number)) or 0.0)
                say(f"{side}, round {number + 1}: a step takes {found[-1]:.3f} s")
        tokens = self.config.data.global_batch * self.config.data.seq_len
        rates = {side: tokens / (median(found) or 1.0) for side, found in steps_s.items()}
        ratios = {f"{own}_over_{other}": rates[own] / rates[other] for own in self._own for other in OTHERS}
        return {"step_s": steps_s, "tokens_per_s": rates, **ratios, "model": asdict(self.config.model)}


def enter(rate: str) -> None:
    """Begin this program again in a network whose loopback carries so much a second, as `tc` writes it."""
    limit = f"ip link set lo up && tc qdisc add dev lo root tbf rate {rate} burst 512kb latency 400ms"
    program = [sys.executable, "-m", "scripts.benchmarks.throughput", *sys.argv[1:]]
    os.environ[LINK] = rate
    os.execvp("unshare", ["unshare", "--net", "bash", "-c", f'{limit} && exec "$@"', "bash", *program])


def benchmark(
    quick: bool, shapes: Sequence[str], workers: Sequence[int], steps: int, rounds: int, between: str
) -> Json:
    result: Json = {"benchmark": "throughput", "quick": quick, "machine": machine(), "steps": steps, "shapes": {}}
    result |= {"link": os.environ.get(LINK, ""), "between_machines": between}
    for shape, number in itertools.product(shapes, workers):
        apart = TwoMachines(between, number // 2) if between else nullcontext()
        with tempfile.TemporaryDirectory(prefix="emoe-bench") as root, apart as machines:
            say(f"{shape} on {number} workers")
            found = Bench(Path(root), shape, number, steps, machines).measure(rounds)
        say(str({key: value for key, value in found.items() if "_over_" in key}))
        result["shapes"].setdefault(shape, {})[str(number)] = found
    return result


def main() -> int:
    parser = arguments("throughput", "Tokens a second against plain DDP scripts.")
    full = list(SHAPES)[1:]
    parser.add_argument("--shapes", nargs="+", default=full, choices=SHAPES, help=f"models: {' '.join(full)}")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4], help="numbers of workers: 1 2 4")
    parser.add_argument("--steps", type=int, default=24, help="steps of a run: 24")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side: 2")
    parser.add_argument("--link", metavar="RATE", default="", help="in a network of this rate, such as 1gbit")
    parser.add_argument("--machines", metavar="RATE", default="", help="on two machines with a link of this rate")
    options = parser.parse_args()
    if options.machines and (options.link or any(number % 2 for number in options.workers)):
        parser.error("--machines is for even numbers of --workers, and goes without --link")
    if options.link and os.environ.get(LINK) != options.link:
        enter(options.link)
    shapes, workers = (["tiny"], [2]) if options.quick else (options.shapes, options.workers)
    steps, rounds = (8, 1) if options.quick else (options.steps, options.rounds)
    return run(lambda: benchmark(options.quick, shapes, workers, steps, rounds, options.machines), options.json)


if __name__ == "__main__":
    sys.exit(main())
