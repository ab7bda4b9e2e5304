"""A run of seven steps written by hand: two workers die at once, two join, one is drained; one placement changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

START_S = 1000.0
RANKS = [["a", "n0"], ["b", "n1"], ["c", "n2"], ["d", "n3"]]


def step(number: int, at_s: float, generation: int, world_size: int, **more: Any) -> dict[str, Any]:
    return {
        "step": number, "loss": 5.0 - number / 10, "tokens": 1000, "lr": 1e-3, "grad_norm": 1.0,
        "generation": generation, "world_size": world_size, "step_s": 1.0, "tokens_per_s": 1000.0, "balance": 0.9,
        "layer_balance": [0.9], "layer_max_load": [1.5], "cross_node_rows": 10, "time": START_S + at_s,
    } | more  # fmt: skip


def event(kind: str, at_s: float, number: int, generation: int, **more: Any) -> dict[str, Any]:
    return {"time": START_S + at_s, "event": kind, "step": number, "generation": generation} | more


def view(at_s: float, number: int, generation: int, members: str, reason: str) -> list[dict[str, Any]]:
    """A view that is published and entered 0.1 s later; a member per letter."""
    size = len(members)
    took = {"form_s": 0.05, "reconfigure_s": 0.08, "total_s": 0.1}
    state = {"source": "peers", "lost_steps": 0, "skipped_batches": 0, "rolled_forward": 0, "moved_bytes": 10}
    planned = {"planned": reason == "join", "reason": reason, "world_size": size, "members": list(members)}
    entered = {"worker": members[0], "world_size": size} | state | took
    return [
        event("view", at_s - 0.1, number, generation, **planned),
        event("entered", at_s, number, generation, **entered),
    ]


def lost(worker: str, at_s: float, number: int, generation: int) -> dict[str, Any]:
    return event("worker_lost", at_s, number, generation, worker=worker, node="n", pid=7, reason="connection closed")


STEPS = [
    *(step(number, float(number), 1, 4) for number in (1, 2)),
    step(3, 4.0, 2, 2),
    *(step(number, number + 1.0, 3, 4) for number in (4, 5, 6)),
    step(7, 8.0, 4, 3),
]
EVENTS = [
    *view(0.0, 0, 1, "abcd", "start"),
    lost("b", 2.5, 2, 1),
    lost("c", 2.6, 2, 1),
    *view(2.8, 2, 2, "ad", "lost b and c"),
    *view(4.5, 3, 3, "adef", "join"),
    *view(7.5, 6, 4, "ade", "drain of f"),
    event("finished", 8.1, 7, 4, reason="all steps are committed"),
]
ESTIMATE = {
    "gain_s": 0.002, "steps": 10, "cost_s": 0.004, "moved_bytes": 0, "balance_before": 0.8, "balance_after": 0.9,
}  # fmt: skip
EXPERTS = [
    event(
        "placement", 0.0, 0, 1, worker="a", cause="membership", ranks=RANKS, shape=[1, 2],
        moves=[[0, 0, 0, 1], [0, 0, 0, 2], [0, 1, 1, 1], [0, 1, 1, 2]],
    ),
    event(
        "placement", 1.5, 1, 1, worker="a", cause="load", shape=[1, 2], moves=[[0, 1, 3, 1]], expected=ESTIMATE,
        layers={"0": [1.5, 1.1]},
    ),
    event("expert_load", 2.0, 2, 1, worker="a", steps=2, load=[[30, 10]]),
    event(
        "placement", 2.8, 2, 2, worker="a", cause="membership", ranks=[["a", "n0"], ["d", "n3"]], shape=[1, 2],
        moves=[[0, 0, 0, 1], [0, 0, 0, 2], [0, 1, 1, 1], [0, 1, 1, 2]],
    ),
]  # fmt: skip


def write_run(run_dir: Path) -> Path:
    """Write the run's three files. Returns the directory."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for name, records in (("metrics", STEPS), ("events", EVENTS), ("experts", EXPERTS)):
        (run_dir / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run_dir
