"""The names in a run directory. Every part that reads or writes one takes them from here."""

from __future__ import annotations

import re
import uuid
from contextlib import suppress
from pathlib import Path

from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError

RUN = "run.json"  # identity of the run: here and in the checkpoint root
LEASE = "lease.json"  # the process that owns the directory now: here and in the checkpoint root
CLAIMS = "lease"  # directory: the same on an object store, one object per process that claims it
CONFIG = "config.yaml"  # the configuration of the newest start as the user gave it, complete
CONFIGS = "configs"  # directory: configuration, command and versions of every start
START = ".start.json"  # ending of the files there with command and versions
TOKENIZER = "tokenizer.json"  # written by `data.tokenizer`, for export and generate
METRICS = "metrics.jsonl"  # one line per committed step
ABANDONED_METRICS = "metrics.t*.jsonl"  # the same of a timeline that the run has gone back behind
EVENTS = "events.jsonl"  # one line per event
GOODPUT = "goodput.jsonl"  # what the workers' time went into, now and then, up to then
EXPERTS = "experts.jsonl"  # placements of the experts, and their loads
GOODPUT = "goodput.jsonl"  # what the workers' time went into, now and then, up to then
SUMMARY = "summary.json"  # the outcome of the newest start
TRACKING = "tracking.json"  # how far each tracker has come
OPERATOR = "operator.json"  # what an operator asked of the run that goes on
LIVE = "live.json"  # where the run that goes on can be reached
LOGS = "logs"  # directory: what the workers logged, a file for each
TRIAL = "trial.json"  # the run as a trial of a sweep: its overrides, outcome and objective
DRIVER_LOG = "driver.log"  # in logs/: what the driver of a trial printed
SWEEP_TABLE = "sweep.csv"  # in the directory of a sweep: its trials
REPORT = "report.html"  # the run as one page
FAULTS = "faults"  # directory: one file per injected fault that has fired
CHECKPOINTS = "checkpoints"  # directory: durable checkpoints, unless `checkpoint.dir` names another place
RAY = ".ray"  # directory: state of Ray Train

WITNESS = ".witness"  # in the checkpoint root: whoever reads its content sees the coordinator's storage

DAMAGED = ".damaged"  # ending of the file that keeps the damaged lines of another one

PROBE_BYTES = 65536  # more than a start writes before its first step

_STEP_DIR = re.compile(r"step_(\d{8,})")


def make_run_dir(path: Path) -> None:
    """Make a run directory, unless it is there, and find out whether files can be written in it.

    Raises:
        UserError: they cannot; a directory that was made for this is removed again.
    """
    missing = [each for each in (path, *path.parents) if not each.exists()]
    probe = path / f".probe-{uuid.uuid4().hex}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        with suppress(OSError):
            for each in missing:
                each.rmdir()
        raise UserError(f"run.dir={path} cannot be written: {error.strerror}") from error


def checkpoint_root(config: TrainConfig, run_dir: Path | None = None) -> str:
    """Directory or URI of a run's durable checkpoints.

    Args:
        config: the run's configuration.
        run_dir: the run directory, where it has been moved since; `run.dir` by default.
    """
    return config.checkpoint.dir or str((run_dir or Path(config.run.dir)) / CHECKPOINTS)


def local_path(place: str) -> Path | None:
    """The path of a place on this machine's file systems; None for an object store."""
    if "://" in place and not place.startswith("file://"):
        return None
    return Path(place.removeprefix("file://")).expanduser().absolute()


def abandoned_metrics(timeline: int) -> str:
    """Name of the file that keeps the records which a timeline made and the run has gone back behind."""
    return ABANDONED_METRICS.replace("*", str(timeline))


def step_dir(step: int) -> str:
    """Name of a step's directory below the checkpoint root."""
    return f"step_{step:08d}"


def split_step(place: str) -> tuple[str, int] | None:
    """Root and step of a checkpoint's directory or URI; None if its name is not a checkpoint's."""
    path, mark, query = place.partition("?") if "://" in place else (place, "", "")
    root, _, name = path.rstrip("/").rpartition("/")
    step = step_of(name)
    return None if step is None else (f"{root or '.'}{mark}{query}", step)


def step_of(directory: str) -> int | None:
    """Step of a directory's name, or None when it is not a checkpoint's."""
    match = _STEP_DIR.fullmatch(directory)
    return int(match[1]) if match else None
