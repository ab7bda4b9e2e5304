"""The declarations of the records: complete, without twins, and the same as the committed reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from elastic_moe.cli.records import main
from elastic_moe.metrics import schema
from elastic_moe.metrics.json_schema import json_schema
from elastic_moe.metrics.schema import COMMON_KEYS, EVENT_KINDS, EXPERT_KINDS, STEP_KEYS, Key, units
from elastic_moe.run_dir import EVENTS, EXPERTS, METRICS

STEP = {
    "step": 1, "loss": None, "tokens": 64, "lr": 1e-3, "grad_norm": 0.5, "generation": 1, "world_size": 2,
    "step_s": 0.1, "tokens_per_s": 640.0, "balance": 1.0, "layer_balance": [1, 0.5], "layer_max_load": [1.5],
    "cross_node_rows": 3, "time": 1.5e9,
}  # fmt: skip


def valid(file: str, record: dict[str, Any]) -> bool:
    return Draft202012Validator(json_schema(file)).is_valid(record)


def all_keys(keys: tuple[Key, ...]) -> list[Key]:
    return [found for key in keys for found in (key, *all_keys(key.keys))]


def test_the_committed_reference_is_the_printed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    committed = (Path(schema.__file__).parent / "README.md").read_text()
    assert capsys.readouterr().out == committed, "elastic-moe records > elastic_moe/metrics/README.md"


@pytest.mark.parametrize("file", [METRICS, EVENTS, EXPERTS])
def test_the_json_schemas_are_such(file: str) -> None:
    Draft202012Validator.check_schema(json_schema(file))
    assert main(["--json", file]) == 0


def test_names_are_unique_and_meanings_are_sentences() -> None:
    kinds = (*EVENT_KINDS, *EXPERT_KINDS)
    assert len({kind.name for kind in kinds}) == len(kinds)
    for keys in (STEP_KEYS, COMMON_KEYS, *(kind.keys for kind in kinds)):
        assert len({key.name for key in keys}) == len(keys)
        assert all(key.meaning.endswith(".") and len(key.meaning.split()) <= 25 for key in all_keys(keys))
    assert all(kind.meaning.endswith(".") for kind in kinds)


def test_durations_and_bytes_say_so_in_their_names() -> None:
    for key in all_keys((*STEP_KEYS, *(key for kind in EVENT_KINDS for key in kind.keys))):
        assert (key.unit == "s") == key.name.endswith("_s") or key.name in ("time", "tokens_per_s")
        assert (key.unit == "bytes") == key.name.endswith("bytes")


def test_names_that_others_rely_on() -> None:
    fixed = {
        "step",
        "loss",
        "tokens",
        "lr",
        "grad_norm",
        "generation",
        "world_size",
        "step_s",
        "tokens_per_s",
        "balance",
    }
    assert fixed | {"time"} <= {key.name for key in STEP_KEYS if not key.optional}
    assert [key.name for key in COMMON_KEYS] == [
        "time",
        "event",
        "generation",
        "step",
        "worker",
        "node",
        "pid",
        "reason",
    ]


def test_a_step_record_is_held_against_its_keys() -> None:
    assert valid(METRICS, STEP)
    assert valid(METRICS, STEP | {"mtp_loss": 1.0})
    assert not valid(METRICS, STEP | {"unknown": 1})
    assert not valid(METRICS, STEP | {"tokens": "64"})
    assert not valid(METRICS, {key: value for key, value in STEP.items() if key != "balance"})


def test_events_are_held_against_their_own_kind() -> None:
    common = {"time": 1.0, "generation": 1, "step": 3}
    assert valid(EVENTS, common | {"event": "rolled_back", "lost_steps": 2})
    assert not valid(EVENTS, common | {"event": "rolled_back"})
    assert not valid(EVENTS, common | {"event": "unheard_of"})
    assert not valid(EVENTS, common | {"event": "expert_load", "steps": 1, "load": [[1]]})
    assert valid(EXPERTS, common | {"event": "expert_load", "steps": 1, "load": [[1]]})
    change = {"event": "rebalanced", "expected": {"gain_s": 1.0}, "measured": {}}
    assert not valid(EVENTS, common | change)


def test_units() -> None:
    assert units()["step_s"] == "s"
    assert units()["tokens_per_s"] == "tokens/s"
    assert "balance" not in units()
