"""The outcome of a start of a run as plain values: `summary.json`, and the lines about the workers' time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_moe.control.goodput import TIME_CAUSES, TRAINING
from elastic_moe.metrics.status_view import duration
from elastic_moe.run_dir import SUMMARY

SHOWN = 0.005  # causes with a smaller share are not told

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Steps:
    """The steps that stand in metrics.jsonl.

    Attributes:
        last: the newest record; empty before the first.
        tokens: of all steps.
        generations: that made them.
    """

    last: Json
    tokens: int
    generations: int

    @classmethod
    def of(cls, records: Iterable[Json]) -> Steps:
        """Read the records one by one: a long run has a gigabyte of them."""
        last: Json = {}
        tokens, generations = 0, set[Any]()
        for last in records:
            tokens += int(last.get("tokens", 0))
            generations.add(last.get("generation"))
        return cls(last, tokens, len(generations))


def summary(
    outcome: str, reason: str, steps: int, made: Steps, events: Sequence[Json], goodput: Json
) -> dict[str, Any]:
    """The summary of a run; `schema.SUMMARY_KEYS` declares it.

    Args:
        outcome: "finished", "stopped" or "failed".
        reason: cause of the outcome, as a sentence.
        steps: steps of the whole run.
        made: what stands in metrics.jsonl.
        events: lines of events.jsonl.
        goodput: a line of goodput.jsonl.
    """
    last = made.last
    val_losses = [event.get("val_loss") for event in events if event.get("event") == "evaluated"]
    return {
        "outcome": outcome,
        "reason": reason,
        "step": int(last.get("step", 0)),
        "steps": steps,
        "loss": last.get("loss"),
        "val_loss": val_losses[-1] if val_losses else None,
        "tokens": made.tokens,
        "generations": made.generations,
        "world_size": int(last.get("world_size", 0)),
        **{key: value for key, value in goodput.items() if key not in ("time", "step")},
    }


def write_summary(run_dir: Path, values: Json) -> None:
    """Write `summary.json` in place of an older one."""
    path = run_dir / SUMMARY
    new = path.with_name(f".{path.name}.tmp")
    new.write_text(json.dumps(values, indent=1) + "\n")
    new.replace(path)


def time_line(goodput: Json) -> str:
    """What the workers' time went into, in one line; "" where there was none. `goodput`: a line of goodput.jsonl."""
    total_s, worker_s = goodput["total_s"], goodput["worker_s"]
    if not total_s:
        return ""
    shares = {cause: worker_s[cause] / total_s for cause in TIME_CAUSES if cause != TRAINING}
    lost = [f"{cause} {share:.1%}" for cause, share in sorted(shares.items(), key=lambda s: -s[1]) if share >= SHOWN]
    parts = [f"{goodput['goodput']:.1%} of {total_s / 3600:,.2f} worker hours trained (ETTR {goodput['ettr']:.1%})"]
    return "; ".join((*parts, ", ".join(lost))) if lost else parts[0]


def failure_line(goodput: Json) -> str:
    """Failures, the time to recover, and the cost, in one line; "" where there is none of them."""
    parts: list[str] = []
    if count := goodput["failures"]:
        every, took = goodput["mtbf_s"], goodput["mttr_s"]
        parts.append(f"{count} failures" if count > 1 else "1 failure")
        parts += [f"one in {duration(every)} (MTBF)"] if every is not None else []
        parts += [f"{took:,.1f} s to recover (MTTR)"] if took is not None else []
    if goodput["cost"] is not None:
        parts.append(f"cost {goodput['cost']:,.2f}")
    return ", ".join(parts)
