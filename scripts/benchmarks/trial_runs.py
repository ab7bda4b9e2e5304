"""Short runs by the user's command on one worker, read back from their records, to compare recipes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.run_dir import EVENTS, METRICS
from scripts.benchmarks.common import call, quiet_run

MODEL = ("model=small", "data.tokenizer=bytes", "data.seq_len=128", "data.global_batch=16", "data.micro_batch=8")
CORPUS_BYTES = 8_000_000
EVALUATIONS = 12
LIMIT_S = 1800.0  # for one run


@dataclass(frozen=True)
class Curves:
    """(tokens, seconds, bits per byte) at each evaluation, and the training loss of each step."""

    points: tuple[tuple[float, float, float], ...]
    loss: tuple[float, ...]

    @property
    def final(self) -> float:
        """Bits per byte of the last evaluation; infinite if it is no number."""
        last = self.points[-1][2]
        return last if math.isfinite(last) else math.inf


def train(root: Path, steps: int, words: Sequence[str]) -> Curves:
    """Make one run below `root`. `words`: settings beside `MODEL`."""
    folder = root / "run"
    given = [*MODEL, *quiet_run(root / "cache", CORPUS_BYTES), f"run.steps={steps}", "checkpoint.every_steps=0"]
    given += [f"run.eval_every_steps={max(1, steps // EVALUATIONS)}", "run.eval_sequences=48"]
    given += ["cluster=local", "cluster.workers=1", *words]
    call(["elastic_moe.train", *given, f"run.dir={folder}"], root / "log", LIMIT_S)
    records = {line["step"]: line for line in read_jsonl(folder / METRICS)}
    tokens = {step: line["tokens"] * step for step, line in records.items()}
    seconds, total = {}, 0.0
    for step in sorted(records):
        total += records[step]["step_s"]
        seconds[step] = total
    found = [event for event in read_jsonl(folder / EVENTS) if event["event"] == "evaluated"]
    points = tuple((tokens[e["step"]], seconds[e["step"]], e["val_loss"] / math.log(2)) for e in found)
    shutil.rmtree(folder)
    return Curves(points, tuple(records[step]["loss"] for step in sorted(records)))
