"""The coordinator actor: `coordination.coordinator` with watchers of Ray's nodes and of the run's driver, and metrics.

Ray restarts it when it dies. The workers go on training meanwhile, find its new address and register again. Its records
are in the run directory. It is detached, so it outlives its driver, and then ends the run.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack
from typing import Any, NoReturn

import ray

from elastic_moe.actors.cluster import max_workers
from elastic_moe.actors.driver_watcher import DriverWatcher, end_run, is_dead
from elastic_moe.actors.link import LAST_SAVE_MARGIN_S, train_names
from elastic_moe.actors.metrics import RunExporter
from elastic_moe.actors.node_watcher import NodeWatcher
from elastic_moe.config.schema import TrainConfig
from elastic_moe.coordination.coordinator import RunCoordinator
from elastic_moe.coordination.membership import RunStatus
from elastic_moe.data.prepare import Prepared
from elastic_moe.errors import reason_of
from elastic_moe.run_log import logging_of_run

PAUSE_S = 2.0  # before Ray starts this actor once more

logger = logging.getLogger(__name__)


class Coordinator:
    """One run's coordinator, as an actor.

    Args:
        config: the run's configuration; `run.dir` is absolute.
        token: shared secret of the run.
        target: number of workers to start with.
        host: address to listen on, reachable from every worker.
        prepared: the corpus, for workers that do not see it.
        began_s: wall clock at the start of the run. Ray repeats it where it starts this actor again.
    """

    def __init__(  # its arguments are the same in each of its lives
        self, config: TrainConfig, token: str, target: int, host: str, prepared: Prepared | None, began_s: float
    ) -> None:
        self._config, self._token = config, token
        context = ray.get_runtime_context()
        job, name = context.get_job_id(), context.get_actor_name()
        assert name is not None, "a coordinator has a name"
        names = train_names(name, config.run.dir)
        self._log = ExitStack()
        self._log.enter_context(logging_of_run(config.run.log_format, names.name, self._where))
        self._metrics = RunExporter(config.run.dir, names, max_workers(config))
        restarted = bool(context.was_current_actor_reconstructed)
        try:
            self._run = RunCoordinator(config, token, target, host, restarted, prepared, self._metrics, began_s)
        except OSError as error:
            if restarted:
                _once_more(error)
            raise
        self._metrics.begin(self._run.status, self._run.goodput)
        self._nodes = NodeWatcher(self.submit, config.elastic.drain_deadline_s)
        self._nodes.start()
        patience_s = config.elastic.hang_timeout_s + LAST_SAVE_MARGIN_S
        self._driver = DriverWatcher(name, self._run, patience_s, lambda: is_dead(job), end_run)
        self._driver.start()

    def _where(self) -> tuple[int, int]:
        """Generation and step, for a line of the log; (0, 0) while this is being made."""
        run: RunCoordinator | None = getattr(self, "_run", None)
        status = run.status() if run is not None else None
        return (status["generation"], status["step"]) if status else (0, 0)

    def address(self) -> tuple[str, int]:
        """Host and port where workers connect."""
        return self._run.address

    def token(self) -> str:
        """Shared secret of the run, for its workers: what Ray shows of actors and of train runs does not have it."""
        return self._token

    def pid(self) -> int:
        """Process id on its node."""
        return os.getpid()

    def submit(self, request: dict[str, Any]) -> None:
        """Take a request: drain, worker_lost, node_lost, stop, fail; see `RunCoordinator.submit`."""
        self._run.submit(request)

    def status(self) -> RunStatus:
        """The state of the run."""
        return self._run.status()

    def goodput(self) -> dict[str, Any]:
        """What the workers' time has gone into, as a line of goodput.jsonl."""
        return self._run.goodput()

    def config(self) -> TrainConfig:
        """The run's configuration."""
        return self._config

    def recent(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The last records and the last events."""
        return self._run.recent()

    def records_since(self, step: int) -> list[dict[str, Any]]:
        """Records of steps after this one, in order."""
        return self._run.records_since(step)

    def close(self) -> None:
        """Complete what was reported and end; the actor can be killed then."""
        self._driver.close()
        self._nodes.close()
        self._run.close()
        self._metrics.close()
        self._log.close()


def _once_more(error: OSError) -> NoReturn:
    """End this process because storage fails as the coordinator begins again.

    Ray starts an actor again whose process ends, and gives one up for good whose making raises.
    """
    logger.warning("the coordinator cannot begin again, and is started once more: %s", reason_of(error))
    time.sleep(PAUSE_S)
    os._exit(1)
