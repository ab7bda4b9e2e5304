"""The lines that a driver prints about events, and the file they are read from."""

from __future__ import annotations

from pathlib import Path

from elastic_moe.metrics.format_event import format_event
from elastic_moe.metrics.jsonl import Tail

WORKER = "0123456789abcdef0123456789abcdef"


def test_lines_for_what_a_person_wants_to_know() -> None:
    common = {"generation": 2, "step": 30}
    lost = common | {"event": "worker_lost", "pid": 7, "reason": "connection closed"}
    assert format_event(lost) == "step 30: lost the worker with process id 7: connection closed"
    entered = common | {"event": "entered", "world_size": 3, "total_s": 0.104, "lost_steps": 0}
    assert format_event(entered) == "step 30: 3 workers go on, re-formed in 0.10 s, no committed steps lost"
    assert (
        format_event(entered | {"lost_steps": 1})
        == "step 30: 3 workers go on, re-formed in 0.10 s, 1 committed step lost"
    )
    view = common | {"event": "view", "planned": True, "reason": f"join of {WORKER}"}
    assert format_event(view) == "step 30: join of 01234567"
    assert format_event(view | {"planned": False}) is None
    assert format_event(entered | {"generation": 1}) is None
    assert format_event(common | {"event": "worker_connected"}) is None


def test_tail_reads_whole_lines_once_and_starts_anew_after_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = Tail(path)
    assert tail.lines() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert tail.lines() == [{"step": 1}, {"step": 2}]
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert tail.lines()[-1] == {"step": 3}
    path.write_text('{"step": 1}\n')
    assert tail.lines() == [{"step": 1}]
