"""What a run directory says beside its curves: the configuration, the command, versions, checkpoints and decisions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from elastic_moe.config.schema import TrainConfig
from elastic_moe.metrics.format_event import format_event, level_of
from elastic_moe.run_dir import CONFIG, CONFIGS, START

MAX_ROWS = 300  # of a table, the newest ones
_NOT_TOLD = ("run.dir", "tracking")  # settings that do not make a run another one
_SECRETS = (  # in places such as s3://KEY:SECRET@bucket?session_token=...; a page is for others too
    (re.compile(r"(://)[^/@\s'\"]+@"), r"\1...@"),
    (re.compile(r"(?i)([?&][\w-]*(?:secret|token|password|key)[\w-]*=)[^&\s'\"]+"), r"\1..."),
)
Json = dict[str, Any]


def without_secrets(text: str) -> str:
    """The text without what stands for a login in URIs."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def configuration(run_dir: Path) -> Json:
    """The configuration as text, and the keys whose values are not the defaults: {key: [default, value]}."""
    try:
        text = without_secrets((run_dir / CONFIG).read_text(encoding="utf-8"))
        found = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {"text": "", "changed": {}}
    defaults = dict(_flat(asdict(TrainConfig())))
    values = dict(_flat(found if isinstance(found, dict) else {}))
    changed = {
        key: [defaults.get(key), value]
        for key, value in values.items()
        if value != defaults.get(key) and not key.startswith(_NOT_TOLD)
    }
    return {"text": text, "changed": changed}


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def start_of(run_dir: Path) -> Json:
    """Command and versions of the newest start; empty where they are not recorded.

    Runs of older versions have their overrides only, which Hydra kept.
    """
    for path in sorted((run_dir / CONFIGS).glob(f"*{START}"), reverse=True):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found | {"command": _command(found.get("command", []))}
    try:
        overrides = yaml.safe_load((run_dir / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {"command": _command(["elastic-moe", "train", *overrides])} if isinstance(overrides, list) else {}


def _command(parts: Sequence[Any]) -> list[str]:
    return [without_secrets(str(part)) for part in parts]


def checkpoints(
    events: Sequence[Json], elapsed_s: Callable[[float], float], committed_s: Callable[[int], float | None]
) -> Json:
    """The durable checkpoints, newest last.

    Args:
        events: of the run.
        elapsed_s: the clock of the page.
        committed_s: wall clock at which a step was committed; None where it is not known.
    """
    done = [event for event in events if event["event"] == "checkpoint"]
    rows = [
        {
            "step": event["step"],
            "at": round(elapsed_s(event["time"]), 2),
            "mib": round(event.get("bytes", 0) / 2**20, 2),
            "shards": event.get("shards", 0),
            "took_s": _since(committed_s(event["step"]), event["time"]),
        }
        for event in done[-MAX_ROWS:]
    ]
    kinds = ("checkpoint_failed", "checkpoint_skipped", "checkpoint_damaged", "storage_unavailable")
    trouble = {kind: sum(event["event"] == kind for event in events) for kind in kinds}
    return {"count": len(done), "rows": rows, "trouble": {kind: count for kind, count in trouble.items() if count}}


def _since(begin_s: float | None, end_s: float) -> float | None:
    return None if begin_s is None else round(max(end_s - begin_s, 0.0), 3)


def decisions(events: Sequence[Json]) -> Json:
    """Changes of placement for the load: what was expected of each, and what was measured. Times in ms."""
    changes = [event for event in events if event["event"] == "rebalanced"]
    rows = [
        {
            "step": event["step"],
            "expected_ms": _ms(event["expected"]["gain_s"]),
            "measured_ms": _ms(event["measured"]["gain_s"]),
            "cost_ms": _ms(event["expected"]["cost_s"]),
            "took_ms": _ms(event["measured"]["switch_s"]),
            "mib": round(event["expected"]["moved_bytes"] / 2**20, 2),
            "steps": event["measured"]["steps"],
        }
        for event in changes[-MAX_ROWS:]
    ]
    return {"count": len(changes), "rows": rows}


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def told(events: Sequence[Json], elapsed_s: Callable[[float], float]) -> Json:
    """What a person wants to know of: [seconds, wall clock, level, sentence], the newest last."""
    lines = [(event, line) for event in events if (line := format_event(event))]
    rows = [[round(elapsed_s(e["time"]), 2), round(e["time"], 1), level_of(e), line] for e, line in lines[-MAX_ROWS:]]
    return {"count": len(lines), "rows": rows}
