"""Checks at the start of a run, before anything is written: whose directories these are, and what they hold.

Absence is never taken for an empty run. Records without a readable checkpoint, a checkpoint root of another run, and
storage that cannot be read each end the start with a sentence, and nothing is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elastic_moe.checkpoint.identity import RunIdentity, read_identity
from elastic_moe.checkpoint.manifest import Manifest
from elastic_moe.checkpoint.reader import find_latest
from elastic_moe.checkpoint.storage import CorruptCheckpoint, Storage
from elastic_moe.checkpoint.writer import list_steps
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError
from elastic_moe.run_dir import METRICS, checkpoint_root


@dataclass(frozen=True)
class Found:
    """The contents of a run directory and of its checkpoint root.

    Attributes:
        run_dir, root: the two places.
        has_records: steps were committed.
        own: identity in the run directory; None if there is none.
        of_root: identity in the checkpoint root; None if there is none.
        steps: steps that have a directory in the root.
        newest: newest complete checkpoint of the present history.
    """

    run_dir: Path
    root: str
    has_records: bool
    own: RunIdentity | None
    of_root: RunIdentity | None
    steps: tuple[int, ...]
    newest: Manifest | None

    @property
    def known(self) -> RunIdentity | None:
        """The newest identity that they hold."""
        known = max(filter(None, (self.own, self.of_root)), key=lambda one: one.timeline, default=None)
        return RunIdentity.of_meta(self.newest.meta) if known is None and self.newest is not None else known

    @property
    def of_another_run(self) -> bool:
        """Whether the root holds checkpoints of another run than the run directory."""
        if not self.steps and (self.of_root is None or not self.of_root.first_checkpoint):
            return False
        writer = self._writer
        if self.own is not None and self.own.run and writer:
            return self.own.run != writer
        if Path(self.root).is_relative_to(self.run_dir):
            return False
        if self.of_root is not None and self.of_root.run_dir:
            return self.of_root.run_dir != str(self.run_dir)
        return not self.has_records

    @property
    def _writer(self) -> str:
        """Id of the run that wrote the root; "" if it is not known."""
        if self.of_root is not None:
            return self.of_root.run
        return "" if self.newest is None else RunIdentity.of_meta(self.newest.meta).run


def look(config: TrainConfig) -> Found:
    """Read what a start will find; nothing is written.

    Raises:
        UserError: the checkpoint root cannot be read.
    """
    run_dir, root = Path(config.run.dir), checkpoint_root(config)
    metrics = run_dir / METRICS
    try:
        own, of_root = _identity(str(run_dir)), _identity(root)
        steps = tuple(list_steps(Storage(root)))
        newest = find_latest(root, verify=False) if steps else None
        has_records = metrics.exists() and metrics.stat().st_size > 0
    except OSError as error:
        raise UserError(f"checkpoint.dir={root} cannot be read, and nothing was changed: {error}") from error
    return Found(run_dir, root, has_records, own, of_root, steps, newest)


def check_start(config: TrainConfig, found: Found) -> None:
    """Decide whether a start may go on.

    Raises:
        UserError: with one sentence about the reason.
    """
    run, root = config.run, found.root
    if run.resume == "never":
        if found.has_records and not run.overwrite:
            raise UserError(f"run.dir={run.dir} has a run; continue it with run.resume=auto or name another directory")
        if found.of_another_run:
            raise UserError(
                f"checkpoint.dir={root} holds the checkpoints of another run: name another directory, or continue that "
                "run in its own run.dir with run.resume=auto"
            )
        if found.steps and not run.overwrite:
            raise UserError(f"checkpoint.dir={root} has checkpoints; continue them with run.resume=auto")
        return
    if found.of_another_run and (found.has_records or found.of_root is not None):
        raise UserError(f"checkpoint.dir={root} holds the checkpoints of another run than run.dir={run.dir}")
    had_checkpoints = found.own is None or found.own.first_checkpoint > 0
    was_mounted = found.own is None or found.of_root is not None
    if found.newest is None and (
        (found.has_records and (had_checkpoints or not was_mounted))
        or (found.own is not None and found.own.first_checkpoint)
    ):
        raise UserError(
            f"run.dir={run.dir} has a run, and checkpoint.dir={root} has no readable checkpoint of it: mount or name "
            "the right directory, or begin anew in another run.dir; nothing was changed"
        )


def _identity(place: str) -> RunIdentity | None:
    try:
        return read_identity(Storage(place))
    except CorruptCheckpoint:
        return None
