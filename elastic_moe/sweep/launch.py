"""Hydra's side of the launcher: it makes trials of the jobs that a sweeper hands over, and returns their results.

Hydra's interface is synchronous: a sweeper hands over a batch of jobs and waits for all of them. So trials share
workers within one call of `launch`. What lasts longer than a call is here: the rungs of early stopping, and the table.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from elastic_moe.actors.cluster import max_workers, ray_session, resolve
from elastic_moe.actors.shared import ray_address
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError
from elastic_moe.metrics.report.page import compare_runs
from elastic_moe.run_dir import REPORT, SWEEP_TABLE
from elastic_moe.sweep.gains import Gains
from elastic_moe.sweep.halving import Rungs
from elastic_moe.sweep.scheduler import Scheduler, Shared
from elastic_moe.sweep.table import text_table, write_table
from elastic_moe.sweep.trial import (
    TrialFailed,
    TrialRecord,
    check_same,
    fingerprint_of_trial,
    last_step,
    objective,
    read_trial,
)
from elastic_moe.sweep.trials import Trial, typed_config
from elastic_moe.sweep.values import hydra_values

SAME = ("kind", "address", "nodes", "workers_per_node", "cpus_per_worker", "gpus_per_worker")  # keys of one cluster


def tell(text: str) -> None:
    """One line about the sweep."""
    print(f"elastic_moe: {text}", file=sys.stderr, flush=True)


class Sweep:
    """One sweep: what Hydra's `Launcher.setup` gives, and `launch`."""

    def __init__(self, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config
        self._rungs: Rungs | None = None
        self._gains = Gains(0.0)
        self._records: dict[int, TrialRecord] = {}
        self._dirs: dict[int, Path] = {}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run a batch of jobs to their ends.

        Args:
            job_overrides: overrides of each job.
            initial_job_idx: number of the first one.

        Returns:
            One for each job, in their order.

        Raises:
            SystemExit: a signal has ended the sweep.
        """
        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        common = set[str]().union(*job_overrides).intersection(*job_overrides) if len(job_overrides) > 1 else set[str]()
        trials = [self._trial(list(job), common, initial_job_idx + index) for index, job in enumerate(job_overrides)]
        ours = [trial.typed for trial in trials if trial.typed is not None]
        if ours and self._rungs is None:
            self._rungs = Rungs(ours[0].sweep.rung_factor, ours[0].sweep.goal == "max")
            self._gains = Gains(ours[0].sweep.min_gain)
        signum = 0
        waiting = [trial for trial in trials if trial.returned is None]
        if waiting:
            with tempfile.TemporaryDirectory(prefix="emoe_sweep") as folder, self._cluster(waiting) as shared:
                job = self._job(shared)
                scheduler = Scheduler(trials, shared, self._rungs, self._gains, job, Path(folder), tell)
                signum = scheduler.run()
        if ours:
            self._show(trials)
        if signum:
            raise SystemExit(128 + signum)
        return _returned(trials)

    def _trial(self, overrides: list[str], common: set[str], number: int) -> Trial:
        """The trial of a job. It has ended already where its directory says so, or where its input is wrong.

        Args:
            overrides: of the job.
            common: those that all jobs of its batch have.
            number: of the job.
        """
        config = self._context.config_loader.load_sweep_config(self._config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        with hydra_values(config):
            run_dir = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir)).absolute()
        trial = Trial(config, run_dir, None, TrialRecord(number, list(filter_overrides(overrides))))
        trial.own = [text for text in trial.record.overrides if text not in common]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # given by the trial itself
                trial.typed = typed_config(config)
            if trial.typed is not None:
                self._take_up(trial, trial.typed)
        except UserError as error:
            trial.returned = trial.failed(str(error), error.exit_code)
            tell(f"{trial.title}: {error}")
        return trial

    def _take_up(self, trial: Trial, config: TrainConfig) -> None:
        """Find what an earlier launch of the sweep left of this trial."""
        new = TrialRecord(trial.number, trial.record.overrides, fingerprint=fingerprint_of_trial(config))
        found = None if config.run.overwrite else read_trial(trial.run_dir)
        trial.record = new
        if found is None:
            return
        check_same(found, config, trial.run_dir)
        trial.record = found
        trial.farthest = found.step
        if found.done(config):
            value = objective(trial.run_dir, config.run.objective)
            trial.returned = trial.returns(JobStatus.COMPLETED, value)
            tell(f"{trial.title} is {found.state} after step {found.step}, and is passed over")

    @contextmanager
    def _cluster(self, trials: Sequence[Trial]) -> Iterator[Shared | None]:
        """The cluster of the trials that are runs of elastic_moe; None where there are none.

        Raises:
            UserError: they ask for different clusters, or there is none.
        """
        configs = [trial.typed for trial in trials if trial.typed is not None]
        if not configs:
            yield None
            return
        for key in SAME:
            if len(values := {getattr(config.cluster, key) for config in configs}) > 1:
                told = ", ".join(sorted(map(str, values)))
                raise UserError(f"the trials of hydra/launcher=elastic share one cluster; cluster.{key} is {told}")
        largest = resolve(max(configs, key=max_workers))
        with ray_session(largest):
            own = largest.cluster.kind != "address"
            yield Shared(largest.cluster, configs[0].sweep, ray_address() if own else "")

    def _job(self, shared: Shared | None) -> dict[str, Any]:
        address = shared.address if shared is not None else ""
        return {"hydra_context": self._context, "task_function": self._task, "address": address}

    def _show(self, trials: Sequence[Trial]) -> None:
        """Write the table of all trials so far, and print it."""
        for trial in trials:
            if trial.typed is not None:
                self._records[trial.number], self._dirs[trial.number] = trial.record, trial.run_dir
        records = [self._records[number] for number in sorted(self._records)]
        key = next(trial.typed.run.objective for trial in trials if trial.typed is not None)
        folder = Path(str(self._config.hydra.sweep.dir)).absolute()
        try:
            write_table(folder / SWEEP_TABLE, records, self._dirs, key)
        except OSError as error:
            tell(f"the table cannot be written: {error}")
        self._draw(folder)
        print(text_table(records, key), flush=True)
        print(f"{folder / SWEEP_TABLE}", flush=True)

    def _draw(self, folder: Path) -> None:
        """Draw the trials that have made a step as one page."""
        begun = [self._dirs[number] for number in sorted(self._dirs) if last_step(self._dirs[number])]
        if not begun:
            return
        try:
            tell(f"drawn in {compare_runs(begun, folder / REPORT)}")
        except Exception as error:  # noqa: BLE001 - the sweep is over, and its picture is not worth its exit code
            tell(f"the page of the sweep could not be drawn: {type(error).__name__}: {error}")


def _returned(trials: Sequence[Trial]) -> list[JobReturn]:
    """The results in order; each failure knows the worst one's exit code."""
    found = [trial.returned for trial in trials]
    failures = [job._return_value for job in found if job is not None and job.status == JobStatus.FAILED]
    worst = max((error.code if isinstance(error, TrialFailed) else 1 for error in failures), default=0)
    for error in failures:
        if isinstance(error, TrialFailed):
            error.worst = worst
    return [job for job in found if job is not None]
