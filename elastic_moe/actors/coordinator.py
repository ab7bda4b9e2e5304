"""The coordinator actor: membership, failure detection, records and the checkpoint book of one run. A thin shell.

What it decides is `control.machine`; who speaks to it is `actors.server`. Ray restarts it when it dies: the workers go on training meanwhile,
find its new address and register again; its records are on disk.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from pathlib import Path
from typing import Any

from elastic_moe.actors.node_watcher import NodeWatcher
from elastic_moe.config.schema import TrainConfig
from elastic_moe.coordination.checkpoints import CheckpointCommitter
from elastic_moe.coordination.server import ControlServer
from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.metrics.recorder import Recorder
from elastic_moe.model.params import param_specs
from elastic_moe.plan.state.units import build_units
from elastic_moe.run_dir import METRICS, checkpoint_root

RECENT = 1000  # records kept in memory for the driver, which asks for new ones several times a second


class Coordinator:
    """One run's coordinator.

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
        self._config = config
        self._run_dir = Path(config.run.dir)
        self._recorder = Recorder(self._run_dir)
        self._fell_back = -1  # generation that last fell back to a checkpoint
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._recent_lock = threading.Lock()
        self._closed = threading.Event()
        units = build_units(param_specs(config.model), config.model.max_unit_elements)
        self._book = CheckpointCommitter(
            checkpoint_root(config),
            config.checkpoint.keep,
            [unit.name for unit in units],
            {"seed": config.seed, "steps": config.run.steps},
            self._recorder.event,
        )
        self._server = ControlServer(
            config,
            token,
            target,
            host=host,
            on_record=self._on_record,
            on_event=self._on_event,
            on_shard=self._book.add,
        )
        self._address = self._server.start()
        self._watcher = NodeWatcher(self.submit, config.elastic.drain_deadline_s) if watch_nodes else None
        if self._watcher is not None:
            self._watcher.start()

    def address(self) -> tuple[str, int]:
        """Where workers connect."""
        return self._address

    def pid(self) -> int:
        """Process id on its node."""
        return os.getpid()

    def submit(self, event: dict[str, Any]) -> None:
        """Take an event: drain, worker_lost, node_lost, stop."""
        if not self._closed.is_set():
            self._server.submit(event)

    def status(self) -> dict[str, Any]:
        """State of the run, see `ControlServer.status`."""
        return self._server.status()

    def records_since(self, step: int) -> list[dict[str, Any]]:
        """Records of steps after this one."""
        if self._recorder.last_step <= step:
            return []
        with self._recent_lock:
            recent = list(self._recent)
        if recent and int(recent[0]["step"]) <= step + 1:
            return [record for record in recent if int(record["step"]) > step]
        return [record for record in read_jsonl(self._run_dir / METRICS) if int(record["step"]) > step]

    def close(self) -> None:
        """Complete what was reported and end; the actor can be killed then."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._watcher is not None:
            self._watcher.close()
        self._server.close()
        self._book.close()
        self._recorder.close()

    def _on_record(self, record: dict[str, Any]) -> None:
        written = self._recorder.record(record)
        with self._recent_lock:
            self._recent.extend(written)

    def _on_event(self, event: dict[str, Any]) -> None:
        if event.get("event") == "entered" and event.get("source") in ("checkpoint", "initialisation"):
            self._roll_back_to(int(event["generation"]), max(0, int(event["step"])))
        self._recorder.event(event)

    def _roll_back_to(self, generation: int, step: int) -> None:
        """The state of this generation came from storage: what was recorded after that step did not happen."""
        if generation == self._fell_back:
            return  # members report it one by one, and later ones may come after the first new record
        self._fell_back = generation
        with self._recent_lock:
            self._recent.clear()
        dropped = self._recorder.truncate_after(step)
        self._book.roll_back_to(step)
        if dropped:
            self._recorder.event(
                {"event": "rolled_back", "generation": generation, "step": step, "lost_steps": dropped}
            )
