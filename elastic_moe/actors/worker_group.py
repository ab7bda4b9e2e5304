"""Ray Train's worker group, made elastic: workers come and go one by one while the others train.

Stock Ray Train (2.60, v2) starts all workers in one placement group and restarts all of them when one fails. Here every
worker has a slot with a placement group of one bundle. A missing worker therefore blocks nothing, and its pending
placement group is demand that an autoscaler sees. A thread fills each slot. It makes the calls of the stock start-up,
in the same order. Workers are detached (`actors/kept.py`), so a group finds those of a group whose controller has died.

The file uses internals of ray.train.v2, which `tests/ray/test_ray_contract.py` holds. Their source is
ray/train/v2/_internal/execution/worker_group.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.checkpoint.report_handler import ReportCallbackHandler
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.train.v2._internal.execution.worker_group.state import (
    WorkerGroupState,
    WorkerGroupStateBuilder,
    _shutdown_workers,
)
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.util import time_monotonic
from ray.util.placement_group import remove_placement_group

from elastic_moe.actors.kept import end_actor, placements, worker_names
from elastic_moe.actors.worker_start import WorkerStart, running_workers

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

    Args:
        coordinator: name of the coordinator actor; the names of workers and placement groups begin with it.
        **stock: the arguments of `WorkerGroup`.

    Attributes:
        limit: so many slots at most are filled.
    """

    def __init__(self, *, coordinator: str, callbacks: Any = None, **stock: Any) -> None:
        kept = [callback for callback in callbacks or [] if not isinstance(callback, ReportCallbackHandler)]
        super().__init__(callbacks=kept, **stock)
        self.coordinator, self.limit = coordinator, self._worker_group_context.num_workers

    def _start_impl(self, worker_group_state_builder: WorkerGroupStateBuilder) -> None:
        self._assert_inactive()
        self._worker_health_check_timeout_s = HUNG_WORKER_S
        self._slots = [_Slot() for _ in range(self._worker_group_context.num_workers)]
        self._ended: list[WorkerExit] = []
        self._unreachable_since_s: dict[str, float] = {}
        self.filling = True
        self.last_start_error: Exception | None = None
        self._worker_group_state = WorkerGroupState(time_monotonic(), None, [], None)  # type: ignore[arg-type]
        self._adopt()
        self.fill_slots()

    def _adopt(self) -> None:
        """Take over the workers that train already: their controller has died. What else it left is returned to Ray."""
        names, room = worker_names(self.coordinator), placements(self.coordinator)
        trains = running_workers(names, self.get_resources_per_worker(), HUNG_WORKER_S)
        slots = iter(enumerate(self._slots))
        for name, worker in trains.items():
            if name not in room or (found := next(slots, None)) is None:
                continue
            index, slot = found
            slot.start = WorkerStart(self, self.coordinator, index)
            slot.worker = slot.start.adopt(worker, room.pop(name))
            names.remove(name)
        for name in names:
            end_actor(name)
        for placement in room.values():
            remove_placement_group(placement)
        if taken := sum(slot.worker is not None for slot in self._slots):
            logger.info("%d workers of a controller that died train on", taken)

    def fill_slots(self) -> None:
        """Accept the workers that have started since, and begin to fill empty slots. Never waits.

        Once nothing is to be filled, workers that are being started are given up.
        """
        now_s = time_monotonic()
        surplus = sum(slot.start is not None for slot in self._slots) - (self.limit if self.filling else 0)
        for index, slot in enumerate(self._slots):
            if surplus > 0 and slot.start is not None and slot.start.worker is None:
                slot.start.cancel()  # its demand is withdrawn; a worker that runs is drained by the coordinator
                slot.start, surplus = None, surplus - 1
            if slot.start is not None and slot.worker is None and not slot.start.is_alive():
                self._accept(slot, slot.start, now_s)
            if slot.start is None and self.filling and surplus < 0 and now_s >= slot.retry_at_s:
                slot.start = WorkerStart(self, self.coordinator, index)
                slot.start.start()
                surplus += 1
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


@dataclass(frozen=True)
class ElasticWorkerGroups:
    """Makes the worker groups of one run, as the class `WorkerGroup` makes stock ones.

    Attributes:
        coordinator: name of the run's coordinator actor.
        limit: so many slots at most are filled, until the coordinator tells another number; 0: all.
    """

    coordinator: str
    limit: int = 0

    def create(self, **stock: Any) -> ElasticWorkerGroup:
        """A group that has been started; see `WorkerGroup.create`."""
        group = ElasticWorkerGroup(coordinator=self.coordinator, **stock)
        group.limit = self.limit or group.limit
        group._start()
        return group
