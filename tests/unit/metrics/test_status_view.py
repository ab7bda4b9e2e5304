"""The lines that `elastic-moe status` shows."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_moe.metrics.status_view import duration, render
from elastic_moe.plan.batch_sizes import RunLength

NOW_S = 1_000_000.0
A, B, NODE, OTHER = "a" * 32, "b" * 32, "1" * 56, "2" * 56
LIVE: dict[str, Any] = {
    "phase": "running",
    "reason": "join",
    "generation": 3,
    "world_size": 2,
    "limit": 0,
    "paused": False,
    "members": [[A, NODE, 11, False], [B, OTHER, 12, True]],
}
RECORDS = [{"step": step, "time": NOW_S - 100 + step, "loss": 2.5, "tokens_per_s": 1234.5} for step in range(1, 91)]
EVENTS: list[dict[str, Any]] = [
    {"event": "checkpoint", "step": 80, "time": NOW_S - 20},
    {"event": "worker_lost", "step": 85, "time": NOW_S - 15, "pid": 9, "reason": "connection closed"},
    {"event": "worker_ready", "step": 86, "time": NOW_S - 14},
]


def test_a_run_that_goes_on() -> None:
    text = render(RECORDS, EVENTS, RunLength(1000), LIVE, {NODE: ("first", "10.0.0.1")}, 1, NOW_S)
    lines = text.splitlines()
    assert lines[:4] == [
        "state       running, generation 3, 2 workers",
        "step        90 of 1,000, 15 min 10 s left",
        "loss        2.5000, 1,234 tokens/s, 10 s ago",
        "checkpoint  step 80, 10 steps behind, 20 s ago",
    ]
    assert lines[4:10] == [
        "members",
        "  node 11111111 first 10.0.0.1",
        "    0: aaaaaaaa, process 11",
        "  node 22222222",
        "    1: bbbbbbbb, process 12 (leaves)",
        "pending     1 workers: Ray has no room for them yet",
    ]
    assert lines[10] == "events"
    assert lines[11].endswith("step 85: lost the worker with process id 9: connection closed")
    assert len(lines) == 12, "an event of no interest is not shown"


def test_a_run_that_waits_says_for_what() -> None:
    live = LIVE | {"phase": "waiting", "reason": "lost a; 1 left", "limit": 4}
    text = render([], [], RunLength(1000), live, {}, 0, NOW_S)
    assert "waiting: lost a; 1 left, generation 3, 2 workers, at most 4 workers" in text
    assert "step        0 of 1,000\n" in text
    assert "paused" in render([], [], RunLength(1000), live | {"paused": True}, {}, 0, NOW_S)


def test_a_run_that_has_ended() -> None:
    ended = [*EVENTS, {"event": "finished", "step": 90, "time": NOW_S, "reason": "all steps are committed"}]
    assert render(RECORDS, ended, RunLength(90), None, {}, 0, NOW_S).startswith(
        "state       finished: all steps are committed"
    )
    assert "does not go on" in render(RECORDS, EVENTS, RunLength(90), None, {}, 0, NOW_S)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (7380, "2 h 3 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
