"""Tells Ray's dashboard of a run: its name, its state, and all its workers, also those that join later or die.

Stock Ray Train tells of a worker group once, when all its workers have started (`StateManagerCallback`,
ray/train/v2/_internal/state). Here workers come and go one by one, so the list is told again whenever it changes. A run
keeps its id over controllers and drivers: what goes on after one of them is another attempt of the same run.

Ray Train keeps these states in an actor on the head node. A thread makes all calls to it: where that actor does not
start or does not answer, the run goes on and is not shown.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray._common.utils import env_bool
from ray._private.worker import get_dashboard_url
from ray.train.constants import RAY_TRAIN_ENABLE_STATE_TRACKING
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback  # pyright: ignore[reportPrivateImportUsage]
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller.state import ErroredState, TrainControllerState
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.state.schema import ActorStatus, RunStatus, TrainResources, TrainWorker
from ray.train.v2._internal.state.util import update_train_run_attempt_aborted

ANSWER_S = 10.0
LAST_S = 5.0  # the end of a run waits at most so long until it is told
MAX_JOBS = 1000  # that wait for the thread; beyond that nothing more is told
MAX_DEAD = 100  # dead workers that an attempt shows, the newest
TAKEN_OVER = "Its controller has died, or its driver: the run goes on in a later attempt."
RUNS = "running"

logger = logging.getLogger(__name__)


def wanted() -> bool:
    """Whether runs are told: as RAY_TRAIN_ENABLE_STATE_TRACKING says, else where there is a dashboard."""
    if os.environ.get(RAY_TRAIN_ENABLE_STATE_TRACKING):
        return env_bool(RAY_TRAIN_ENABLE_STATE_TRACKING, True)
    return bool(get_dashboard_url())


class ShownRun(ControllerCallback):
    """Tells Ray Train's state actor of one controller's part of a run. No method waits or raises."""

    def __init__(self) -> None:
        self._stock = StateManagerCallback(datasets={})
        self._run = self._attempt = ""
        self._known: Any = None  # what was told last
        self._workers: dict[str, TrainWorker] = {}  # by actor, in the order in which they came
        self._jobs: queue.Queue[Callable[[], None] | None] | None = None
        self._thread: threading.Thread | None = None

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """The controller runs: only here, for the callback was made on the driver."""
        self._run, self._jobs = train_run_context.run_id, queue.Queue(MAX_JOBS)
        self._thread = threading.Thread(target=self._tell, name="train-state", daemon=True)
        self._thread.start()
        self._later(lambda: self._begin(train_run_context))

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        self._later(lambda: self._stock.after_controller_state_update(previous_state, current_state))
        if current_state.is_terminal():
            self._later(lambda: self._end(current_state))
            self._later(None)
            if self._thread is not None:
                self._thread.join(LAST_S)

    def show(self, attempt: str, workers: Sequence[Worker], largest: int, status: Mapping[str, Any]) -> None:
        """Tell which workers run, and what the run waits for, if that has changed.

        Args:
            attempt: id of the controller's attempt.
            workers: that run now.
            largest: number of workers.
            status: of the coordinator.
        """
        phase, reason = str(status.get("phase") or ""), str(status.get("reason") or "")
        waits = reason if phase and phase != RUNS else ""
        known = (attempt, tuple(worker.actor._actor_id.hex() for worker in workers), waits)
        if known != self._known:
            self._known = known
            self._later(lambda: self._update(attempt, list(workers), largest, waits))

    # --- the thread ---

    def _tell(self) -> None:
        assert self._jobs is not None
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # noqa: BLE001 - the thread's loop: a run does not need to be shown
                logger.warning("Ray's dashboard does not show the run as it is: %s: %s", type(error).__name__, error)

    def _begin(self, context: TrainRunContext) -> None:
        self._stock.after_controller_start(context)
        manager = self._stock._state_manager
        known: Any = ray.get(manager._state_actor.get_train_run_attempts.remote(), timeout=ANSWER_S)
        for attempt in known.get(self._run, {}).values():
            if not attempt.status.is_terminal():
                update_train_run_attempt_aborted(attempt, graceful=False)
                attempt.status_detail = TAKEN_OVER
                manager._create_or_update_train_run_attempt(attempt)

    def _update(self, attempt: str, workers: Sequence[Worker], largest: int, waits: str) -> None:
        manager = self._stock._state_manager
        if attempt != self._attempt:
            self._attempt, self._workers = attempt, {}
            resources = workers[0].resources if workers else {}
            manager.create_train_run_attempt(self._run, attempt, largest, resources)
        here = {shown.actor_id: shown for shown in map(_shown, workers)}
        dead = [shown for actor, shown in self._workers.items() if actor not in here][-MAX_DEAD:]
        for shown in dead:
            shown.status = ActorStatus.DEAD
        self._workers = {shown.actor_id: shown for shown in (*dead, *here.values())}
        manager.update_train_run_attempt_running(self._run, attempt, [])
        entry = manager._run_attempts[self._run][attempt]
        entry.workers = sorted(self._workers.values(), key=lambda shown: (shown.world_rank, shown.actor_id in here))
        entry.resources = [shown.resources for shown in entry.workers]
        manager._create_or_update_train_run_attempt(entry)
        run = manager._runs[self._run]
        run.status, run.status_detail = (RunStatus.SCHEDULING, waits) if waits else (RunStatus.RUNNING, None)
        manager._create_or_update_train_run(run)

    def _end(self, state: TrainControllerState) -> None:
        manager = self._stock._state_manager
        if not self._attempt:
            return
        if isinstance(state, ErroredState):
            manager.update_train_run_attempt_errored(self._run, self._attempt, str(state.training_failed_error))
        else:
            manager.update_train_run_attempt_finished(self._run, self._attempt)

    def _later(self, job: Callable[[], None] | None) -> None:
        if self._jobs is not None and not self._jobs.full():
            self._jobs.put_nowait(job)


def _shown(worker: Worker) -> TrainWorker:
    """A worker as Ray Train shows it. Its rank is the number of its slot: one that takes its place has the same."""
    context, metadata = worker.distributed_context, worker.metadata
    assert context is not None, "a worker that runs has a rank"
    return TrainWorker(
        world_rank=context.world_rank,
        local_rank=context.local_rank,
        node_rank=context.node_rank,
        actor_id=worker.actor._actor_id.hex(),
        node_id=metadata.node_id,
        node_ip=metadata.node_ip,
        pid=metadata.pid,
        gpu_ids=[int(gpu) for gpu in metadata.gpu_ids],
        status=ActorStatus.ALIVE,
        resources=TrainResources(resources=worker.resources),
        log_file_path=worker.log_file_path,
    )
