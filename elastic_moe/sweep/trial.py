"""The record of a trial, `trial.json` in its run directory, and the objective of a run, read from its files.

A rerun of a sweep finds there what is finished. The fingerprint says whether the directory holds the same trial: a
sweep with other values, or in another order, gives the same directory to another one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from elastic_moe.config.fingerprint import compare, fingerprint
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError
from elastic_moe.metrics.jsonl import last_line, read_jsonl
from elastic_moe.run_dir import EVENTS, METRICS, TRIAL

FINISHED, STOPPED_EARLY, FAILED, INTERRUPTED, RUNNING = "finished", "stopped early", "failed", "interrupted", "running"
DONE = (FINISHED, STOPPED_EARLY)  # a rerun passes these over
MEAN_STEPS = 10  # steps whose mean is the objective where it is a number of each step


class TrialFailed(RuntimeError):
    """A trial of a sweep has failed.

    Attributes:
        code: its exit code.
        worst: largest exit code of the trials that were launched with it.
    """

    def __init__(self, message: str, code: int, worst: int = 0) -> None:
        super().__init__(message, code, worst)  # all of them, so that it can be pickled
        self.message, self.code, self.worst = message, code, max(code, worst)

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class TrialRecord:
    """What is known of a trial.

    Attributes:
        trial: its number in the sweep.
        overrides: of the command line, as Hydra gave them.
        state: finished, stopped early, failed, interrupted or running.
        code: exit code of its last driver.
        reason: why it is in this state; "" if nothing is to be said.
        step, steps: last committed step, and steps of the run.
        objective: value of `run.objective`; None if there is none.
        starts: of its driver.
        seconds: in which it trained or was about to, over all starts.
        fingerprint: see `config.fingerprint`.
    """

    trial: int
    overrides: list[str]
    state: str = RUNNING
    code: int = 0
    reason: str = ""
    step: int = 0
    steps: int = 0
    objective: float | None = None
    starts: int = 0
    seconds: float = 0.0
    fingerprint: dict[str, Any] = field(default_factory=dict[str, Any])

    def write(self, run_dir: Path) -> None:
        """Write it into the run directory, which is made if it is not there."""
        run_dir.mkdir(parents=True, exist_ok=True)
        new = run_dir / f".{TRIAL}.tmp"
        new.write_text(json.dumps(asdict(self), indent=1))
        os.replace(new, run_dir / TRIAL)

    def done(self, config: TrainConfig) -> bool:
        """Whether a rerun has nothing to do here."""
        return self.state == STOPPED_EARLY or (self.state == FINISHED and self.step >= config.run.steps)


def read_trial(run_dir: Path) -> TrialRecord | None:
    """The record in a run directory; None if there is none.

    Raises:
        UserError: it cannot be read.
    """
    try:
        values: Mapping[str, Any] = json.loads((run_dir / TRIAL).read_text())
        known = {item.name for item in fields(TrialRecord)}
        return TrialRecord(**{name: value for name, value in values.items() if name in known})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{run_dir / TRIAL} cannot be read: {error}; nothing was changed") from error


def fingerprint_of_trial(config: TrainConfig) -> dict[str, Any]:
    """The part of the configuration that makes the trial what it is."""
    return fingerprint(config, {})


def check_same(record: TrialRecord, config: TrainConfig, run_dir: Path) -> None:
    """Refuse a directory that holds another trial; more steps are no difference.

    Raises:
        UserError: with the keys that differ.
    """
    found = compare(record.fingerprint, fingerprint_of_trial(config))
    differing = [text for text in (*found.impossible, *found.changed) if not text.startswith("run.steps:")]
    if differing:
        raise UserError(
            f"run.dir={run_dir} holds another trial than this one ({', '.join(differing)}): name another run.dir, or "
            "set run.overwrite=true"
        )


def last_step(run_dir: Path) -> int:
    """Last committed step of a run; 0 before the first."""
    last = last_line(run_dir / METRICS)
    return int(last["step"]) if last else 0


def objectives(run_dir: Path, key: str) -> list[tuple[int, float]]:
    """Step and value of `run.objective` in the order of steps, as far as the run has come.

    Args:
        run_dir: of the run.
        key: `val_loss`, of each evaluation; or a key of metrics.jsonl, as the mean of the last `MEAN_STEPS` steps.
    """
    if key == "val_loss":
        events = [event for event in read_jsonl(run_dir / EVENTS) if event.get("event") == "evaluated"]
        newest = {
            int(event["step"]): _number(event.get(key)) for event in events
        }  # after a way back a step comes again
        return sorted((step, value) for step, value in newest.items() if value is not None)
    records = read_jsonl(run_dir / METRICS)
    values = [(int(record["step"]), _number(record.get(key))) for record in records]
    known = [(step, value) for step, value in values if value is not None]
    found: list[tuple[int, float]] = []
    for index, (step, _) in enumerate(known, 1):
        last = [value for _, value in known[max(0, index - MEAN_STEPS) : index]]
        found.append((step, sum(last) / len(last)))
    return found


def objective(run_dir: Path, key: str) -> float | None:
    """Newest value of `run.objective`; None if the run has none."""
    found = objectives(run_dir, key)
    return found[-1][1] if found else None


def _number(value: Any) -> float | None:
    """A number of a record. JSON has no number that is not finite: it stands there as None or as a text."""
    try:
        return float("nan") if value is None else float(value)
    except (TypeError, ValueError):
        return None
