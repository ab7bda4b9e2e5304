"""The outcome of a run: its exit code, the last lines that the driver prints, and whether the last state is saved."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic_moe.actors.stop import Stop
from elastic_moe.checkpoint.reader import load_manifest
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import Diverged, StorageFailed, UserError, reason_of
from elastic_moe.metrics.format_event import format_loss
from elastic_moe.metrics.goodput import account
from elastic_moe.metrics.jsonl import iterate, read_jsonl
from elastic_moe.metrics.summary import Steps, failure_line, summary, time_line, write_summary
from elastic_moe.run_dir import EVENTS, METRICS, checkpoint_root
from elastic_moe.run_log import TEXT, RunLog

EXIT_FAILED = 1
SIGNALLED = 128  # exit codes of runs that a signal has stopped begin here


@dataclass(frozen=True)
class Ended:
    """A run that has ended.

    Attributes:
        config: its configuration.
        stop: the wish for an end, if any.
        error: the error that ended it, if any.
        status: newest status of the coordinator.
        log: tells the lines.
    """

    config: TrainConfig
    stop: Stop
    error: BaseException | None
    status: dict[str, Any]
    log: RunLog = field(default_factory=lambda: RunLog(TEXT, ""))

    def tell(self, text: str, level: str = "info") -> None:
        """Print a line; text goes to standard output."""
        self.log.tell(text, level, print)


def conclude(run: Ended) -> int:
    """Print the outcome. Returns the exit code.

    Raises:
        UserError: the input was bad.
        StorageFailed: all steps are committed, or the run was stopped, and its last state is not saved.
    """
    run_dir, steps, root = Path(run.config.run.dir), run.config.run.steps, checkpoint_root(run.config)
    made = Steps.of(iterate(run_dir / METRICS))
    step = int(made.last.get("step", 0))
    complete = step >= steps and run.error is None
    asked = run.error is None and run.status.get("phase") == "finished"  # to stop, by an operator or a signal
    events, goodput = read_jsonl(run_dir / EVENTS), account(run_dir, run.config.cluster.price_per_hour)
    outcome = "finished" if complete else "stopped" if asked or run.stop.count else "failed"
    reason = "" if complete else str(_cause(run.error) or run.status.get("reason", ""))
    with suppress(OSError):  # a full disk: the outcome is told all the same
        write_summary(run_dir, summary(outcome, reason, steps, made, events, goodput))
    if complete:
        _summarise(run, made, events)
    for line in filter(None, (time_line(goodput), failure_line(goodput))):
        run.tell(line)
    unsaved = _why_unsaved(root, step) if step else ""
    if unsaved and run.error is None and (complete or run.stop.count == 1 or asked):
        raise StorageFailed(
            f"the state after step {step} is not saved in checkpoint.dir={root}: {unsaved}; the checkpoint before it, "
            "if there is one, is what a resume continues from."
        )
    if complete:
        return 0
    saved = f"the state after step {step} is {f'not saved: {unsaved}' if unsaved else 'saved'}" if step else ""
    if run.stop.count > 1 or (run.stop.count and not unsaved):
        told = f" ({saved})" if unsaved else ""
        run.tell(f"stopped after step {step} of {steps}{told}; go on with run.resume=auto")
        return SIGNALLED + run.stop.signum
    if asked:
        run.tell(f"stopped after step {step} of {steps}: {run.status['reason']}; go on with run.resume=auto")
        return 0
    cause = _cause(run.error)
    known = (cause and reason_of(cause)) or run.status.get("reason") or "the run ended early"
    if step or not isinstance(cause, UserError):  # else the error's own sentence is all
        run.log.tell("; ".join(filter(None, (f"failed after step {step} of {steps}: {known}", saved))), "error")
    if isinstance(cause, UserError):
        raise cause
    return EXIT_FAILED


def _cause(error: BaseException | None) -> BaseException | None:
    """The error of a worker that is the reason, where its sentence is meant for the user; else the error itself."""
    for failure in getattr(error, "worker_failures", {}).values():
        if isinstance(failure, UserError | Diverged):
            return failure
    return error


def _why_unsaved(root: str, step: int) -> str:
    """Why there is no checkpoint of this step; "" if there is."""
    try:
        load_manifest(root, step)
    except OSError as error:
        return str(error) or repr(error)
    return ""


def _summarise(run: Ended, made: Steps, events: list[dict[str, Any]]) -> None:
    last = made.last
    run.tell(
        f"{last['step']} steps, loss {format_loss(last['loss'])}, {made.generations} generation(s), "
        f"last world size {last.get('world_size')}; {run.config.run.dir}"
    )
    for label, key in (("evaluated", "val_loss"), ("sample", "text")):
        found = [event[key] for event in events if event.get("event") == label and key in event]
        if found:
            run.tell(f"val_loss: {format_loss(found[-1])}" if key == "val_loss" else f"sample: {found[-1]}")
