"""Copies of the run's metrics for MLflow, through Accelerate's tracker layer. The only file that knows mlflow.

MLFLOW_TRACKING_URI names a server or a store; without it, the run directory has a database of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from elastic_moe.config.schema import TrackingConfig
from elastic_moe.metrics.sinks.background import Backend
from elastic_moe.metrics.sinks.marks import Mark

STORE = "mlflow.db"  # in the run directory
MAX_PARAM = 6000  # letters of a parameter's value


def open_mlflow(config: TrackingConfig, run_dir: Path, environ: Mapping[str, str], mark: Mark) -> Backend:
    """Begin a run in MLflow, or go on with the one of the start before.

    Args:
        config: how to track.
        run_dir: the run directory.
        environ: environment variables of the process.
        mark: what the start before has sent.
    """
    # Imported here: they take seconds, and this runs in the sink's thread.
    from accelerate import PartialState
    from accelerate.tracking import MLflowTracker

    mlflow: Any = import_module("mlflow")  # an extra
    PartialState(cpu=True)  # Accelerate's logger, which the tracker uses, refuses to work without it
    if not environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{run_dir / STORE}")

    class MLflow(MLflowTracker):
        replaces = False

        def start(self) -> None:
            super().start()
            self.run_id: Any = self.active_run.info.run_id

        def store_init_configuration(self, values: dict) -> None:
            if not mark.run_id:  # a parameter is written once
                super().store_init_configuration({name: str(value)[:MAX_PARAM] for name, value in values.items()})

        def log(self, values: dict, step: int | None, **kwargs: Any) -> None:
            mlflow.log_metrics({name.replace("/", "."): value for name, value in values.items()}, step=step)

        def flush(self) -> None:
            """Each call has written what it was given."""

    tracker = MLflow(
        experiment_name=config.project,
        run_id=mark.run_id or None,
        run_name=config.name or run_dir.name,
        tags={"group": config.group} if config.group else None,
    )
    tracker.start()
    return tracker
