"""Records, events and the status become metrics: each once, and right while nothing happens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.control.goodput import TIME_CAUSES, Goodput, as_record
from elastic_moe.metrics.exported import COUNTER, EXPORTED, GAUGE, GROUPS, HISTOGRAM, MEMORY, PHASES, Exported
from elastic_moe.metrics.recorder import Recorder
from elastic_moe.metrics.run_metrics import REMEMBERED, RunMetrics, Status, of_goodput
from elastic_moe.metrics.schema import STEP_KEYS

BY_NAME = {metric.name: metric for metric in EXPORTED}
RUNNING: Status = {
    "steps": 100,
    "world_size": 3,
    "generation": 2,
    "phase": "running",
    "workers": 3,
    "limit": 0,
    "paused": False,
}


def record(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step,
        "time": 1000.0 + step,
        "loss": 4.0 - step / 100,
        "tokens": 128,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "step_s": 0.25,
        "tokens_per_s": 512.0,
        "balance": 0.8,
        "layer_balance": [0.8, 0.5],
        "layer_max_load": [1.5, 2.5],
        "cross_node_rows": 7,
    } | values


def view(generation: int, cause: str, time: float = 1000.0) -> dict[str, Any]:
    return {"event": "view", "generation": generation, "cause": cause, "time": time}


def entered(generation: int, lost_steps: int = 0, time: float = 1001.0) -> dict[str, Any]:
    return {"event": "entered", "generation": generation, "total_s": 0.3, "lost_steps": lost_steps, "time": time}


def take(metrics: RunMetrics, now_s: float = 1100.0, **status: Any) -> dict[str, Any]:
    """Values by name, or by name and tag; of a histogram the list of observations."""
    values: dict[str, Any] = {}
    for name, value, tag in metrics.samples(RUNNING | status, now_s):  # type: ignore[arg-type]
        key = f"{name}:{tag}" if tag else name
        if BY_NAME[name].kind == HISTOGRAM:
            values.setdefault(key, []).append(value)
        else:
            values[key] = value
    return values


def full() -> RunMetrics:
    """The metrics of a run in which everything has happened."""
    metrics = RunMetrics(4, 990.0)
    metrics.event(view(1, "start"))
    metrics.event(entered(1))
    for step in range(1, 11):
        metrics.record(record(step, skipped=step == 4))
    for kind in ("worker_lost", "worker_evicted", "worker_left", "checkpoint_failed"):
        metrics.event({"event": kind, "time": 1010.0})
    metrics.event({"event": "checkpoint", "step": 8, "bytes": 4096, "time": 1010.5})
    metrics.event({"event": "evaluated", "val_loss": 3.5})
    metrics.event({"event": "expert_load", "load": [[3, 0, 1], [0, 0, 9]]})
    metrics.event({"event": "placement", "cause": "membership", "moves": [[0, 0, 0, 1]]})
    metrics.event({"event": "placement", "cause": "load", "moves": [[0, 1, 2, 1], [0, 1, 0, -1], [0, 2, 1, 2]]})
    metrics.event(view(2, "join"))
    metrics.event(view(3, "death"))
    metrics.event(entered(3, lost_steps=2))
    return metrics


def test_everything_that_is_declared_is_made_and_nothing_else() -> None:
    books = dict.fromkeys(TIME_CAUSES, 1.0)
    goodput = Goodput(books, {"spot": 3600.0}, up_s=9.0, failures=2, repairs=1, repair_s=3.0)
    samples = full().samples(RUNNING, 1100.0) + of_goodput(as_record(goodput, {"spot": 2.0}))
    assert {sample.name for sample in samples} == {metric.name for metric in EXPORTED if metric not in MEMORY}
    for name, _, tag in samples:
        assert tag in BY_NAME[name].values if BY_NAME[name].tag else tag == "", name


def test_the_values() -> None:
    values = take(full())
    assert values["step"] == 10
    assert values["planned_steps"] == 100
    assert values["loss"] == pytest.approx(3.9)
    assert (values["steps"], values["tokens"], values["skipped_steps"]) == (10, 1280, 1)
    assert values["step_s"] == [0.25] * 10
    assert (values["max_vio"], values["max_vio_worst_layer"]) == (1.0, 1.5)
    assert (values["avg_overload_factor"], values["max_overload_factor"]) == (1.625, 2.0)
    assert (values["dead_experts"], values["expert_moves"]) == (3, 2)
    assert (values["checkpoint_step"], values["checkpoint_lag_steps"]) == (8, 2)
    assert values["checkpoint_s"] == [2.5]
    assert values["checkpoint_bytes"] == 4096
    assert values["recoveries:death"] == 1, "the gravest cause of the views before one was entered"
    assert "recoveries:join" not in values
    assert "recoveries:start" not in values
    assert values["recovery_s"] == [0.3]
    assert values["lost_steps"] == 2
    assert [values[f"ended_workers:{cause}"] for cause in ("death", "eviction", "left")] == [1, 1, 1]
    assert values["wanted_workers"] == 4
    assert values["missing_workers"] == 1


def test_what_counts_is_told_once_and_what_stands_is_told_again() -> None:
    metrics = full()
    take(metrics)
    again = take(metrics)
    assert {name for name in again if BY_NAME[name.partition(":")[0]].kind != GAUGE} == set()
    assert again["loss"] == pytest.approx(3.9)
    assert again["checkpoint_step"] == 8


def test_a_run_that_waits() -> None:
    metrics = full()
    waiting = take(metrics, 1200.0, phase="waiting", workers=1)
    later = take(metrics, 1260.0, phase="waiting", workers=1)
    assert later["checkpoint_age_s"] - waiting["checkpoint_age_s"] == 60.0
    assert later["step_age_s"] - waiting["step_age_s"] == 60.0
    assert waiting["world_size"] == 0 == waiting["tokens_per_s"], "its view is still there, and makes no step"
    assert waiting["missing_workers"] == 3
    assert [waiting[f"phase:{phase}"] for phase in PHASES] == [0, 1, 0, 0, 0]
    assert take(metrics, phase="waiting", paused=True)["phase:paused"] == 1
    assert take(metrics)["tokens_per_s"] == 512.0
    ended = take(metrics, phase="finished", workers=0)
    assert ended["wanted_workers"] == 0 == ended["missing_workers"]


def test_an_operator_may_want_fewer_workers_and_not_more() -> None:
    assert take(full(), limit=2)["wanted_workers"] == 2
    assert take(full(), limit=9)["wanted_workers"] == 4


def test_before_anything_has_happened() -> None:
    values = take(RunMetrics(4, 990.0), 1000.0, phase="waiting", world_size=0, generation=0, workers=0)
    assert values["checkpoint_age_s"] == 10.0 == values["step_age_s"]
    assert values["missing_workers"] == 4
    assert "loss" not in values
    assert "tokens_per_s" not in values


def test_a_loss_that_is_not_finite_is_no_old_loss() -> None:
    metrics = full()
    metrics.record(record(11, loss=None))
    assert math.isnan(take(metrics)["loss"])


def test_checkpoints_that_the_run_has_gone_back_behind_do_not_count() -> None:
    metrics = full()
    metrics.event({"event": "checkpoint", "step": 10, "bytes": 1, "time": 1012.0})
    metrics.event({"event": "timeline", "step": 8})
    values = take(metrics, 1100.0)
    assert values["checkpoint_step"] == 8
    assert values["checkpoint_age_s"] == pytest.approx(1100.0 - 1010.5)


def test_memory_is_bounded() -> None:
    metrics = RunMetrics(4, 0.0)
    for step in range(3 * REMEMBERED):
        metrics.record(record(step))
        metrics.event({"event": "checkpoint", "step": step, "time": 1.0})
        metrics.samples(RUNNING, 1.0)
    assert len(metrics._committed_s) == REMEMBERED == len(metrics._checkpoints)


class Ear:
    """Keeps what a recorder has written."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []

    def record(self, record: Any) -> None:
        self.heard.append(record)

    def event(self, event: Any) -> None:
        self.heard.append(event)


def test_a_restarted_coordinator_counts_nothing_twice(tmp_path: Path) -> None:
    first, metrics = Ear(), RunMetrics(4, 990.0)
    recorder = Recorder(tmp_path, listeners=(first,))
    recorder.event(view(1, "start"))
    recorder.event(entered(1))
    for step in (1, 3, 2, 4):
        recorder.record(record(step))
    recorder.event(view(2, "death"))
    recorder.close()
    written = list(first.heard)
    assert [line["step"] for line in written if "loss" in line] == [1, 2, 3, 4]

    second = Ear()
    recorder = Recorder(tmp_path, listeners=(second,))
    metrics.recall(recorder.last, [line for line in written if "event" in line])
    for step in (2, 3, 4, 5):  # a worker sends its last records again
        recorder.record(record(step))
    recorder.event(entered(2, lost_steps=1))
    recorder.close()
    for line in second.heard:
        metrics.event(line) if "event" in line else metrics.record(line)
    values = take(metrics)
    assert values["steps"] == 1
    assert values["tokens"] == 128
    assert values["step"] == 5
    assert values["recoveries:death"] == 1, "the coordinator before published the view"
    assert values["lost_steps"] == 1


@pytest.mark.parametrize("metric", EXPORTED, ids=lambda metric: metric.name)
def test_names_and_declarations(metric: Exported) -> None:
    assert metric.name.isidentifier()
    assert metric.name == metric.name.lower()
    assert metric.meaning.endswith(".")
    assert "\n" not in metric.meaning
    endings = {"s": "_s", "bytes": "_bytes", "tokens/s": "tokens_per_s", "tokens": "tokens"}
    assert metric.name.endswith(endings.get(metric.unit, ""))
    if metric.unit not in endings:
        assert not metric.name.endswith(tuple(endings.values()))
    assert bool(metric.tag) == bool(metric.values)
    assert bool(metric.buckets) == (metric.kind == HISTOGRAM)
    assert metric.series.endswith("_total") == (metric.kind == COUNTER)
    assert len(metric.tags) <= 4
    assert len(metric.values) <= 10


def test_each_name_stands_once_and_keys_keep_their_declarations() -> None:
    assert len(BY_NAME) == len(EXPORTED) == sum(map(len, GROUPS.values()))
    for key in STEP_KEYS:
        if (metric := BY_NAME.get(key.name)) and key.name not in ("world_size", "generation"):  # of a record: its own
            assert (metric.unit, metric.meaning) == (key.unit, key.meaning)
