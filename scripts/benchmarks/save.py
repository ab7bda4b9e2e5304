"""What a large checkpoint costs while it is made: silence of the workers, memory, and time of the step loop.

Two workers of a real run (coordinator, heartbeats, records, mirrors) save a part of the state each, again and again,
while other processes want the cores. Ray is left out, for it takes no part in a save. The coordinator notes when
heartbeats arrive; this process reads the memory of the workers.

- *Silence*: the longest time between two heartbeats of a worker. A worker sends one every `elastic.heartbeat_s`.
- *Memory*: the peak of a worker's resident memory in the second half of the run, over that in the first half. Both
  halves have saves, so what grows would show. And the peak in saves over the peak before the first one.
"""

from __future__ import annotations

import multiprocessing as mp
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from elastic_moe.config.build import build
from elastic_moe.config.schema import TrainConfig
from elastic_moe.control.messages import HeartbeatMessage
from elastic_moe.coordination.coordinator import RunCoordinator
from elastic_moe.data.prepare import prepare
from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.run_dir import EVENTS
from scripts.benchmarks.common import arguments, machine, median, run
from scripts.benchmarks.overhead import full_worker, processes, wait_all

WORKERS = 2
HIDDEN = 512
EXPERTS = 16
BYTES_SAVED = 12  # per element: the weight and two moments
TOKEN = "benchmark"


def settings(run_dir: Path, mib_per_worker: int, steps: int, every: int) -> TrainConfig:
    """A run whose workers save about so many MiB each: nearly all of it is one layer of wide experts."""
    wanted = WORKERS * mib_per_worker * 2**20 // BYTES_SAVED // (3 * HIDDEN * EXPERTS)
    expert_hidden = max(8, wanted // 8 * 8)
    model = {"hidden_size": HIDDEN, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32}
    model |= {"dense_hidden": 1024, "num_experts": EXPERTS, "experts_per_token": 2, "expert_hidden": expert_hidden}
    return build(
        {
            "device": "cpu",
            "model": model,
            "run": {"dir": str(run_dir), "steps": steps, "eval_every_steps": 0, "sample_tokens": 0},
            "data": {"tokenizer": "bytes", "max_bytes": 200_000, "seq_len": 64, "global_batch": 4, "micro_batch": 2},
            "checkpoint": {"every_steps": every, "keep": 1},
            "tracking": {"wandb": "off"},
        }
    )


class Watch:
    """Notes heartbeats as they reach a coordinator, and the memory of processes ten times a second."""

    def __init__(self, coordinator: RunCoordinator) -> None:
        self.beats: dict[str, list[float]] = {}
        self.memory: list[tuple[float, float]] = []  # (seconds, bytes of the largest process)
        self._ended = threading.Event()
        membership = coordinator._server._membership
        receive = membership.receive

        def noted(worker: str, message: Any) -> None:
            if isinstance(message, HeartbeatMessage) and message.generation > 0:
                self.beats.setdefault(worker, []).append(time.monotonic())
            receive(worker, message)

        membership.receive = noted  # type: ignore[method-assign]

    def follow(self, pids: Sequence[int]) -> None:
        """Read the memory until `end`; runs in a thread."""
        watched = [psutil.Process(pid) for pid in pids]
        while not self._ended.wait(0.1):
            try:
                self.memory.append((time.monotonic(), max(process.memory_info().rss for process in watched)))
            except psutil.Error:
                return

    def end(self) -> None:
        self._ended.set()

    def longest_silence_s(self) -> float:
        return max(b - a for times in self.beats.values() for a, b in pairwise(times))

    def peak(self, begin_s: float, end_s: float) -> float:
        return max((size for at_s, size in self.memory if begin_s <= at_s < end_s), default=0.0)


def _spin() -> None:
    while True:
        pass


def benchmark(mib_per_worker: int, steps: int, every: int, load: int) -> dict[str, Any]:
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as root:
        config = settings(Path(root) / "run", mib_per_worker, steps, every)
        Path(config.run.dir).mkdir()
        prepared = prepare(config.data, Path(root) / "cache")
        config = replace(config, model=replace(config.model, vocab_size=prepared.vocab_size))
        coordinator = RunCoordinator(config, TOKEN, WORKERS)
        watch = Watch(coordinator)
        idle = [mp.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(load)]
        try:
            by_rank = [(config, coordinator.address, prepared, rank) for rank in range(WORKERS)]
            with processes(full_worker, by_rank) as workers:
                threading.Thread(target=watch.follow, args=([w.pid for w in workers],), daemon=True).start()
                for process in idle:
                    process.start()
                wait_all(workers)
            records = coordinator.records_since(0)
        finally:
            watch.end()
            coordinator.close()
            for process in idle:
                if process.is_alive():
                    process.kill()
        events = read_jsonl(Path(config.run.dir) / EVENTS)
        return {"benchmark": "save", "machine": facts} | _found(config, watch, records, events, load)


def _found(
    config: TrainConfig, watch: Watch, records: list[dict[str, Any]], events: list[dict[str, Any]], load: int
) -> dict[str, Any]:
    """The figures. Times of records are wall clock, those of the memory are not: both are counted from the end."""
    every = config.checkpoint.every_steps
    saved = [event for event in events if event["event"] == "checkpoint"]
    last_s, last_wall_s = watch.memory[-1][0], max(record["time"] for record in records)
    at_s = {record["step"]: last_s - (last_wall_s - record["time"]) for record in records}
    first_save_s, middle_s = at_s[every], at_s[(every + config.run.steps) // 2]
    before, first = watch.peak(0.0, first_save_s), watch.peak(first_save_s, middle_s)
    second = watch.peak(middle_s, last_s)
    gaps = {step: at_s[step + 1] - at_s[step] for step in at_s if step + 1 in at_s and step > 1}
    with_save = [gap for step, gap in gaps.items() if step % every == 0]
    without = [gap for step, gap in gaps.items() if step % every]
    bad = sum(event["event"] in ("worker_evicted", "worker_lost", "checkpoint_failed") for event in events)
    return {
        "settings": {"workers": WORKERS, "steps": config.run.steps, "every_steps": every, "busy_processes": load},
        "heartbeat_s": config.elastic.heartbeat_s,
        "checkpoints": len(saved),
        "skipped": sum(event["event"] == "checkpoint_skipped" for event in events),
        "mib_per_worker": round(
            sum(event.get("bytes", 0) for event in saved) / max(1, len(saved)) / WORKERS / 2**20, 1
        ),
        "longest_silence_s": watch.longest_silence_s(),
        "evictions_and_failures": bad,
        "peak_gib": {"before": before / 2**30, "first_half": first / 2**30, "second_half": second / 2**30},
        "peak_second_over_first": second / first if first else None,
        "median_step_s": {"after_a_save": median(with_save), "else": median(without)},
        "final_loss": records[-1]["loss"],
    }


def main() -> int:
    parser = arguments("save", "Silence, memory and time of large checkpoints.")
    parser.add_argument("--mib", type=int, default=1024, help="saved by each worker")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--every", type=int, default=4, help="steps between two checkpoints")
    parser.add_argument("--load", type=int, default=2, help="other processes that want a core")
    given = parser.parse_args()
    sizes = (16, 8, 2, 1) if given.quick else (given.mib, given.steps, given.every, given.load)
    return run(lambda: benchmark(*sizes), given.json)


if __name__ == "__main__":
    sys.exit(main())
