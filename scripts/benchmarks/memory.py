"""Peak memory of a worker: real runs, against what `elastic-moe describe` says and against DistributedDataParallel.

The product's side is the user's command, through Ray, with a mirror of all state. One worker is killed with SIGKILL
while it trains; the survivors go on without it, and its replacement joins. The other sides are `plain_ddp.py` with
transformers' model of the same shape under Accelerate, and with the project's own model; both have the fused AdamW.

A peak is the kernel's high-water mark of a process's resident memory (`VmHWM`), which begins anew with each part of a
run, so no short peak is missed as by sampling. What is not private is taken off: the pages of files, which all
processes share (libraries, corpus), and shared memory (Ray's object store). `own` is the peak without that of a tiny
model on the same side: the interpreter, the libraries and Ray are in both.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from elastic_moe.cli.compose import check, register_schema
from elastic_moe.cli.describe import at_change, count, memory
from elastic_moe.config.schema import TrainConfig
from elastic_moe.data.prepare import prepare
from elastic_moe.run_dir import EVENTS, METRICS
from scripts.benchmarks.common import WIDE, arguments, in_progress, lines_of, machine, quiet_run, run, say, until

Json = dict[str, Any]

WORKERS, WARM_UP = 4, 3
LIMIT_S = 600.0  # until a run trains, and until it trains with a replacement
CORPUS_BYTES = 1_000_000
BASE = "tiny"
COMMON = [
    "model=small", "model.residual=plain", "data.seq_len=128", "data.global_batch=16", "data.micro_batch=4",
    "optim.schedule=constant", "checkpoint.every_steps=0", "threads=1",
]  # fmt: skip
SHAPES = {
    BASE: ["model.num_experts=4", "model.num_layers=2", "model.hidden_size=64"],
    "medium": [
        "model.hidden_size=256", "model.head_dim=64", "model.rope_dim=32", "model.value_dim=64", "model.kv_latent=128",
        "model.dense_hidden=768", "model.num_experts=32", "model.expert_hidden=256",
    ],
    "wide": WIDE,
}  # fmt: skip
OURS = {"rows": ["balance.copies=1"], "everywhere": ["balance.copies=all"]}
THEIRS = {"transformers": True, "plain": False}


class Peaks:
    """Most private memory of some processes since their peaks were last begun anew. Bytes; dead ones keep theirs."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.of: dict[int, int] = {}
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
            self.add(pid)

    def add(self, pid: int) -> None:
        """Look at a process, from its start where it is a new one."""
        with suppress(OSError, ValueError, StopIteration):
            status = Path(f"/proc/{pid}/status").read_text().splitlines()
            high, files, shared = (_kib(status, key) for key in ("VmHWM", "RssFile", "RssShmem"))
            self.of[pid] = max(self.of.get(pid, 0), (high - files - shared) << 10)

    def look(self) -> None:
        for pid in self.of:
            self.add(pid)


def _kib(status: Sequence[str], key: str) -> int:
    return int(next(line for line in status if line.startswith(f"{key}:")).split()[1])


class Bench:
    """The runs of one shape, in directories below `root`."""

    def __init__(self, root: Path, shape: str, steps: int) -> None:
        self._root, self._shape, self._steps = root, shape, steps
        self._words = [*COMMON, *SHAPES[shape], *quiet_run(root / "cache", CORPUS_BYTES)]

    def _config(self, more: Sequence[str] = ()) -> tuple[TrainConfig, str]:
        """The configuration, and the path of the tokens."""
        (config,) = check([*self._words, *more])
        prepared = prepare(config.data, self._root / "cache")
        return replace(config, model=replace(config.model, vocab_size=prepared.vocab_size)), str(prepared.train_path)

    def ours(self, side: str) -> Json:
        """Peaks in steady state, and over the death of a worker and the joining of its replacement."""
        config, _ = self._config(OURS[side])
        folder = self._root / f"{self._shape}-{side}"
        words = [*self._words, *OURS[side], "cluster=local", f"cluster.workers={WORKERS}", f"run.dir={folder}"]
        with in_progress(["elastic_moe.train", *words, "run.steps=100000"], self._root / "log") as alive:

            def until_steps(count: int, world: int, after: int = 0) -> Json:
                """Wait for so many steps of one view with so many workers. Returns its `view` event."""
                return until(
                    f"{count} steps with {world}", lambda: _view_with(folder, count, world, after), LIMIT_S, alive
                )

            view = until_steps(WARM_UP, WORKERS)
            peaks = Peaks(_pids(folder, view))
            until_steps(len(lines_of(folder / METRICS)) + self._steps, WORKERS)
            peaks.look()
            found: Json = {"steady": sorted(peaks.of.values())}
            victim = _pids(folder, view)[1]
            survivors = Peaks(pid for pid in peaks.of if pid != victim)
            os.kill(victim, signal.SIGKILL)
            after = until_steps(WARM_UP, WORKERS, view["generation"])
            survivors.look()
            found["change_survivors"] = sorted(survivors.of.values())
            joined = Peaks([])
            for pid in set(_pids(folder, after)) - set(peaks.of):
                joined.add(pid)
            found["change_joined"] = sorted(joined.of.values())
        say(f"{self._shape}, {side}: {_mib(found)}")
        described = memory(config, WORKERS)
        found |= {"described": asdict(described), "described_total": described.total}
        return found | {"described_change": at_change(config, WORKERS)}

    def theirs(self, side: str) -> Json:
        """Peaks in steady state."""
        config, shard = self._config()
        folder = self._root / f"{self._shape}-{side}"
        folder.mkdir()
        words = {"model": asdict(config.model), "data": asdict(config.data), "shard": shard, "steps": 100_000}
        words |= {"log": str(folder / "log"), "workers": WORKERS, "transformers": THEIRS[side]}
        words |= {"lr": config.optim.lr, "grad_clip": config.optim.grad_clip}
        with in_progress(["scripts.benchmarks.plain_ddp", json.dumps(words)], self._root / "log") as alive:

            def until_step(number: int) -> Json:
                """Wait for a step. Returns the log's last line."""
                lines = until("a step", lambda: _from(lines_of(folder / "log"), number), LIMIT_S, alive)
                return lines[-1]

            last = until_step(WARM_UP)
            children = psutil.Process(last["parent"]).children()
            ranks = [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]
            assert len(ranks) == WORKERS, ranks
            peaks = Peaks(ranks)
            until_step(last["step"] + self._steps)
            peaks.look()
        found: Json = {"steady": sorted(peaks.of.values())}
        say(f"{self._shape}, {side}: {_mib(found)}")
        return found

    def measure(self, sides: Sequence[str]) -> Json:
        config, _ = self._config()
        found: Json = {side: self.ours(side) if side in OURS else self.theirs(side) for side in sides}
        return {"sides": found, "parameters": count(config.model).total, "model": asdict(config.model)}


def _from(lines: list[Json], step: int) -> list[Json]:
    return lines if lines and lines[-1]["step"] >= step else []


def _view_with(folder: Path, steps: int, world: int, after: int) -> Json | None:
    """The newest view, if it is later than generation `after` and has made so many steps with so many workers."""
    records = [r for r in lines_of(folder / METRICS) if r["world_size"] == world and r["generation"] > after]
    if len(records) < steps:
        return None
    last = records[-1]["generation"]
    views = [e for e in lines_of(folder / EVENTS) if e["event"] == "view" and e["generation"] == last]
    return views[-1] if views else None


def _pids(folder: Path, view: Json) -> list[int]:
    """Processes of a view's members, by rank."""
    pid_of = {e["worker"]: e["pid"] for e in lines_of(folder / EVENTS) if e["event"] == "worker_connected"}
    return [pid_of[worker] for worker in view["members"]]


def _mib(found: Json) -> str:
    parts = {key: [round(one / 2**20) for one in value] for key, value in found.items()}
    return f"{parts} MiB"


def compared(shapes: Json) -> Json:
    """The figures that are aimed at, per shape: peaks of the fullest worker without those of the tiny model."""
    found: Json = {}
    base = {side: max(one["steady"]) for side, one in shapes[BASE]["sides"].items()}
    for shape, of in shapes.items():
        if shape == BASE:
            continue
        sides: Json = of["sides"]
        own = {side: max(one["steady"]) - base[side] for side, one in sides.items()}
        table: Json = {"own_bytes": own}
        for side in (name for name in OURS if name in sides):
            one = sides[side]
            change = max(one["change_survivors"] + one["change_joined"])
            table[side] = {
                "own_over_described": own[side] / one["described_total"],
                "change_over_described": (change - base[side]) / one["described_change"],
                "change_over_steady": (change - base[side]) / own[side],
                **{f"own_over_{other}": own[side] / own[other] for other in THEIRS if other in own},
                **{f"all_over_{o}": max(one["steady"]) / max(sides[o]["steady"]) for o in THEIRS if o in own},
            }
        found[shape] = table
    return found


def benchmark(quick: bool, shapes: Sequence[str], sides: Sequence[str], steps: int) -> Json:
    result: Json = {"benchmark": "memory", "quick": quick, "machine": machine(), "workers": WORKERS, "steps": steps}
    found: Json = {}
    register_schema()
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as root:
        for shape in [BASE, *shapes]:
            found[shape] = Bench(Path(root), shape, steps).measure(sides)
    result |= {"words": COMMON, "shapes": found, "compared": compared(found)}
    say(json.dumps(result["compared"]))
    return result


def main() -> int:
    parser = arguments("memory", "Peak memory of a worker, against what describe says and against DDP.")
    choices = [shape for shape in SHAPES if shape != BASE]
    parser.add_argument("--shapes", nargs="+", default=choices, choices=choices, help="models: medium wide")
    every = [*OURS, *THEIRS]
    parser.add_argument("--sides", nargs="+", default=every, choices=every, help=f"sides: {' '.join(every)}")
    parser.add_argument("--steps", type=int, default=6, help="that are measured in steady state: 6")
    given = parser.parse_args()
    shapes, sides, steps = (("medium",), ("rows",), 2) if given.quick else (given.shapes, given.sides, given.steps)
    return run(lambda: benchmark(given.quick, shapes, sides, steps), given.json)


if __name__ == "__main__":
    sys.exit(main())
