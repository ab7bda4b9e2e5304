"""The reference of a run's records and metrics in Markdown, made from `schema.py` and `exported.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from elastic_moe.metrics.exported import GROUPS, RUN_ID, RUN_NAME
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


def markdown() -> str:
    """The reference of all records, as README.md of this folder has it."""
    return "\n".join(_markdown())


def _markdown() -> Iterator[str]:
    yield "# Records of a run"
    yield ""
    yield "Every line of these files is one JSON object. This page is made from the declarations in `schema.py`:"
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
    yield f"## {GOODPUT}"
    yield ""
    yield "What the time of all workers went into, up to then: more often at first, and at the end. Every second of"
    yield "every worker is booked to one cause."
    yield ""
    yield from _table(GOODPUT_KEYS)
    yield f"## {SUMMARY}"
    yield ""
    yield "One object, written when a start of the run ends."
    yield ""
    yield from _table(SUMMARY_KEYS)
    yield from _exported()


def _exported() -> Iterator[str]:
    yield "## Metrics of a cluster"
    yield ""
    yield "What Ray exports of a run for Prometheus, declared in `exported.py`. The coordinator exports it, and each"
    yield "worker its own memory. All have the tags of Ray Train's own metrics,"
    yield f"`{RUN_NAME}` and `{RUN_ID}`, and those named here. Counters count each step and each event once,"
    yield "also when the coordinator is started again. Of a histogram, Ray keeps the counts of the buckets: its"
    yield "quantiles are right within a bucket, its sum is an estimate."
    yield ""
    for title, metrics in GROUPS.items():
        yield f"{title}:"
        yield ""
        yield "| metric | kind | unit | tags | meaning |"
        yield "|---|---|---|---|---|"
        for metric in metrics:
            values = f" ({', '.join(metric.values)})" if metric.values else ""
            own = ", ".join(f"`{tag}`" for tag in metric.tags[2:])
            yield f"| `{metric.series}` | {metric.kind} | {metric.unit} | {own}{values} | {metric.meaning} |"
        yield ""


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
