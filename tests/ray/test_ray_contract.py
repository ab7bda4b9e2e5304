"""Holds the internals of Ray that `elastic_moe.actors` builds on: another version of Ray must fail here, by name."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._private.accelerators import RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._raylet import RAY_NODE_ID_KEY
from ray.core.generated import autoscaler_pb2
from ray.train.v2._internal.callbacks import DatasetsCallback, WorkingDirectorySetupCallback
from ray.train.v2._internal.callbacks.metrics import ControllerMetricsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.controller import TrainControllerLoopIterationResult
from ray.train.v2._internal.execution.controller.state import ErroredState, ShuttingDownState
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import ReplicaGroup, WorkerGroup
from ray.train.v2._internal.execution.worker_group.poll import PollTask, WorkerGroupPollStatus, WorkerStatus
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupContext, WorkerGroupState, _shutdown_workers
from ray.train.v2._internal.execution.worker_group.worker import ActorMetadata, RayTrainWorker, Worker
from ray.train.v2._internal.metrics.base import RUN_ID_TAG_KEY, RUN_NAME_TAG_KEY, EnumMetric
from ray.train.v2._internal.metrics.controller import ControllerMetrics
from ray.train.v2._internal.metrics.worker import WORKER_ACTOR_ID_TAG_KEY, WORKER_WORLD_RANK_TAG_KEY
from ray.train.v2._internal.state.state_manager import TrainStateManager
from ray.train.v2._internal.util import bundle_to_remote_args
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.util.metrics import Metric
from ray.util.placement_group import PlacementGroup

from elastic_moe.actors.controller import NOT_USED
from elastic_moe.actors.own_node import GCS_FLAG, NODE_FLAG, REASON
from elastic_moe.metrics.exported import ACTOR, RANK, RUN_ID, RUN_NAME
from scripts.grafana import CONTROLLER, STATE

SIGNATURES: list[tuple[Callable[..., Any], list[str]]] = [
    (TrainController._step, ["self"]),
    (TrainController._poll_workers, ["self"]),
    (TrainController._start_worker_group, ["self", "num_workers", "resources_per_worker"]),
    (TrainController._shutdown_worker_group, ["self"]),
    (TrainController.get_state, ["self"]),
    (TrainController.run, ["self"]),
    (TrainController.get_result, ["self"]),
    (
        TrainController.__init__,
        [
            "self",
            "train_fn_ref",
            "train_run_context",
            "scaling_policy",
            "failure_policy",
            "callbacks",
            "validation_config",
        ],
    ),
    (WorkerGroup.create, ["train_run_context", "worker_group_context", "callbacks"]),
    (WorkerGroup._start_impl, ["self", "worker_group_state_builder"]),
    (
        WorkerGroup._create_workers,
        [
            "self",
            "num_workers",
            "placement_group",
            "resources_per_worker",
            "placement_group_bundle_indices",
            "starting_world_rank",
            "world_size",
            "replica_group_size",
        ],
    ),
    (WorkerGroup._start, ["self"]),
    (WorkerGroup._get_worker_runtime_env, ["custom_runtime_env"]),
    (WorkerGroup._assign_worker_ranks, ["workers", "starting_world_rank", "world_size", "replica_group_size"]),
    (bundle_to_remote_args, ["bundle"]),
    (WorkerGroup._init_train_context, ["self", "workers", "sync_actor"]),
    (WorkerGroup._poll_workers_and_collect_errors, ["self", "timeout"]),
    (WorkerGroup.poll_status, ["self", "timeout"]),
    (WorkerGroup._clear_state, ["self"]),
    (ReplicaGroup.__init__, ["self", "workers", "resources_per_worker", "callbacks"]),
    (ReplicaGroup.start_training, ["self", "worker_group_context"]),
    (RayTrainWorker.__init__, ["self"]),
    (RayTrainWorker.get_metadata, ["self"]),
    (RayTrainWorker.run_train_fn, ["self", "train_fn_ref"]),
    (RayTrainWorker.poll_status, ["self"]),
    (_shutdown_workers, ["workers", "patience_s"]),
    (DataParallelTrainer._initialize_and_run_controller, ["self", "controller_init_kwargs"]),
    (DataParallelTrainer._create_default_callbacks, ["self"]),
    (StateManagerCallback.after_controller_start, ["self", "train_run_context"]),
    (StateManagerCallback.after_controller_state_update, ["self", "previous_state", "current_state"]),
    (
        TrainStateManager.create_train_run_attempt,
        ["self", "run_id", "attempt_id", "num_workers", "resources_per_worker"],
    ),
    (TrainStateManager.update_train_run_attempt_running, ["self", "run_id", "attempt_id", "workers"]),
    (TrainStateManager.update_train_run_attempt_finished, ["self", "run_id", "attempt_id"]),
    (TrainStateManager.update_train_run_attempt_errored, ["self", "run_id", "attempt_id", "status_detail"]),
    (TrainStateManager._create_or_update_train_run, ["self", "run", "block"]),
    (TrainStateManager._create_or_update_train_run_attempt, ["self", "run_attempt", "block"]),
    (Metric._record, ["self", "value", "tags"]),
    (EnumMetric._get_tags, ["self", "enum_value"]),
    (ControllerError.__init__, ["self", "controller_failure"]),
    (WorkerGroupError.__init__, ["self", "error_message", "worker_failures"]),
]

FIELDS: list[tuple[type, list[str]]] = [
    (WorkerGroupState, ["start_time", "placement_group_handle", "workers", "sync_actor"]),
    (
        WorkerGroupContext,
        [
            "run_attempt_id",
            "train_fn_ref",
            "num_workers",
            "resources_per_worker",
            "placement_strategy",
            "label_selector",
            "num_slices",
        ],
    ),
    (WorkerGroupPollStatus, ["worker_statuses", "worker_rank_to_replica_group_rank"]),
    (WorkerStatus, ["running", "error", "training_report", "return_value", "preemption_info"]),
    (PollTask, ["start_time", "task"]),
    (
        TrainRunContext,
        ["run_id", "run_config", "train_loop_config", "scaling_config", "backend_config", "dataset_config"],
    ),
    (ActorMetadata, ["hostname", "node_id", "node_ip", "pid", "accelerator_ids"]),
    (
        TrainControllerLoopIterationResult,
        ["run_attempt_id", "previous_state", "next_state", "training_failed_error"],
    ),
]


def test_version() -> None:
    assert ray.__version__ == "2.60.0", "read the sources named in actors/worker_group.py again, then move the pin"


@pytest.mark.parametrize(("function", "names"), SIGNATURES, ids=lambda value: getattr(value, "__qualname__", ""))
def test_signatures(function: Callable[..., Any], names: list[str]) -> None:
    # Ray adds a tracing argument to methods of a class that was made an actor in this process
    assert [name for name in inspect.signature(function).parameters if name != "_ray_trace_ctx"] == names


@pytest.mark.parametrize(("cls", "names"), FIELDS, ids=lambda value: getattr(value, "__name__", ""))
def test_fields(cls: type, names: list[str]) -> None:
    assert [field.name for field in dataclasses.fields(cls)] == names


def test_attributes_that_are_set_in_init() -> None:
    group = inspect.getsource(WorkerGroup.__init__)
    for name in (
        "_worker_group_state",
        "_world_rank_to_ongoing_poll",
        "_latest_poll_status",
        "_worker_health_check_timeout_s",
        "_replica_group_callbacks",
        "_worker_group_context",
    ):
        assert f"self.{name}" in group, name
    controller = inspect.getsource(TrainController.__init__)
    for name in ("_health_check_interval_s", "_worker_group", "_return_value", "_manages_replica_groups"):
        assert f"self.{name}" in controller, name
    assert TrainController.worker_group_cls is WorkerGroup
    assert "worker_group_cls.create(" in inspect.getsource(TrainController._start_worker_group)


def test_tags_are_those_of_ray_train() -> None:
    assert (RUN_NAME, RUN_ID, RANK, ACTOR) == (
        RUN_NAME_TAG_KEY,
        RUN_ID_TAG_KEY,
        WORKER_WORLD_RANK_TAG_KEY,
        WORKER_ACTOR_ID_TAG_KEY,
    )
    assert ControllerMetrics.CONTROLLER_STATE_TAG_KEY.removeprefix("ray_") == ControllerMetrics.CONTROLLER_STATE
    assert (
        f"ray_{ControllerMetrics.CONTROLLER_STATE}",
        ControllerMetrics.CONTROLLER_STATE_TAG_KEY,
    ) == (CONTROLLER, STATE)


def test_attributes_of_the_state_of_train_runs() -> None:
    manager = inspect.getsource(TrainStateManager.__init__)
    for name in ("_state_actor", "_runs", "_run_attempts"):
        assert f"self.{name}" in manager, name
    assert "self._state_manager = " in inspect.getsource(StateManagerCallback.after_controller_start)
    assert "self._metrics" in inspect.getsource(ControllerMetricsCallback.after_controller_start)
    for name in ("_current_value", "_gauge"):
        assert f"self.{name}" in inspect.getsource(EnumMetric.record), name


def test_preemption_watcher_is_off_for_replica_groups() -> None:
    source = inspect.getsource(TrainController.__init__)
    assert source.index("if self._manages_replica_groups:") < source.index("PreemptionCallback()")


def test_errors_unwrap() -> None:
    assert UserExceptionWithTraceback(ValueError("x"), "trace")._base_exc.args == ("x",)
    assert isinstance(WorkerHealthCheckFailedError("m", ValueError("y")).health_check_failure, ValueError)


def test_states() -> None:
    error = ControllerError(RuntimeError("why"))
    state = ShuttingDownState(next_state=ErroredState(training_failed_error=error))
    assert state.next_state.training_failed_error is error  # type: ignore[attr-defined]
    assert not state.is_terminal()


def test_worker_has_an_actor_id() -> None:
    assert "_actor_id" in inspect.getsource(ray.actor.ActorHandle._actor_id.fget)  # type: ignore[attr-defined]
    assert {"actor", "metadata", "resources"} <= {field.name for field in dataclasses.fields(Worker)}


def test_draining_nodes_and_drain_call() -> None:
    assert callable(ray._private.state.state.get_draining_nodes)


def test_a_raylet_names_its_node_and_cluster_and_sigterm_drains() -> None:
    """`actors/own_node.py` reads a raylet's command line; `cluster/` relies on what `ray start --block` does."""
    source = inspect.getsource(ray._private.services.start_raylet)
    assert f'f"{NODE_FLAG}{{node_id}}"' in source
    assert f'f"{GCS_FLAG}{{gcs_address}}"' in source
    assert ray._private.services.RAYLET_EXECUTABLE.endswith("/raylet")
    assert "DRAIN_NODE_REASON_PREEMPTION" in inspect.getsource(ray._private.node.Node._drain_node_before_shutdown)
    assert autoscaler_pb2.DrainNodeReason.Value(REASON) == 2


def test_the_label_that_holds_an_actor_to_a_node() -> None:
    assert RAY_NODE_ID_KEY == "ray.io/node-id"
    assert "label_selector" in ray._common.ray_option_utils.actor_options


def test_variables_of_the_environment_are_read_by_ray() -> None:
    # what ray job submit sets for a job's driver: the package is shipped by the job's own runtime environment then
    assert RAY_JOB_CONFIG_JSON_ENV_VAR == "RAY_JOB_CONFIG_JSON_ENV_VAR"
    assert "RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ" in inspect.getsource(ray._private.worker)
    assert "RAY_TMPDIR" in inspect.getsource(ray._common.utils.get_default_system_temp_dir)
    assert RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR == "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
    assert RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR == "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"


def test_the_logger_that_is_quieted_exists() -> None:
    name = "ray._private.authentication.authentication_token_setup"
    assert importlib.import_module(name).logger.name == name


def test_what_the_group_replaces_of_the_stock_creation_of_workers() -> None:
    source = inspect.getsource(WorkerGroup._create_workers)
    for call in ("bundle_to_remote_args", "_get_worker_runtime_env", "get_metadata.remote", "_assign_worker_ranks"):
        assert f"{call}(" in source, call


def test_what_ends_and_finds_detached_actors() -> None:
    """A dead driver is a job that Ray calls dead; a placement group is made again of its id."""
    assert '"IsDead"' in inspect.getsource(ray._private.state.GlobalState.job_table)
    assert "get_actor_name" in dir(ray.runtime_context.RuntimeContext)
    assert PlacementGroup(ray.PlacementGroupID.nil()).id.is_nil()


def test_what_the_trainer_replaces_of_stock_start_up() -> None:
    source = inspect.getsource(DataParallelTrainer._initialize_and_run_controller)
    assert "get_env_vars_to_propagate()" in source
    assert isinstance(get_env_vars_to_propagate(), dict)
    asks = [FixedScalingPolicy._maybe_send_resource_request, FixedScalingPolicy.after_controller_start]
    assert all("_send_resource_request" in inspect.getsource(function) for function in asks)
    assert inspect.getsource(ScalingPolicy).count("self._send_resource_request()") == 1
    replaced = {DatasetsCallback, WorkingDirectorySetupCallback, PlacementGroupCleanerCallback, StateManagerCallback}
    assert replaced == set(NOT_USED)
