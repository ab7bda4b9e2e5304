"""Chaos runs on one cluster: train while faults happen, then check what must hold whatever happened."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from elastic_moe.run_dir import CHECKPOINTS
from scripts.benchmarks.chaos_cluster import (
    CONTROLLER,
    COORDINATOR,
    ROOT,
    WORKER,
    ChaosCluster,
    Json,
    adopt_orphans,
    descendants,
    events,
    records,
    title,
    wait_gone,
)
from scripts.benchmarks.chaos_faults import FATAL, NODES, ROOM, Faults
from tests.storage_faults import set_fault

POLL_S = 0.1
LIMIT_S = 600.0  # a run that takes longer hangs
STARTS = 4  # of the driver
NEAR = 0.03  # relative difference of losses that another order of sums may make in a soak's run


def overrides(run_dir: Path, cache: Path, steps: int, redundancy: int, recipe: Sequence[str] = ()) -> list[str]:
    """The run: a tiny model on real text, reproducible, with checkpoints. `recipe`: words that count more."""
    parts = {
        "model": "hidden_size=32 num_layers=2 num_heads=2 num_kv_heads=1 head_dim=16 dense_hidden=64 num_experts=8 "
        "experts_per_token=2 expert_hidden=16 max_unit_elements=4096",
        "data": f"max_bytes=300000 tokenizer=bytes seq_len=32 global_batch=10 micro_batch=2 cache_dir={cache}",
        "run": f"dir={run_dir} steps={steps} eval_every_steps=0 eval_sequences=4 sample_tokens=0 resume=auto",
        "elastic": f"reproducible=true max_workers={ROOM} redundancy={redundancy}",
        "checkpoint": "every_steps=15",
        "cluster": f"workers={NODES}",
        "tracking": "wandb=off",
    }
    return ["device=cpu", *(f"{part}.{item}" for part, items in parts.items() for item in items.split()), *recipe]


def wrong_records(run_dir: Path, steps: int) -> list[str]:
    """A complaint unless each step from 1 to `steps` is recorded once, in order."""
    found = [record["step"] for record in records(run_dir)]
    if found == list(range(1, steps + 1)):
        return []
    wrong = [b for a, b in itertools.pairwise([0, *found]) if b != a + 1]
    return [f"{len(found)} of {steps} steps are recorded, out of order at {wrong[:3]}"]


def wrong_checkpoint(run_dir: Path, steps: int) -> list[str]:
    """A complaint unless all checkpoints verify and the last step's is there."""
    root = run_dir / CHECKPOINTS
    verify = [sys.executable, "-m", "elastic_moe.cli.main", "checkpoint", "verify", str(root)]
    done = subprocess.run(verify, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if not done.returncode and (root / f"step_{steps:08d}" / "manifest.json").exists():
        return []
    return [f"the checkpoints do not verify: {(done.stdout + done.stderr)[-300:]}"]


def wrong_losses(losses: list[float], undisturbed: list[float], exact: bool = True) -> list[str]:
    """A complaint unless both runs have the same losses: bit for bit, or nearly so where sums are not exact."""

    def agree(a: float, b: float) -> bool:
        return a == b if exact else math.isclose(a, b, rel_tol=NEAR)

    pairs = enumerate(zip(losses, undisturbed, strict=False))
    first = next((i for i, pair in pairs if not agree(*pair)), min(len(losses), len(undisturbed)))
    if first == len(losses) == len(undisturbed):
        return []
    return [f"the losses differ from the undisturbed run's from step {first + 1} on"]


def avoidable_losses(found: list[Json], redundancy: int) -> list[str]:
    """A complaint for each way back to storage for which too few members of the last view had gone.

    Each unit has `redundancy` mirrors, so one more member must have gone, or all of a small view.
    """
    members: dict[int, list[str]] = {}
    gone: set[str] = set()
    last, wrong = 0, []
    for event in found:
        if event["event"] == "view":
            members[event["generation"]] = event["members"]
        elif event["event"] in ("worker_lost", "worker_evicted"):
            gone.add(event["worker"])
        elif event["event"] == "entered":
            holders = members.get(last, [])
            dead = len(gone.intersection(holders))
            if event.get("lost_steps") and dead < min(redundancy + 1, len(holders)):
                wrong.append(f"{event['lost_steps']} steps were lost although only {dead} of {len(holders)} had gone")
            last = event["generation"]
    return wrong


class ChaosRun:
    """One run and what happened in it.

    Args:
        cluster: where it runs; its nodes are brought back to their number first.
        settings: `steps`, `redundancy`, `recipe`, `faulty_storage`, the faults in `schedule`, and `cache` for tokenized
            text.
        root: directory of the run's files.
    """

    def __init__(self, cluster: ChaosCluster, settings: Json, root: Path) -> None:
        self._cluster, self._settings, self._root = cluster, settings, root
        self.run_dir = root / "run"
        self.caused: list[Json] = []
        self.starts = 0

    def run(self) -> Json:
        """Train to the end under faults. Returns the outcome: `failed` lists the checks that do not hold."""
        self._cluster.restore(NODES)
        self._cluster.control.unlink(missing_ok=True)
        if self._settings["faulty_storage"]:
            set_fault(self._cluster.control, "")
        started_s = time.monotonic()
        code = self._train(self._cluster)
        failed = self._left_behind() if code is not None else [f"no end within {LIMIT_S:.0f} s"]
        if code not in (0, None):
            failed.append(f"exit code {code}")
        steps = self._settings["steps"]
        failed += wrong_records(self.run_dir, steps) + wrong_checkpoint(self.run_dir, steps)
        failed += avoidable_losses(events(self.run_dir), self._settings["redundancy"])
        return {
            "seconds": round(time.monotonic() - started_s, 1),
            "starts": self.starts,
            "faults": [self._followed(fault) for fault in self.caused],
            "lost_steps": sum(e.get("lost_steps", 0) for e in events(self.run_dir) if e["event"] == "entered"),
            "generations": len({r["generation"] for r in records(self.run_dir)}),
            "losses": [r["loss"] for r in records(self.run_dir)],
            "failed": failed,
        }

    def _train(self, cluster: ChaosCluster) -> int | None:
        """Run the driver, again if a fault may have ended it. Returns its last exit code, or None if it hangs."""
        faults, due = Faults(cluster), list(self._settings["schedule"])
        deadline_s = time.monotonic() + LIMIT_S
        self._start(cluster)
        try:
            while time.monotonic() < deadline_s:
                faults.end_due()
                if (code := cluster.exit_code()) is not None:
                    if code == 0 or self.starts > sum(f["kind"] in FATAL for f in self.caused) or self.starts == STARTS:
                        return code
                    if not faults.storage_fails:  # a start would be refused, as it should be
                        self._start(cluster)
                step = self._step()
                if due and step >= due[0]["step"]:
                    self.caused.append(faults.cause(due.pop(0)))
                time.sleep(POLL_S)
            return None
        finally:
            faults.end_due(everything=True)

    def _start(self, cluster: ChaosCluster) -> None:
        self.starts += 1
        settings = self._settings
        sizes = settings["steps"], settings["redundancy"]
        arguments = overrides(self.run_dir, Path(settings["cache"]), *sizes, settings["recipe"])
        cluster.start(arguments, self._root / "driver.log")

    def _step(self) -> int:
        found = records(self.run_dir)
        return int(found[-1]["step"]) if found else 0

    def _left_behind(self) -> list[str]:
        """What is still there although the run is over and its cluster is not."""
        failed: list[str] = []
        if left := wait_gone((WORKER, COORDINATOR, CONTROLLER)):
            failed.append(f"processes outlived the run: {left}")
        if left := os.listdir(self._cluster.temp / "tmp"):
            failed.append(f"temporary files outlived the run: {left}")
        return failed

    def _followed(self, fault: Json) -> Json:
        """A fault with the time to the next committed step."""
        later = [r["time"] for r in records(self.run_dir) if r["time"] > fault["time"]]
        return fault | {"to_next_step_s": round(min(later) - fault["time"], 2) if later else None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="directories with settings.json; outcome.json goes there")
    options = parser.parse_args()
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ChaosCluster(NODES) as cluster:
        for root in options.runs:
            outcome = ChaosRun(cluster, json.loads((root / "settings.json").read_text()), root).run()
            (root / "new").write_text(json.dumps(outcome))
            (root / "new").replace(root / "outcome.json")
            if outcome["failed"]:
                break  # what it left behind would be found again after the next one
    if left := [title(process) for process in descendants()]:
        print(f"processes outlived the cluster: {left}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
