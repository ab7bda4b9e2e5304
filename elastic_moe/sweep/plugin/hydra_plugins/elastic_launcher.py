"""`hydra/launcher=elastic`, as Hydra finds plugins: a module of the namespace package `hydra_plugins`.

Hydra imports each plugin at every start, so this file imports nothing else. `sweep/register.py` puts this folder on the
path; the work is done in `sweep/launch.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ElasticLauncher(Launcher):
    """Runs the jobs of a sweep side by side, each in a process of its own; runs of elastic_moe share one cluster."""

    def __init__(self) -> None:
        self._sweep: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See Hydra."""
        from elastic_moe.sweep.launch import Sweep

        self._sweep = Sweep(hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """See Hydra; a sweeper may call it several times."""
        return self._sweep.launch(job_overrides, initial_job_idx)


# Its settings are the keys sweep.* of the job's own configuration.
NODE = {"_target_": "hydra_plugins.elastic_launcher.ElasticLauncher"}
ConfigStore.instance().store(group="hydra/launcher", name="elastic", node=NODE, provider="elastic_moe")
