"""One trial as the launcher sees it: its configuration, its process, its run, and what became of it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf, open_dict

from elastic_moe.actors.cluster import max_workers
from elastic_moe.actors.shared import RunLink
from elastic_moe.config.build import build
from elastic_moe.config.schema import TrainConfig
from elastic_moe.run_dir import DRIVER_LOG, LOGS
from elastic_moe.sweep.gains import Look
from elastic_moe.sweep.job import JobProcess
from elastic_moe.sweep.pool import Want
from elastic_moe.sweep.trial import TrialFailed, TrialRecord
from elastic_moe.sweep.values import hydra_values, without_hydra

OURS = ("cluster", "elastic", "run", "sweep")  # groups of a configuration of elastic_moe


@dataclass
class Trial:
    """A job of one call of `launch`.

    Attributes:
        config: composed by Hydra, `hydra` included.
        run_dir: its directory.
        typed: the configuration of a run of elastic_moe; None for a job of another program.
        record: kept in its directory, if it is such a run.
        own: its overrides that are not those of all trials.
        process: its process; None while it has none.
        allowed: workers that it may have now; 0 while it waits.
        failures: starts in a row that failed without a new step.
        farthest: largest step that any start has committed.
        ends_early: why it was asked to stop before its last step; "" if it was not.
        gives_way: it was asked to stop so that others have workers, and is started again later.
        no_room_since_s: since when there has been no room for it, although it trains.
        returned: for Hydra, once it has ended for good.
        began_s, asked_s, compared_s: monotonic times of its start, of the last wish for a stop, of the last comparison.
    """

    config: DictConfig
    run_dir: Path
    typed: TrainConfig | None
    record: TrialRecord
    own: list[str] = field(default_factory=list[str])
    process: JobProcess | None = None
    link: RunLink | None = None
    status: dict[str, Any] = field(default_factory=dict)
    allowed: int = 0
    failures: int = 0
    farthest: int = 0
    ends_early: str = ""
    gives_way: bool = False
    no_room_since_s: float | None = None
    returned: JobReturn | None = None
    began_s: float = 0.0
    asked_s: float = -math.inf
    compared_s: float = -math.inf

    @property
    def number(self) -> int:
        return self.record.trial

    @property
    def title(self) -> str:
        """Its number and overrides, for a line."""
        return f"trial {self.number}" + (f" ({', '.join(self.own)})" if self.own else "")

    @property
    def want(self) -> Want:
        """Its claim on the pool."""
        if self.typed is None:
            return Want(self.number, 1, 1, 0, self.allowed)
        most, least = max_workers(self.typed), self.typed.elastic.min_workers
        return Want(self.number, least, max(most, least), self.typed.sweep.priority, self.allowed)

    @property
    def look(self) -> Look:
        """What is seen of its speed."""
        config = self.typed
        kind = (
            ""
            if config is None
            else repr((config.model, config.data, config.optim.name, config.precision, config.device, config.threads))
        )
        workers, step = int(self.status.get("world_size", 0)), int(self.status.get("step", 0))
        return Look(self.number, kind, self.allowed, workers, step, self.status.get("tokens_per_s"))

    @property
    def held(self) -> int:
        """Workers that it has, or may have now."""
        return max(self.allowed, int(self.status.get("workers", 0))) if self.process is not None else 0

    def start(self, job: Mapping[str, Any], file: Path) -> None:
        """Start its process with the workers that it may have now.

        Args:
            job: see `JobProcess`, without the configuration.
            file: where to leave the job.
        """
        log = None
        if self.typed is not None:
            log = self.run_dir / LOGS / DRIVER_LOG
            log.parent.mkdir(parents=True, exist_ok=True)
            self.link, self.status = RunLink(self.run_dir), {}
        self.began_s, self.ends_early = time.monotonic(), ""
        self.process = JobProcess({**job, "config": self._config()}, file, log)

    def _config(self) -> DictConfig:
        """The configuration of the next start: it goes on where an earlier one has ended."""
        config = copy.deepcopy(self.config)
        if self.typed is None:
            return config
        with open_dict(config):
            config.sweep.workers = self.allowed
            if self.record.starts:
                config.run.resume, config.run.overwrite = "auto", False
            if "group" in config.tracking and not config.tracking.group:
                config.tracking.group = Path(config.hydra.sweep.dir).absolute().name
        return config

    def poll(self) -> None:
        """Take the newest status of its run in, and tell the run again how many workers it may have."""
        if self.link is None or self.process is None:
            return
        self.status = self.link.poll() or self.status
        limit = self.status.get("limit")
        if self.allowed and limit is not None and limit != self.allowed:
            self.link.submit({"event": "scale", "workers": self.allowed, "reason": "the sweep's pool"})

    def ask_to_stop(self, reason: str) -> None:
        """Ask the run to save its state and end; asked again, it changes nothing."""
        if self.link is not None:
            self.link.submit({"event": "stop", "reason": reason})

    def returns(self, status: JobStatus, value: Any) -> JobReturn:
        """What Hydra gets for a trial whose process left nothing."""
        hydra = OmegaConf.masked_copy(self.config, ["hydra"])
        overrides: Any = OmegaConf.to_container(self.config.hydra.overrides.task)
        name = str(self.config.hydra.job.name)
        returned = JobReturn(overrides, without_hydra(self.config), hydra, str(Path.cwd()), name, status)
        returned.return_value = value
        return returned

    def failed(self, reason: str, code: int) -> JobReturn:
        """What Hydra gets for a trial that has failed."""
        return self.returns(JobStatus.FAILED, TrialFailed(f"{self.title}: {reason}", code))


def typed_config(config: DictConfig) -> TrainConfig | None:
    """The configuration of a run of elastic_moe; None for another program's.

    Raises:
        UserError: a key is wrong.
    """
    if not all(group in config for group in OURS):
        return None
    with hydra_values(config):
        resolved: Any = OmegaConf.to_container(without_hydra(config), resolve=True)
    if resolved["model"].get("init_from"):
        del resolved["model"]  # its shape stands in that directory, and is checked by the trial itself
    return build(resolved)
