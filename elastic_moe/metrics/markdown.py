"""The reference of a run's records in Markdown, made from the declarations in `schema.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from elastic_moe.metrics.schema import COMMON_KEYS, EVENT_KINDS, EXPERT_KINDS, STEP_KEYS, Event, Key
from elastic_moe.run_dir import EVENTS, EXPERTS, METRICS


def markdown() -> str:
    """The reference of all records, as README.md of this folder has it."""
    return "\n".join(_markdown())


def _markdown() -> Iterator[str]:
    yield "# Records of a run"
    yield ""
    yield "Every line of the three files is one JSON object. This page is made from the declarations in `schema.py`:"
    yield "`elastic-moe records` prints it, and `--json FILE` prints the JSON schema of a file's records."
    yield ""
    yield f"## {METRICS}"
    yield ""
    yield "One line per committed step."
    yield ""
    yield from _table(STEP_KEYS)
    yield f"## {EVENTS}"
    yield ""
    yield "One line per event. Keys that events of every kind have, or may have:"
    yield ""
    yield from _table(COMMON_KEYS)
    yield "Kinds of events:"
    yield ""
    yield from _kinds(EVENT_KINDS)
    yield f"## {EXPERTS}"
    yield ""
    yield "Placements of the experts, and their loads. These records have the same common keys."
    yield ""
    yield from _kinds(EXPERT_KINDS)


def _kinds(kinds: Iterable[Event]) -> Iterator[str]:
    yield "| event | meaning |"
    yield "|---|---|"
    yield from (f"| `{kind.name}` | {kind.meaning} |" for kind in kinds)
    yield ""
    for kind in kinds:
        if kind.keys:
            yield f"Keys of `{kind.name}`:"
            yield ""
            yield from _table(kind.keys)


def _table(keys: Iterable[Key]) -> Iterator[str]:
    yield "| key | type | unit | meaning |"
    yield "|---|---|---|---|"
    yield from _rows(keys)
    yield ""


def _rows(keys: Iterable[Key], prefix: str = "") -> Iterator[str]:
    for key in keys:
        kind = f"{key.type}, optional" if key.optional else key.type
        yield f"| `{prefix}{key.name}` | {kind} | {key.unit} | {key.meaning} |"
        yield from _rows(key.keys, f"{prefix}{key.name}.")
