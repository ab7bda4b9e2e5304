"""The lines that a driver prints about events."""

from __future__ import annotations

import inspect
import re

from elastic_moe.metrics.format_event import format_event
from elastic_moe.metrics.schema import EVENT_KINDS

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


def test_a_loss_that_is_not_finite_is_null_in_the_file() -> None:
    event = {"event": "evaluated", "step": 3, "val_loss": None}
    assert format_event(event) == "step 3: validation loss not finite"
    assert format_event(event | {"val_loss": 2.0}) == "step 3: validation loss 2.0000"


def test_events_that_it_words_are_declared() -> None:
    declared = {kind.name for kind in EVENT_KINDS}
    cases = re.findall(r"case ([^:]*?)(?: if|:)", inspect.getsource(format_event))
    worded = {name for case in cases for name in re.findall(r'"(\w+)"', case)}
    assert {"worker_lost", "entered", "pause"} <= worded <= declared
