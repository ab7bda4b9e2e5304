"""All that the page shows of one run, as one JSON object. Reading again costs what was written since."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from elastic_moe.errors import UserError
from elastic_moe.metrics.jsonl import Tail
from elastic_moe.metrics.records import translated_event
from elastic_moe.metrics.report import facts
from elastic_moe.metrics.report.expert_maps import ExpertMaps
from elastic_moe.metrics.report.goodput_data import GoodputReader
from elastic_moe.metrics.report.lanes import Lives, lanes
from elastic_moe.metrics.report.steps import Columns, StepColumns, curves, rounded
from elastic_moe.metrics.report.timeline import UpClock, marks_of, memberships, token_rates
from elastic_moe.metrics.schema import units
from elastic_moe.run_dir import EVENTS, EXPERTS, METRICS

WINDOWS = 360  # of the speed over time
ABANDONED_POINTS = 200  # of a timeline that the run has gone back behind
QUIET_S = 600.0  # a run without an end is taken to go on for so long after its last sign
_ABANDONED = re.compile(r"metrics\.t\d+\.jsonl")
Json = dict[str, Any]


class RunReader:
    """Reads a run directory for the page.

    Args:
        run_dir: the directory of a run, which may go on.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self._steps = StepColumns(self.run_dir / METRICS)
        self._events = Tail(self.run_dir / EVENTS)
        self._experts = ExpertMaps(self.run_dir / EXPERTS)
        self._goodput = GoodputReader(self.run_dir)
        self._abandoned: dict[str, StepColumns] = {}

    @property
    def steps_bytes(self) -> int:
        """Bytes of metrics.jsonl that were read so far."""
        return self._steps.bytes_read

    def read(self) -> Json:
        """The run as it is now.

        Raises:
            UserError: no step is recorded there.
        """
        columns = self._steps.read()
        if not len(columns["step"]):
            raise UserError(
                f"{self.run_dir}: no committed step is recorded in {METRICS}; is it the directory of a run (run.dir)?"
            )
        events = [translated_event(event) for event in self._events.lines()]
        commits = np.maximum.accumulate(columns["time"])  # nodes' clocks differ a little
        changes = list(memberships(events))
        clock = UpClock(commits.tolist(), changes, float(columns["step_s"][0]))
        last_s = max(float(commits[-1]), max((event["time"] for event in events), default=0.0))
        end = next((e for e in reversed(events) if e["event"] in ("finished", "failed", "started")), None)
        over = end is not None and end["event"] != "started" and end["time"] >= commits[-1]
        goes_on = not over and time.time() - last_s < QUIET_S
        elapsed = clock.elapsed_of(commits)
        goodput = self._goodput.read()
        axes, cost_unit = self._axes(columns, elapsed, goodput, changes, clock)
        found = curves(columns, axes)
        _add_speed(found)
        marks = marks_of(events, changes, commits.tolist(), clock)
        return {
            "name": self.run_dir.absolute().name,
            "made_s": round(time.time(), 1),
            "goes_on": goes_on,
            "end": {"event": end["event"], "reason": end.get("reason", "")} if over and end else None,
            "last_s": last_s,
            "clock": {"start": clock.start, "cuts": clock.cuts},
            "units": dict(units()) | {"cost": cost_unit},
            "figures": _figures(columns, elapsed, events, changes),
            "curves": found,
            "speed": [rounded(values) for values in _speed(columns, elapsed)],
            "evaluated": [[e["step"], e["val_loss"]] for e in events if e["event"] == "evaluated"],
            "abandoned": list(self._abandoned_curves(clock)),
            "marks": [[round(mark.at_s, 3), mark.kind, mark.count, round(mark.pause_s, 3)] for mark in marks],
            "workers": [[round(clock.elapsed_s(change.time), 3), change.world_size] for change in changes],
            "lanes": lanes(Lives().bars(events, last_s, goes_on), clock.elapsed_s),
            "goodput": goodput,
            "experts": self._experts.read(),
            "decisions": facts.decisions(events),
            "checkpoints": facts.checkpoints(events, clock.elapsed_s, partial(_committed_s, columns)),
            "told": facts.told(events, clock.elapsed_s),
            "config": facts.configuration(self.run_dir),
            "start": facts.start_of(self.run_dir),
        }

    def _axes(
        self, columns: Columns, elapsed: np.ndarray, goodput: Json | None, changes: Sequence[Any], clock: UpClock
    ) -> tuple[dict[str, np.ndarray], str]:
        """Horizontal axes beside the steps: tokens, time and cost. Returns the unit of the cost too."""
        axes = {"tokens": np.cumsum(columns["tokens"]), "time": elapsed}
        spent = goodput["spent"] if goodput else None
        if spent:
            return axes | {"cost": np.interp(columns["time"], spent["time"], spent["cost"])}, spent["unit"]
        if not changes:
            return axes, ""
        begins = np.array([clock.elapsed_s(change.time) for change in changes])
        sizes = np.array([change.world_size for change in changes], dtype=float)
        used = np.concatenate([[0.0], np.cumsum(np.diff(begins) * sizes[:-1])])
        at = np.clip(np.searchsorted(begins, elapsed, side="right") - 1, 0, None)
        return axes | {"cost": (used[at] + (elapsed - begins[at]) * sizes[at]) / 3600}, "worker hours"

    def _abandoned_curves(self, clock: UpClock) -> list[Json]:
        """Losses of steps that the run has gone back behind."""
        found: list[Json] = []
        for path in sorted(self.run_dir.glob("metrics.t*.jsonl")):
            if _ABANDONED.fullmatch(path.name):
                columns = self._abandoned.setdefault(path.name, StepColumns(path)).read()
                elapsed = clock.elapsed_of(columns["time"])
                made = curves({**columns}, {"time": elapsed}, ABANDONED_POINTS)
                if "loss" in made["y"]:
                    found.append({"x": made["x"], "loss": made["y"]["loss"]["mean"]})
        return found


def _add_speed(found: Json) -> None:
    """Tokens per second between the points of the curves, time without steps included."""
    tokens, seconds = (np.array(found["x"][name], dtype=float) for name in ("tokens", "time"))
    took = np.diff(seconds, prepend=0.0)
    rates = np.where(took > 0, np.diff(tokens, prepend=0.0) / np.maximum(took, 1e-9), np.nan)
    found["y"]["tokens_per_s"] = {"mean": rounded(rates)}


def _speed(columns: Columns, elapsed: np.ndarray) -> tuple[list[float], list[float]]:
    """Tokens per second in equal windows of time: their middles, and the rates."""
    end_s = max(float(elapsed[-1]), 1e-3)
    width_s = max(end_s / WINDOWS, 2 * float(np.nanmedian(columns["step_s"])))
    points = token_rates(elapsed.tolist(), np.nan_to_num(columns["tokens"]).tolist(), width_s, end_s)
    return [at_s for at_s, _ in points], [rate for _, rate in points]


def _figures(columns: Columns, elapsed: np.ndarray, events: Sequence[Json], changes: Sequence[Any]) -> Json:
    """The figures at the head of the page."""
    values = [e["val_loss"] for e in events if e["event"] == "evaluated" and e["val_loss"] is not None]
    entered = [event for event in events if event["event"] == "entered"]
    pauses = [event["total_s"] for event in entered[1:] if "total_s" in event]
    return {
        "step": int(columns["step"][-1]),
        "loss": rounded(columns["loss"][-1:])[0],
        "val_loss": values[-1] if values else None,
        "tokens": float(np.nansum(columns["tokens"])),
        "up_s": float(elapsed[-1]),
        "workers": int(columns["world_size"][-1]) if np.isfinite(columns["world_size"][-1]) else 0,
        "died": len({e["worker"] for e in events if e["event"] in ("worker_lost", "worker_evicted") and "worker" in e}),
        "views": len(changes),
        "lost_steps": sum(int(event.get("lost_steps", 0)) for event in entered),
        "reform_s": float(np.median(pauses)) if pauses else None,
        "skipped_steps": sum(event["event"] in ("not_finite", "loss_spike") for event in events),
    }


def _committed_s(columns: Columns, step: int) -> float | None:
    """Wall clock at which a step was committed; None if it has no record."""
    at = int(np.searchsorted(columns["step"], step))
    known = at < len(columns["step"]) and columns["step"][at] == step
    return float(columns["time"][at]) if known else None
