"""The JSON schema of a run's records, made from the declarations in `schema.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from elastic_moe.metrics.schema import (
    COMMON_KEYS,
    EVENT_KINDS,
    EXPERT_KINDS,
    GOODPUT_KEYS,
    STEP_KEYS,
    SUMMARY_KEYS,
    Event,
    Key,
)
from elastic_moe.run_dir import EVENTS, EXPERTS, GOODPUT, METRICS, SUMMARY

Json = dict[str, Any]

_INT: Json = {"type": "integer"}
TYPES: dict[str, Json] = {  # name of a type -> JSON schema
    "integer": _INT,
    "number": {"type": "number"},
    "number or null": {"type": ["number", "null"]},  # null: it was not finite
    "string": {"type": "string"},
    "boolean": {"type": "boolean"},
    "list of strings": {"type": "array", "items": {"type": "string"}},
    "list of integers": {"type": "array", "items": _INT},
    "list of numbers": {"type": "array", "items": {"type": "number"}},
    "list of [string, string]": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2},
    },
    "[integer, integer]": {"type": "array", "items": _INT, "minItems": 2, "maxItems": 2},
    "list of lists of integers": {"type": "array", "items": {"type": "array", "items": _INT}},
    "list of [integer x 4]": {
        "type": "array",
        "items": {"type": "array", "items": _INT, "minItems": 4, "maxItems": 4},
    },
    "object of numbers": {"type": "object", "additionalProperties": {"type": "number"}},
    "object of [number, number]": {
        "type": "object",
        "additionalProperties": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    },
}


def json_schema(file: str) -> Json:
    """JSON schema of one record of a file.

    Args:
        file: one of the names METRICS, EVENTS, EXPERTS, GOODPUT and SUMMARY of `run_dir`.
    """
    plain = {METRICS: STEP_KEYS, GOODPUT: GOODPUT_KEYS, SUMMARY: SUMMARY_KEYS}
    if file in plain:
        return _object(plain[file])
    kinds = {EVENTS: EVENT_KINDS, EXPERTS: EXPERT_KINDS}[file]
    return {"oneOf": [_event_schema(kind) for kind in kinds]}


def _event_schema(kind: Event) -> Json:
    own = {key.name for key in kind.keys}
    schema = _object((*(key for key in COMMON_KEYS if key.name not in own), *kind.keys))
    schema["properties"]["event"] = {"const": kind.name}
    return schema


def _object(keys: Iterable[Key]) -> Json:
    keys = tuple(keys)
    return {
        "type": "object",
        "properties": {key.name: _object(key.keys) if key.keys else TYPES[key.type] for key in keys},
        "required": [key.name for key in keys if not key.optional],
        "additionalProperties": False,
    }
