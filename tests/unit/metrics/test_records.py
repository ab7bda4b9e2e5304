"""Records are read with the names of today, whichever version wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.errors import UserError
from elastic_moe.metrics.records import read_events, read_expert_records, read_metrics


def write(path: Path, *records: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_old_names_are_translated(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", {"step": 1, "rows_between_nodes": 5}, {"step": 2, "cross_node_rows": 6})
    write(tmp_path / "events.jsonl", {"event": "hold"}, {"event": "fell_back"}, {"event": "view", "why": "x"})
    write(tmp_path / "experts.jsonl", {"event": "placement", "why": "load"}, {"event": "placement", "cause": "load"})
    assert [record["cross_node_rows"] for record in read_metrics(tmp_path)] == [5, 6]
    assert [event["event"] for event in read_events(tmp_path)] == ["pause", "rolled_back", "view"]
    assert read_events(tmp_path)[2]["why"] == "x", "keys are translated in their own file only"
    assert [record["cause"] for record in read_expert_records(tmp_path)] == ["load", "load"]


def test_a_directory_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match=r"experts\.jsonl"):
        read_expert_records(tmp_path)
    assert read_events(tmp_path) == []


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", {"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    assert read_metrics(tmp_path) == [{"step": 1}]
