"""Reads the records of a run. Names that earlier versions wrote are translated here to those of today."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_moe.errors import UserError
from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.run_dir import EVENTS, EXPERTS, METRICS

OLD_STEP_KEYS = {"rows_between_nodes": "cross_node_rows"}
_OLD_KEYS = {  # per file
    METRICS: OLD_STEP_KEYS,
    EVENTS: {},
    EXPERTS: {"why": "cause"},
}
_OLD_EVENTS = {"hold": "pause", "fell_back": "rolled_back"}


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Records of the committed steps, in order; at least one.

    Raises:
        UserError: no step is recorded there.
    """
    records = _read(run_dir, METRICS)
    if not records:
        raise UserError(
            f"{run_dir}: no committed step is recorded in {METRICS}; is it the directory of a run (run.dir)?"
        )
    return records


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """Events of events.jsonl, in order; none where there is no such file."""
    return _read(run_dir, EVENTS)


def read_expert_records(run_dir: str | Path) -> list[dict[str, Any]]:
    """Records of experts.jsonl, in order.

    Raises:
        UserError: there is no such file.
    """
    if not (Path(run_dir) / EXPERTS).exists():
        raise UserError(f"{run_dir}: there is no {EXPERTS}; is it the directory of a run (run.dir)?")
    return _read(run_dir, EXPERTS)


def translated_event(event: Mapping[str, Any]) -> dict[str, Any]:
    """An event of events.jsonl with the names of today."""
    return _translated(event, _OLD_KEYS[EVENTS])


def translated_expert_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of experts.jsonl with the names of today."""
    return _translated(record, _OLD_KEYS[EXPERTS])


def _read(run_dir: str | Path, file: str) -> list[dict[str, Any]]:
    return [_translated(record, _OLD_KEYS[file]) for record in read_jsonl(Path(run_dir) / file)]


def _translated(record: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The record with old keys and an old name of its event replaced."""
    new = {keys.get(key, key): value for key, value in record.items()}
    if "event" in new:
        new["event"] = _OLD_EVENTS.get(new["event"], new["event"])
    return new
