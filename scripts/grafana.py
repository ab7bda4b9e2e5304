"""The Grafana dashboard in cluster/grafana/elastic_moe.json: `python -m scripts.grafana [--write]`.

It is made from the metrics that a run exports (`elastic_moe/metrics/exported.py`): their names, units and meanings
stand there alone. One row for each group of metrics; Ray Train's own state of the controller is beside them, joined by
the tag of the run's name. Grafana replaces `$run`, `$datasource` and `$__rate_interval`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_moe.metrics.exported import COUNTER, EXPORTED, GROUPS, HISTOGRAM, RANK, RUN_NAME, Exported

PATH = Path(__file__).resolve().parents[1] / "cluster" / "grafana" / "elastic_moe.json"
OF_RUN = f'{{{RUN_NAME}=~"$run"}}'
CONTROLLER, STATE = "ray_train_controller_state", "ray_train_controller_state"  # Ray's metric, and its tag
WIDTH, HEIGHT, COLUMNS = 8, 8, 24
UNITS = {"s": "s", "bytes": "bytes", "tokens/s": "suffix: tokens/s"}
BY_NAME = {metric.name: metric for metric in EXPORTED}
Json = dict[str, Any]


@dataclass(frozen=True)
class Query:
    """One curve of each run, or several.

    Attributes:
        expression: in PromQL.
        legend: in Grafana's terms.
    """

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        title: above it.
        metrics: names of the metrics that it shows; the first one's unit is the panel's.
        per_s: counters as rates, and quantiles of the last seconds; else since the counting began.
        log: the axis is logarithmic.
        also: further curves.
    """

    title: str
    metrics: tuple[str, ...]
    per_s: bool = False
    log: bool = False
    also: tuple[Query, ...] = ()


_STATE = Query(f"max by ({RUN_NAME}, {STATE}) ({CONTROLLER}{OF_RUN}) == 1", f"{{{{{RUN_NAME}}}}} Ray: {{{{{STATE}}}}}")

ROWS: dict[str, tuple[Panel, ...]] = {
    "Training": (
        Panel("Loss", ("loss", "val_loss")),
        Panel("Speed", ("tokens_per_s",)),
        Panel("Step time", ("step_s",), per_s=True),
        Panel("Progress", ("step", "planned_steps")),
        Panel("Tokens trained on", ("tokens",), per_s=True),
        Panel("Steps", ("steps", "skipped_steps")),
        Panel("Time since the newest step", ("step_age_s",)),
        Panel("Gradient norm", ("grad_norm",), log=True),
        Panel("Learning rate", ("lr",)),
    ),
    "Membership": (
        Panel("Workers", ("world_size", "workers", "wanted_workers", "missing_workers")),
        Panel("Phase of the run, and state of its Ray Train controller", ("phase",), also=(_STATE,)),
        Panel("Generation", ("generation",)),
        Panel("Ended workers", ("ended_workers",)),
    ),
    "Recoveries": (
        Panel("Recoveries by cause", ("recoveries",)),
        Panel("Time of a recovery", ("recovery_s",)),
        Panel("Lost steps", ("lost_steps",)),
    ),
    "Goodput": (
        Panel("Workers' time by cause, in all", ("worker_time_s",)),
        Panel("Effective training time", ("goodput", "ettr")),
        Panel("Time to recover, and between failures", ("mttr_s", "mtbf_s")),
        Panel("Failures", ("failures",)),
        Panel("Cost", ("cost",)),
    ),
    "Experts": (
        Panel("MaxVio", ("max_vio", "max_vio_worst_layer")),
        Panel("Overload factor", ("avg_overload_factor", "max_overload_factor")),
        Panel("Dead experts", ("dead_experts",)),
        Panel("Balance of the ranks", ("balance",)),
        Panel("Rows between nodes", ("cross_node_rows",)),
        Panel("Experts moved for the load", ("expert_moves",)),
    ),
    "Checkpoints": (
        Panel("Age of the newest checkpoint", ("checkpoint_age_s",)),
        Panel("Steps that it does not have", ("checkpoint_lag_steps",)),
        Panel("Time to write a checkpoint", ("checkpoint_s",)),
        Panel("Step of the newest checkpoint", ("checkpoint_step",)),
        Panel("Size of a checkpoint", ("checkpoint_bytes",)),
        Panel("Checkpoints", ("checkpoints", "checkpoint_failures")),
    ),
    "Memory": (
        Panel("Memory of the workers", ("worker_memory_bytes",)),
        Panel("GPU memory of the workers", ("worker_device_memory_bytes",)),
        Panel("Memory of the coordinator", ("coordinator_memory_bytes",)),
    ),
}


def queries(panel: Panel) -> list[Query]:
    """The curves of a panel."""
    several = len(panel.metrics) > 1
    found = [query for name in panel.metrics for query in _queries(BY_NAME[name], panel.per_s, several)]
    return [*found, *panel.also]


def _queries(metric: Exported, per_s: bool, named: bool) -> list[Query]:
    tags = [RUN_NAME, *([RANK] if metric.workers else [metric.tag] if metric.tag else [])]
    legend = " ".join(["{{" + tag + "}}" for tag in tags] + ([metric.name.replace("_", " ")] if named else []))
    by = ", ".join(tags)
    if metric.kind == HISTOGRAM:
        buckets = f"{metric.series}_bucket{OF_RUN}"
        counts = f"sum by (le, {by}) ({f'rate({buckets}[$__rate_interval])' if per_s else buckets})"
        return [Query(f"histogram_quantile({q}, {counts})", f"{legend} p{100 * q:.0f}") for q in (0.5, 0.95)]
    values = f"{metric.series}{OF_RUN}"
    if metric.kind == COUNTER:
        return [Query(f"sum by ({by}) ({f'rate({values}[$__rate_interval])' if per_s else values})", legend)]
    shown = f"max by ({by}) ({values})"
    return [Query(f"{shown} == 1" if metric.name == "phase" else shown, legend)]


def dashboard() -> Json:
    """The dashboard, as Grafana imports it."""
    panels: list[Json] = []
    top = 0
    for title, row in ROWS.items():
        panels.append({"type": "row", "title": title, "collapsed": False, "gridPos": _at(0, top, COLUMNS, 1)})
        top += 1
        for index, panel in enumerate(row):
            down, across = divmod(index * WIDTH, COLUMNS)
            panels.append(_picture(panel, _at(across, top + down * HEIGHT, WIDTH, HEIGHT)))
        top += HEIGHT * -(-len(row) * WIDTH // COLUMNS)
    return {
        "title": "elastic_moe",
        "uid": "elastic-moe",
        "description": "Runs of elastic_moe: training, membership, recoveries, goodput, experts, checkpoints, memory.",
        "tags": ["ray", "elastic_moe"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _run()]},
        "annotations": {"list": []},
        "panels": [{"id": number, **panel} for number, panel in enumerate(panels, 1)],
    }


def _picture(panel: Panel, at: Json) -> Json:
    shown = [BY_NAME[name] for name in panel.metrics]
    unit = "/s" if panel.per_s and shown[0].kind == COUNTER else ""
    defaults: Json = {"unit": UNITS.get(shown[0].unit, f"suffix: {shown[0].unit}{unit}" if unit else "short")}
    if panel.log:
        defaults["custom"] = {"scaleDistribution": {"type": "log", "log": 10}}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": " ".join(f"{metric.name}: {metric.meaning}" for metric in shown),
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": at,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": query.expression, "legendFormat": query.legend}
            for number, query in enumerate(queries(panel))
        ],
    }


def _at(x: int, y: int, width: int, height: int) -> Json:
    return {"x": x, "y": y, "w": width, "h": height}


def _source() -> Json:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1}


def _run() -> Json:
    query = f"label_values({BY_NAME['generation'].series}, {RUN_NAME})"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "definition": query,
        "query": {"query": query, "refId": "Run"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def text() -> str:
    """Content of the file."""
    assert list(ROWS) == list(GROUPS), "a row for each group"
    return json.dumps(dashboard(), indent=1) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the dashboard, or write it to its file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PATH.name}")
    if parser.parse_args(arguments).write:
        PATH.write_text(text())
    else:
        sys.stdout.write(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
