"""Ray Train's trainer and controller, made elastic: the run goes on with whoever is there.

Stock Ray Train (2.60, v2) restarts the whole worker group when one worker fails or one more could be had. That takes
about 14 s for a death and 77 s for a lost node. `ElasticController` keeps the group, drops dead workers and fills empty
slots. The coordinator actor decides everything about the training itself, also when the run is over.

The file uses internals of ray.train.v2, which `tests/ray/test_ray_contract.py` holds. Their source is
ray/train/v2/_internal/execution/controller.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._private.state import actors
from ray.exceptions import AsyncioActorExit
from ray.train import BackendConfig, Result
from ray.train.backend import Backend
from ray.train.v2._internal.callbacks import DatasetsCallback, WorkingDirectorySetupCallback
from ray.train.v2._internal.callbacks.metrics import ControllerMetricsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback  # pyright: ignore[reportPrivateImportUsage]
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.controller import TrainControllerLoopIterationResult
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    FinishedState,
    RunningState,
    ShuttingDownState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.metrics.base import EnumMetric
from ray.train.v2._internal.util import time_monotonic
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from elastic_moe.actors.link import CoordinatorLink, TrainNames, this_node
from elastic_moe.actors.train_state import ShownRun
from elastic_moe.actors.train_state import wanted as is_shown
from elastic_moe.actors.worker_group import ElasticWorkerGroup, ElasticWorkerGroups, WorkerExit, worker_id
from elastic_moe.actors.worker_start import own_environment
from elastic_moe.errors import Diverged, Evicted, UserError, reason_of

POLL_S = 0.5  # between two polls of the workers; the coordinator hears of a death earlier, by the closed connection
END_GRACE_S = 60.0  # after the end of the run, train functions are waited for so long
EVICTED_GRACE_S = 10.0  # an evicted worker that has not ended by itself is killed after so long
COORDINATOR_SILENT_S = 300.0
UNWATCHED = "it ended while the run had no Ray Train controller"
ASK_AGAIN_S = 5.0  # a coordinator that was just lost may not have heard that the run is given up
NOT_USED = (DatasetsCallback, WorkingDirectorySetupCallback, PlacementGroupCleanerCallback, StateManagerCallback)

logger = logging.getLogger(__name__)


class ElasticBackend(Backend):
    """Sets up no process group: workers form their own. With replica groups Ray Train starts no preemption watcher."""

    has_replica_groups = True


class ElasticBackendConfig(BackendConfig):
    """Names `ElasticBackend`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return ElasticBackend


class RoomOnDemand(FixedScalingPolicy):
    """Asks the autoscaler for nothing: the pending placement groups of the slots are the demand.

    The stock policy starts an actor for its request and waits for it, up to 5 s. And its request is for the largest
    number of workers, whatever the run's limit is.
    """

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        del train_run_context

    def _maybe_send_resource_request(self) -> None:
        pass


class ElasticController(TrainController):
    """Runs the worker group until the coordinator says that the run has finished or failed.

    An error that ends the run is handed to the coordinator first, so that the members save their state.

    Args:
        coordinator: name of the coordinator actor.
        last_save_s: the members get at most so long for that.
        first_limit: workers to begin with at most; 0: as many as there are slots.
        **stock: the arguments of `TrainController`.
    """

    def __init__(self, *, coordinator: str, last_save_s: float, first_limit: int = 0, **stock: Any) -> None:
        os.environ.setdefault(RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR, "0")  # the links poll, and do not wait
        self._link, self._last_save_s = CoordinatorLink(coordinator), last_save_s
        self._error: TrainingFailedError | None = None  # the first one that ends the run
        self._error_since_s = self._ask_s = 0.0
        self._step_seen = -1
        self._raised = 0  # train functions that raised since the last committed step
        self._over_since_s: float | None = None
        self._evicted_since_s: dict[str, float] = {}
        self._unknown: set[str] = set()  # members that are not of the group, at the last look
        self._shown = [callback for callback in stock.get("callbacks") or () if isinstance(callback, ShownRun)]
        self.worker_group_cls: Any = ElasticWorkerGroups(coordinator, first_limit)
        super().__init__(**stock)
        self._health_check_interval_s = POLL_S

    async def _step(self) -> TrainControllerLoopIterationResult:
        state = self.get_state()
        if not isinstance(state, RunningState):
            return await super()._step()
        group = self._worker_group
        assert isinstance(group, ElasticWorkerGroup)
        status = self._link.poll()
        group.limit = status.get("limit") or group.limit
        try:
            error = await self._supervise(group, status)
        except AsyncioActorExit:
            raise
        except Exception as fault:  # noqa: BLE001 - of this controller: it ends the run, whose members live
            error = fault if isinstance(fault, TrainingFailedError) else ControllerError(fault)
        if error is not None and self._error is None:
            logger.error("the run is given up once its members have saved their state: %s", error)
            self._error, self._error_since_s, group.filling = error, time_monotonic(), False
        if self._error is not None and time_monotonic() >= self._ask_s:
            self._ask_s = time_monotonic() + ASK_AGAIN_S
            self._link.submit({"event": "fail", "reason": reason_of(self._error)})
        for shown in self._shown:
            largest = group.get_worker_group_context().num_workers
            shown.show(self._get_run_attempt_id(), group.get_workers(), largest, status)
        self._repeat_metrics()
        next_state = self._next_state(group, status)
        return TrainControllerLoopIterationResult(
            run_attempt_id=self._get_run_attempt_id(),
            previous_state=state,
            next_state=next_state,
            training_failed_error=None if isinstance(next_state, RunningState) else self._error,
        )

    async def _supervise(self, group: ElasticWorkerGroup, status: dict[str, Any]) -> TrainingFailedError | None:
        """Look after the workers once. Returns an error that ends the run."""
        await self._poll_workers()
        if status.get("step", -1) != self._step_seen:
            self._step_seen, self._raised = status.get("step", -1), 0
            group.progressed()
        failure = self._report_ended(group) or self._failure(group, status)
        self._report_unknown(group, status)
        self._kill_evicted(group, status)
        return failure

    def _repeat_metrics(self) -> None:
        """Tell Prometheus Ray Train's state of this controller again: Ray forgets a gauge that is set only once."""
        for callback in self._callbacks:
            if isinstance(callback, ControllerMetricsCallback):
                for metric in callback._metrics.values():
                    if isinstance(metric, EnumMetric) and (state := metric._current_value) is not None:
                        metric._gauge.set(metric.RECORDED_VALUE, metric._get_tags(state))

    def _next_state(self, group: ElasticWorkerGroup, status: dict[str, Any]) -> TrainControllerState:
        if self._error is not None:
            over = status.get("phase") in ("failed", "finished")
            if not over and time_monotonic() - self._error_since_s < self._last_save_s:
                return RunningState()
            return ShuttingDownState(next_state=ErroredState(training_failed_error=self._error))
        if status.get("phase") != "finished":
            return RunningState()
        if self._over_since_s is None:
            self._over_since_s = time_monotonic()
            group.filling = False
        if len(group) and time_monotonic() - self._over_since_s < END_GRACE_S:
            return RunningState()
        return ShuttingDownState(next_state=FinishedState())

    def _report_ended(self, group: ElasticWorkerGroup) -> TrainingFailedError | None:
        """Report ended workers to the coordinator. Returns the first error that ends the run."""
        failure: TrainingFailedError | None = None
        for ended in group.take_ended():
            if ended.error is None:
                self._return_value = ended.value
                continue
            logger.warning("worker %s on node %s ended: %r", ended.worker[:8], ended.node[:8], ended.error)
            self._link.submit(
                {
                    "event": "worker_lost",
                    "worker": ended.worker,
                    "node": ended.node,
                    "pid": ended.pid,
                    "reason": f"{type(ended.error).__name__}: {ended.error}".splitlines()[0],
                }
            )
            if isinstance(ended.error, UserError | Diverged):
                failure = failure or _as_failure(ended)
            elif not ended.died and not isinstance(ended.error, Evicted):
                self._raised += 1
                if self._raised >= max(6, 3 * group.get_worker_group_context().num_workers):
                    failure = failure or _as_failure(ended)  # of the program: every replacement would end the same way
        return failure

    def _report_unknown(self, group: ElasticWorkerGroup, status: dict[str, Any]) -> None:
        """Report members that ended while there was no controller: the coordinator only knows that they are silent."""
        members = {member[0]: member for member in status.get("members", ())}
        unknown = members.keys() - {worker_id(worker) for worker in group.get_workers()}
        for worker in unknown & self._unknown:  # a new worker is a member before it is of the group
            if actors(worker).get("State") == "DEAD":
                _, node, pid = members[worker][:3]
                self._link.submit(
                    {"event": "worker_lost", "worker": worker, "node": node, "pid": pid, "reason": UNWATCHED}
                )
        self._unknown = unknown

    def _failure(self, group: ElasticWorkerGroup, status: dict[str, Any]) -> TrainingFailedError | None:
        if status.get("phase") == "failed":
            return ControllerError(RuntimeError(status.get("reason") or "the coordinator gave the run up"))
        if self._link.silent_s > COORDINATOR_SILENT_S:
            return ControllerError(RuntimeError(f"no answer from the coordinator for {COORDINATOR_SILENT_S:.0f} s"))
        return None

    def _kill_evicted(self, group: ElasticWorkerGroup, status: dict[str, Any]) -> None:
        """End evicted workers that cannot end themselves: a stopped or deadlocked process would keep its slot."""
        now_s = time_monotonic()
        for worker in status.get("evicted", ()):
            if now_s - self._evicted_since_s.setdefault(worker, now_s) > EVICTED_GRACE_S:
                group.evict(worker)


def _as_failure(ended: WorkerExit) -> TrainingFailedError:
    assert isinstance(ended.error, Exception)
    return WorkerGroupError(f"worker {ended.worker} on node {ended.node}: {ended.error!r}", {0: ended.error})


class ElasticTrainer(DataParallelTrainer):
    """A `DataParallelTrainer` between one worker and `scaling_config.num_workers` workers.

    Args:
        train_loop_per_worker: see `DataParallelTrainer`.
        coordinator: name of the coordinator actor, which decides when the run is over.
        names: of the run in Ray Train.
        last_save_s: when the run fails, its members get at most so long to save their state.
        first_limit: workers to begin with at most; 0: no limit.
        **stock: the arguments of `DataParallelTrainer`.
    """

    def __init__(
        self,
        train_loop_per_worker: Any,
        *,
        coordinator: str,
        names: TrainNames,
        last_save_s: float,
        first_limit: int = 0,
        **stock: Any,
    ) -> None:
        self._ours = {"coordinator": coordinator, "last_save_s": last_save_s, "first_limit": first_limit}
        self.controller: Any = None  # the actor, once it was started
        super().__init__(train_loop_per_worker, backend_config=ElasticBackendConfig(), **stock)
        object.__setattr__(self.train_run_context, "run_id", names.id)  # frozen, and made anew for each trainer

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        used = [callback for callback in super()._create_default_callbacks() if not isinstance(callback, NOT_USED)]
        return [*used, ShownRun()] if is_shown() else used

    def _initialize_and_run_controller(self, **controller_init_kwargs: Any) -> Result:
        controller_cls = ray.remote(num_cpus=0, label_selector=this_node(), **own_environment({}))(ElasticController)
        controller_init_kwargs["scaling_policy"] = RoomOnDemand(self.scaling_config)
        self.controller = controller_cls.remote(**self._ours, **controller_init_kwargs)
        ray.get(self.controller.run.remote())
        return ray.get(self.controller.get_result.remote())
