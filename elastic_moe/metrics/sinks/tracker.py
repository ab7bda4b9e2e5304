"""The tracker of a run, chosen by `tracking.backend`. A tracker that is not installed is found before work starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from elastic_moe.config.schema import TrackingConfig
from elastic_moe.errors import UserError
from elastic_moe.metrics.sinks.background import Backend, BackgroundSink
from elastic_moe.metrics.sinks.marks import Mark
from elastic_moe.metrics.sinks.mlflow import open_mlflow
from elastic_moe.metrics.sinks.tensorboard import open_tensorboard
from elastic_moe.metrics.sinks.trackio import open_trackio
from elastic_moe.metrics.sinks.wandb import end_services, open_wandb, services, wandb_mode

OFF = "off"
PACKAGES = {  # of each backend; one of them is enough
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
_LOG = logging.getLogger(__name__)


def check_tracking(config: TrackingConfig) -> None:
    """Raises UserError if the tracker is not installed."""
    packages = PACKAGES.get(config.backend, ())
    if packages and not any(map(find_spec, packages)):
        raise UserError(
            f"tracking.backend={config.backend} needs the package {packages[0]}: "
            f"pip install 'elastic_moe[{config.backend}]', or set tracking.backend=off"
        )


class Tracker(BackgroundSink):
    """Sends the records of a run to its tracker in the background.

    Args:
        config: how to track.
        run_dir: the run directory.
        run_config: the run's whole configuration, stored with the run.
        environ: environment variables of the process.
        on_failure: called once, from another thread, with a sentence about why tracking ended.
        backend: opens a backend instead of the configured one.

    Raises:
        UserError: `tracking.wandb` is unknown.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: str | Path,
        run_config: Mapping[str, Any],
        environ: Mapping[str, str],
        on_failure: Callable[[str], None] = _LOG.warning,
        backend: Callable[[Mark], Backend] | None = None,
    ) -> None:
        run_dir = Path(run_dir)
        mode = wandb_mode(config.wandb, environ) if config.backend == "wandb" else config.backend
        makes: dict[str, Callable[[Mark], Backend]] = {
            "wandb": partial(open_wandb, config, run_dir, mode),
            "tensorboard": partial(open_tensorboard, run_dir),
            "mlflow": partial(open_mlflow, config, run_dir, environ),
            "trackio": partial(open_trackio, config, run_dir),
        }
        make = None if mode == OFF else backend or makes[config.backend]
        self._services_before = services() if make is not None and config.backend == "wandb" else None
        super().__init__(config.backend, make, run_dir, run_config, on_failure)

    def _abandon(self) -> None:
        if self._services_before is not None:
            end_services(self._services_before)
