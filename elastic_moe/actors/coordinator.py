"""The coordinator actor: `coordination.coordinator` with a watcher of Ray's nodes.

Ray restarts it when it dies. The workers go on training meanwhile, find its new address and register again. Its records
are in the run directory.
"""

from __future__ import annotations

import os
from typing import Any

import ray

from elastic_moe.actors.node_watcher import NodeWatcher
from elastic_moe.config.schema import TrainConfig
from elastic_moe.coordination.coordinator import RunCoordinator
from elastic_moe.coordination.membership import RunStatus


class Coordinator:
    """One run's coordinator, as an actor.

    Args:
        config: the run's configuration; `run.dir` is absolute.
        token: shared secret of the run.
        target: number of workers to start with.
        host: address to listen on, reachable from every worker.
        watch_nodes: poll Ray for draining and dead nodes.
    """

    def __init__(
        self, config: TrainConfig, token: str, target: int, host: str = "127.0.0.1", watch_nodes: bool = True
    ) -> None:
        self._token = token
        restarted = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        self._run = RunCoordinator(config, token, target, host, restarted)
        self._watcher = NodeWatcher(self.submit, config.elastic.drain_deadline_s) if watch_nodes else None
        if self._watcher is not None:
            self._watcher.start()

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

    def records_since(self, step: int) -> list[dict[str, Any]]:
        """Records of steps after this one, in order."""
        return self._run.records_since(step)

    def close(self) -> None:
        """Complete what was reported and end; the actor can be killed then."""
        if self._watcher is not None:
            self._watcher.close()
        self._run.close()
