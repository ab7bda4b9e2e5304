"""Holds the records of a run against their declarations in `metrics.schema`."""

from __future__ import annotations

from pathlib import Path

from elastic_moe.metrics.json_schema import json_schema
from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.run_dir import EVENTS, EXPERTS, GOODPUT, METRICS


def assert_declared(run_dir: Path) -> None:
    """Every record of the run has the declared keys, and no other.

    Raises:
        AssertionError: one has not; the message shows the first such record of a file.
    """
    from jsonschema import Draft202012Validator  # Ray depends on it, and is not needed where no run is checked

    for file in (METRICS, EVENTS, EXPERTS, GOODPUT):
        validator = Draft202012Validator(json_schema(file))
        for record in read_jsonl(run_dir / file):
            for error in validator.iter_errors(record):
                closest = [e.message for e in error.context or [] if e.validator != "const"]
                raise AssertionError(f"{file}: {error.message[:200]} {closest[:3]} in {record}")
