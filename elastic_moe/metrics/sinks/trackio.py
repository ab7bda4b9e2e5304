"""Copies of the run's metrics for Trackio, through Accelerate's tracker layer. The only file that knows trackio."""

from __future__ import annotations

import secrets
from pathlib import Path

from elastic_moe.config.schema import TrackingConfig
from elastic_moe.metrics.sinks.background import Backend
from elastic_moe.metrics.sinks.marks import Mark


def open_trackio(config: TrackingConfig, run_dir: Path, mark: Mark) -> Backend:
    """Begin a run in Trackio, or go on with the one of the start before.

    Args:
        config: how to track.
        run_dir: the run directory.
        mark: what the start before has sent.
    """
    # Imported here: they take seconds, and this runs in the sink's thread.
    from accelerate import PartialState
    from accelerate.tracking import TrackioTracker

    PartialState(cpu=True)  # Accelerate's logger, which the tracker uses, refuses to work without it
    name = mark.run_id or f"{config.name or run_dir.name}-{secrets.token_hex(3)}"

    class Trackio(TrackioTracker):
        replaces, run_id = False, name

        def store_init_configuration(self, values: dict) -> None:
            """The configuration was given at the start: Trackio stores it with the run's first line."""
            self.run.config.update(values)

        def flush(self) -> None:
            """Trackio's own thread sends."""

    group = {"group": config.group} if config.group else {}
    tracker = Trackio(config.project, name=name, resume="allow", embed=False, **group)
    tracker.start()
    return tracker
