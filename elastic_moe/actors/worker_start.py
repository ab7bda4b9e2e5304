"""The start of one worker of a group, and those that another group has started.

The calls are those of the stock start-up (ray/train/v2/_internal/execution/worker_group/worker_group.py), in the same
order, but the actor and its placement group are detached.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.constants import V2_ENABLED_ENV_VAR, get_env_vars_to_propagate
from ray.train.v2._internal.execution.worker_group import ReplicaGroup, WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.util import bundle_to_remote_args, time_monotonic
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from elastic_moe.actors.kept import new_name
from elastic_moe.actors.link import NAMESPACE
from elastic_moe.actors.worker import ElasticWorker
from elastic_moe.errors import reason_of

READY_POLL_S = 1.0  # a thread that waits for its placement group checks this often whether it was cancelled

logger = logging.getLogger(__name__)


class WorkerStart(threading.Thread):
    """One attempt to fill one slot: placement group, actor, train context, train function.

    Args:
        group: whose slot it is.
        coordinator: name of the run's coordinator actor.
        index: number of the slot.

    Attributes:
        placement: the placement group, once it was asked for.
        worker: the running worker, once it runs.
        error: the error that ended the attempt.
    """

    def __init__(self, group: WorkerGroup, coordinator: str, index: int) -> None:
        super().__init__(name=f"worker-start-{index}", daemon=True)
        self._group, self._coordinator, self._index = group, coordinator, index
        self._cancelled = threading.Event()
        self.placement: DefaultPlacementGroupHandle | None = None
        self.worker: Worker | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        group, context = self._group, self._group.get_worker_group_context()
        try:
            name = new_name(self._coordinator)
            resources = group.get_resources_per_worker()
            pending = placement_group([resources], strategy="SPREAD", name=name, lifetime="detached")
            self.placement = DefaultPlacementGroupHandle(pending)
            while not self._cancelled.is_set() and not pending.wait(READY_POLL_S):
                pass
            if not self._cancelled.is_set():
                worker = self._ranked(_create(group, name, pending))
                group._init_train_context([worker], None)  # type: ignore[arg-type] # replica groups have no sync actor
                callbacks: Any = group._replica_group_callbacks
                replica_group = ReplicaGroup([worker], context.resources_per_worker, callbacks)
                replica_group.start_training(context)
                self.worker = worker
        except Exception as error:  # noqa: BLE001 - the group reports it and tries the slot again
            self.error = error
        if self._cancelled.is_set():
            self._release()

    def adopt(self, worker: Worker, placement: PlacementGroup) -> Worker:
        """Be the start of a worker that another group has started; the thread never runs. Returns the worker."""
        self.worker, self.placement = self._ranked(worker), DefaultPlacementGroupHandle(placement)
        return self.worker

    def cancel(self) -> None:
        """Return the placement group to Ray, which also ends an actor on it."""
        self._cancelled.set()
        self._release()

    def _ranked(self, worker: Worker) -> Worker:
        """The worker with the rank that Ray Train knows it by."""
        size = self._group.get_worker_group_context().num_workers
        (ranked,) = WorkerGroup._assign_worker_ranks([worker], self._index, world_size=size, replica_group_size=1)
        return ranked

    def _release(self) -> None:
        if self.placement is not None:
            self.placement.shutdown()


def running_workers(names: Sequence[str], resources: dict[str, float], patience_s: float) -> dict[str, Worker]:
    """Those of these actors whose train function runs, by name. Who does not answer in time counts as hung."""
    actors: dict[str, Any] = {}
    for name in names:
        with suppress(ValueError, RayError):  # it ended in the meantime
            actors[name] = ray.get_actor(name, namespace=NAMESPACE)
    asked = {name: (actor.get_metadata.remote(), actor.poll_status.remote()) for name, actor in actors.items()}
    deadline_s, found = time_monotonic() + patience_s, {}
    for name, questions in asked.items():
        try:
            metadata, status = ray.get(list(questions), timeout=max(0.0, deadline_s - time_monotonic()))
        except (RayError, TimeoutError) as error:
            logger.warning("worker %s is not taken over: %s", name, reason_of(error))
            continue
        if status.running:
            found[name] = Worker(actors[name], metadata, resources, placement_group_bundle_index=0)
    return found


def own_environment(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The option `runtime_env` of an actor with this environment and the variables of Ray Train that the user has set.

    Without any there is no option, so that Ray takes a process that it has started in advance. The stock start-up names
    one variable always, and each actor then waits for a process of its own.
    """
    given = {name: value for name, value in get_env_vars_to_propagate().items() if name != V2_ENABLED_ENV_VAR}
    env_vars = given | dict(wanted.get("env_vars", {}))
    environment = dict(wanted) | ({"env_vars": env_vars} if env_vars else {})
    return {"runtime_env": environment} if environment else {}


def _create(group: WorkerGroup, name: str, placement: PlacementGroup) -> Worker:
    """Start the actor of one worker. The stock `_create_workers` makes one that its controller owns.

    Raises:
        RayError: it did not start.
    """
    resources = group.get_resources_per_worker()
    actor_cls: Any = ray.remote(
        **own_environment(group._train_run_context.run_config.worker_runtime_env or {}),
        **bundle_to_remote_args(resources),
    )(ElasticWorker)
    strategy = PlacementGroupSchedulingStrategy(placement_group=placement, placement_group_bundle_index=0)
    actor = actor_cls.options(name=name, namespace=NAMESPACE, lifetime="detached", scheduling_strategy=strategy).remote(
        time.time()
    )
    try:
        return Worker(actor, ray.get(actor.get_metadata.remote()), resources, placement_group_bundle_index=0)
    except RayError:
        ray.kill(actor)
        raise
