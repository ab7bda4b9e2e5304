"""Ray Train's worker group, made elastic: workers come and go one by one while the others train.

Stock Ray Train (2.60, v2) starts all workers in one placement group and restarts all of them when one fails. Here every
worker has a slot with a placement group of one bundle. A missing worker therefore blocks nothing, and its pending
placement group is demand that an autoscaler sees. A thread fills each slot. It makes the calls of the stock start-up,
in the same order.

The file uses internals of ray.train.v2, which `tests/ray/test_ray_contract.py` holds. Their source is
ray/train/v2/_internal/execution/worker_group.
"""

from __future__ import annotations

import logging
import threading
import uuid
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.checkpoint.report_handler import ReportCallbackHandler
from ray.train.v2._internal.execution.worker_group import ReplicaGroup, WorkerGroup, WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.train.v2._internal.execution.worker_group.state import (
    WorkerGroupContext,
    WorkerGroupState,
    WorkerGroupStateBuilder,
    _shutdown_workers,
)
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.util import time_monotonic
from ray.util.placement_group import placement_group

READY_POLL_S = 1.0  # a thread that waits for its placement group checks this often whether it was cancelled
HUNG_WORKER_S = 30.0  # an actor without an answer to a health check for so long is dead; its peers gave it up before
MAX_BACKOFF_S = 10.0
UNAVAILABLE_S = 3.0  # an actor that Ray cannot reach for so short a time is not dead; the coordinator may still hear it
RETURN_GRACE_S = 10.0  # a worker whose train function returned is replaced if the run still goes on after so long

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerExit:
    """A worker that is no longer there.

    Attributes:
        worker: the Ray actor's id, which is the id the coordinator knows it by.
        node: Ray node id.
        pid: its process.
        error: what its train function raised or what killed the actor; None when the train function returned.
        died: the process is gone or does not answer, as opposed to a train function that ended.
        value: what its train function returned.
    """

    worker: str
    node: str
    pid: int
    error: BaseException | None = None
    died: bool = False
    value: Any = None


def classify_exit(worker: str, node: str, pid: int, status: WorkerStatus) -> WorkerExit | None:
    """The exit that a health check shows, or None while the worker's train function runs."""
    if status.error is None:
        return None if status.running else WorkerExit(worker, node, pid, value=status.return_value)
    error: BaseException = status.error
    if isinstance(error, UserExceptionWithTraceback):
        return WorkerExit(worker, node, pid, error=error._base_exc)
    if isinstance(error, WorkerHealthCheckFailedError) and error.health_check_failure is not None:
        error = error.health_check_failure
    return WorkerExit(worker, node, pid, error=error, died=True)


def worker_id(worker: Worker) -> str:
    """The id by which the coordinator knows a worker: its actor's id."""
    return worker.actor._actor_id.hex()


class WorkerStart(threading.Thread):
    """One attempt to fill one slot: placement group, actor, train context, train function.

    Attributes:
        placement: the placement group, once it was asked for.
        worker: the running worker, once it runs.
        error: the error that ended the attempt.
    """

    def __init__(self, group: ElasticWorkerGroup, index: int) -> None:
        super().__init__(name=f"worker-start-{index}", daemon=True)
        self._group, self._index = group, index
        self._cancelled = threading.Event()
        self.placement: DefaultPlacementGroupHandle | None = None
        self.worker: Worker | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        group, context = self._group, self._group.get_worker_group_context()
        try:
            name = f"{group.run_id}-{uuid.uuid4().hex}"
            pending = placement_group([group.get_resources_per_worker()], strategy="SPREAD", name=name)
            self.placement = DefaultPlacementGroupHandle(pending)
            while not self._cancelled.is_set() and not pending.wait(READY_POLL_S):
                pass
            if not self._cancelled.is_set():
                (worker,) = group._create_workers(
                    1,
                    pending,
                    context.resources_per_worker,
                    starting_world_rank=self._index,
                    world_size=context.num_workers,
                    replica_group_size=1,
                )
                group._init_train_context([worker], None)  # type: ignore[arg-type] # replica groups have no sync actor
                callbacks: Any = group._replica_group_callbacks
                replica_group = ReplicaGroup([worker], context.resources_per_worker, callbacks)
                replica_group.start_training(context)
                self.worker = worker
        except Exception as error:  # noqa: BLE001 - the group reports it and tries the slot again
            self.error = error
        if self._cancelled.is_set():
            self._release()

    def cancel(self) -> None:
        """Return the placement group to Ray, which also ends an actor on it."""
        self._cancelled.set()
        self._release()

    def _release(self) -> None:
        if self.placement is not None:
            self.placement.shutdown()


@dataclass
class _Slot:
    """Room for one worker: empty, being filled, or with a running worker."""

    start: WorkerStart | None = None
    worker: Worker | None = None
    failures: int = 0
    retry_at_s: float = 0.0


class ElasticWorkerGroup(WorkerGroup):
    """A worker group between none and `num_workers` workers. `num_workers` in its context is the largest size.

    `ray.train.report` is a barrier over a fixed set of ranks, so the callbacks that serve it are left out.

    Attributes:
        run_id: id of the Ray Train run; the names of the placement groups begin with it.
    """

    def __init__(self, train_run_context: Any, worker_group_context: WorkerGroupContext, callbacks: Any = None) -> None:
        kept = [callback for callback in callbacks or [] if not isinstance(callback, ReportCallbackHandler)]
        super().__init__(train_run_context, worker_group_context, kept)
        self.run_id: str = train_run_context.run_id

    def _start_impl(self, worker_group_state_builder: WorkerGroupStateBuilder) -> None:
        self._assert_inactive()
        self._worker_health_check_timeout_s = HUNG_WORKER_S
        self._slots = [_Slot() for _ in range(self._worker_group_context.num_workers)]
        self._ended: list[WorkerExit] = []
        self._unreachable_since_s: dict[str, float] = {}
        self.filling = True
        self.last_start_error: Exception | None = None
        self._worker_group_state = WorkerGroupState(time_monotonic(), None, [], None)  # type: ignore[arg-type]
        self.fill_slots()

    def fill_slots(self) -> None:
        """Accept the workers that have started since, and begin to fill empty slots. Never waits."""
        now_s = time_monotonic()
        for index, slot in enumerate(self._slots):
            if slot.start is not None and slot.worker is None and not slot.start.is_alive():
                self._accept(slot, slot.start, now_s)
            if slot.start is None and self.filling and now_s >= slot.retry_at_s:
                slot.start = WorkerStart(self, index)
                slot.start.start()
        self._set_workers([slot.worker for slot in self._slots if slot.worker is not None])

    def poll_status(self, timeout: float | None = None) -> WorkerGroupPollStatus:
        """Fill slots, poll every worker, and drop those that ended. Callbacks about reports are not called."""
        self._assert_active()
        self.fill_slots()
        workers = self.get_workers()
        results = self._poll_workers_and_collect_errors(timeout) if workers else []
        for worker, result in zip(workers, results, strict=True):
            ended = classify_exit(worker_id(worker), worker.metadata.node_id, worker.metadata.pid, result)
            if ended is None:
                self._unreachable_since_s.pop(worker_id(worker), None)
            elif not self._may_come_back(ended):
                self._drop(worker, ended)
        self._latest_poll_status = WorkerGroupPollStatus(worker_statuses=dict(enumerate(results)))
        return self._latest_poll_status

    def _may_come_back(self, ended: WorkerExit) -> bool:
        if not isinstance(ended.error, ActorUnavailableError):
            return False
        now_s = time_monotonic()
        return now_s - self._unreachable_since_s.setdefault(ended.worker, now_s) < UNAVAILABLE_S

    def take_ended(self) -> list[WorkerExit]:
        """Workers that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def evict(self, worker: str) -> None:
        """Drop a worker that the coordinator has evicted and that has not ended by itself."""
        for member in self.get_workers():
            if worker_id(member) == worker:
                error = RuntimeError("evicted by the coordinator")
                self._drop(member, WorkerExit(worker, member.metadata.node_id, member.metadata.pid, error, died=True))

    def progressed(self) -> None:
        """The run made a step: slots that failed before may be filled again at once."""
        for slot in self._slots:
            slot.failures = 0

    def shutdown(self) -> None:
        """End every worker and return every placement group to Ray."""
        self._assert_active()
        self.filling = False
        workers = self.get_workers()
        if workers:
            _shutdown_workers(workers)
        for slot in self._slots:
            if slot.start is not None:
                slot.start.cancel()
        self._clear_state()

    def abort(self) -> None:
        self.shutdown()

    def _accept(self, slot: _Slot, start: WorkerStart, now_s: float) -> None:
        if start.worker is not None:
            slot.worker = start.worker
            meta = start.worker.metadata
            logger.info("worker %s runs on node %s, pid %d", worker_id(start.worker)[:8], meta.node_id[:8], meta.pid)
            return
        self.last_start_error = start.error
        logger.warning("a worker did not start: %s", start.error)
        start.cancel()
        self._empty(slot, now_s, failed=True)

    def _drop(self, worker: Worker, ended: WorkerExit) -> None:
        slot = next(slot for slot in self._slots if slot.worker is worker)
        ray.kill(worker.actor)
        assert slot.start is not None
        slot.start.cancel()
        self._empty(slot, time_monotonic(), failed=ended.error is not None and not ended.died)
        if ended.error is None and not (isinstance(ended.value, dict) and ended.value.get("ended") == "released"):
            slot.retry_at_s = time_monotonic() + RETURN_GRACE_S
        self._ended.append(ended)
        self._set_workers([member for member in self.get_workers() if member is not worker])

    def _empty(self, slot: _Slot, now_s: float, failed: bool) -> None:
        slot.start = slot.worker = None
        slot.failures = slot.failures + 1 if failed else 0
        slot.retry_at_s = now_s + (min(MAX_BACKOFF_S, 0.5 * 2**slot.failures) if failed else 0.0)

    def _set_workers(self, workers: list[Worker]) -> None:
        """Replace the list of workers. Pending health checks are keyed by position, so their keys change too."""
        state = self._worker_group_state
        assert state is not None
        pending = {id(state.workers[i]): task for i, task in self._world_rank_to_ongoing_poll.items()}
        self._worker_group_state = replace(state, workers=workers)
        self._world_rank_to_ongoing_poll = {
            i: pending[id(worker)] for i, worker in enumerate(workers) if id(worker) in pending
        }
