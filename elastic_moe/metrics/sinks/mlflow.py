"""Copies of the run's metrics for MLflow. The only file that knows mlflow.

MLFLOW_TRACKING_URI names a server or a store; without it, the run directory has a database of its own. Accelerate's
tracker is not used here: it works through mlflow's global run and sets MLFLOW_TRACKING_URI for the whole process, so
that the next run of a sweep would write into the database of the first. It also sends each step on its own, which
takes a transaction of about 20 ms.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from elastic_moe.config.schema import TrackingConfig
from elastic_moe.metrics.sinks.background import Backend
from elastic_moe.metrics.sinks.marks import Mark

STORE, ARTIFACTS = "mlflow.db", "mlruns"  # in the run directory
MAX_PARAM = 6000  # letters of a parameter's value
MAX_METRICS, MAX_PARAMS = 1000, 100  # in a request: MLflow's limits


def open_mlflow(config: TrackingConfig, run_dir: Path, environ: Mapping[str, str], mark: Mark) -> Backend:
    """Begin a run in MLflow, or go on with the one of the start before.

    Args:
        config: how to track.
        run_dir: the run directory.
        environ: environment variables of the process.
        mark: what the start before has sent.
    """
    mlflow: Any = import_module("mlflow")  # an extra, imported here: it takes seconds, and this is the sink's thread
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table that it makes
    given = environ.get("MLFLOW_TRACKING_URI")
    client = mlflow.MlflowClient(given or f"sqlite:///{run_dir / STORE}")
    if mark.run_id:
        client.update_run(mark.run_id, status="RUNNING")
        return _MLflow(mlflow.entities, client, mark.run_id, resumed=True)
    experiment = _experiment(client, config.project, None if given else (run_dir / ARTIFACTS).as_uri())
    tags = {"group": config.group} if config.group else {}
    run = client.create_run(experiment, tags=tags, run_name=config.name or run_dir.name)
    return _MLflow(mlflow.entities, client, run.info.run_id, resumed=False)


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    """Id of the experiment of this name, which another run may make at the same time."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except Exception:  # of mlflow, whose classes are known only where it is installed
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    return found.experiment_id


class _MLflow:
    """A run in MLflow. What is logged waits for `flush`, which sends many steps at once."""

    replaces = False

    def __init__(self, entities: Any, client: Any, run_id: str, resumed: bool) -> None:
        self._entities, self._client, self.run_id, self._resumed = entities, client, run_id, resumed
        self._waiting: list[Any] = []

    def store_init_configuration(self, values: dict) -> None:
        if self._resumed:
            return  # a parameter is written once
        params = [self._entities.Param(name, str(value)[:MAX_PARAM]) for name, value in values.items()]
        for begin in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self.run_id, params=params[begin : begin + MAX_PARAMS])

    def log(self, values: dict, step: int | None) -> None:
        now_ms = time.time_ns() // 1_000_000
        for name, value in values.items():
            self._waiting.append(self._entities.Metric(name.replace("/", "."), value, now_ms, step or 0))
        if len(self._waiting) >= MAX_METRICS:
            self.flush()

    def flush(self) -> None:
        while self._waiting:
            self._client.log_batch(self.run_id, metrics=self._waiting[:MAX_METRICS])
            del self._waiting[:MAX_METRICS]

    def finish(self) -> None:
        self.flush()
        self._client.set_terminated(self.run_id)
