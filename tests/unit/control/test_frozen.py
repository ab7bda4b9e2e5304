"""Copies of frozen values are those of `dataclasses.replace`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from elastic_moe.control.frozen import replace
from elastic_moe.control.state import Backoff, State, WorkerRecord
from elastic_moe.types import Member, View

RECORD = WorkerRecord(Member("w", "n", 1), 2.0, reached=frozenset("a"))
CASES: list[tuple[Any, dict[str, Any]]] = [
    (State(3), {}),
    (State(3), {"records": {"w": RECORD}, "ticked_s": 1.5, "view": None}),
    (RECORD, {"entered": 4, "ready_s": None}),
    (Backoff(1, 2.0), {"failures": 2}),
    (View(1, (RECORD.member,)), {"generation": 2}),
    (RECORD.member, {"draining": True}),
]


@pytest.mark.parametrize(("value", "changes"), CASES)
def test_a_copy_is_that_of_dataclasses(value: Any, changes: dict[str, Any]) -> None:
    before = dataclasses.asdict(value)
    assert replace(value, **changes) == dataclasses.replace(value, **changes)
    assert replace(value, **changes) is not value
    assert type(replace(value, **changes)) is type(value)
    assert dataclasses.asdict(value) == before, "it is frozen"


def test_a_field_that_is_not_there_is_refused() -> None:
    with pytest.raises(KeyError, match="fields"):
        replace(RECORD, fields=1)
