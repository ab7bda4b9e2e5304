"""The Ray cluster of a run: embedded, simulated (several nodes in one machine), or one that exists already.

Embedded and simulated clusters live in a temporary directory of their own and end with the run. A cluster that someone
else started on the same machine is neither joined nor disturbed.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import ray
from ray.exceptions import AuthenticationError

from elastic_moe.actors.link import NAMESPACE
from elastic_moe.actors.ray_directory import PACKAGE, own_directory
from elastic_moe.actors.ray_token import own_token
from elastic_moe.config.schema import ClusterConfig, TrainConfig
from elastic_moe.errors import UserError

T = TypeVar("T")
GIB = 1 << 30
START_TRIES = 3  # Ray gives a node 30 s to start, whatever the load of the machine
SLOW_START = "timed out during startup"  # in what it raises then
CONNECT_S = 5.0
OBJECT_STORE_MIN_BYTES = 75 << 20  # Ray's lower bound


def start_workers(cluster: ClusterConfig) -> int:
    """Number of workers that a run starts with."""
    if cluster.kind == "simulated":
        return cluster.nodes * cluster.workers_per_node
    return cluster.workers


def resolve(config: TrainConfig) -> TrainConfig:
    """The configuration with `cluster.kind=auto` decided: the cluster that is named, else an embedded one."""
    cluster = config.cluster
    if cluster.kind != "auto":
        return config
    address = cluster.address or os.environ.get("RAY_ADDRESS", "")
    kind = "local" if address in ("", "local") else "address"
    return replace(config, cluster=replace(cluster, kind=kind, address=address if kind == "address" else ""))


def unreachable(address: str) -> str:
    """Why nobody listens at HOST:PORT; "" if somebody does, or it is no such address. Ray itself tries for long."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return ""
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return ""


def check_reachable(config: TrainConfig) -> None:
    """Ask whether the cluster that the run is to join listens. A start that cannot reach it should touch nothing.

    Raises:
        UserError: nobody listens at its address.
    """
    cluster = config.cluster
    address = _address(cluster) if cluster.kind == "address" else ""
    if reason := unreachable(address):
        raise UserError(
            f"cluster.address: no Ray cluster answers at {address} ({reason}); start one, or set RAY_ADDRESS"
        )


def _address(cluster: ClusterConfig) -> str:
    return cluster.address or os.environ.get("RAY_ADDRESS") or "auto"


def silent(address: str) -> str:
    """The sentence about an address where no cluster lets this process in. Ray tells a wrong token in its log only."""
    wants = "or it wants another token (RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN)"
    return f"no Ray cluster answers at {address}, {wants}"


def max_workers(config: TrainConfig) -> int:
    """Largest number of workers of a run."""
    return config.elastic.max_workers or start_workers(config.cluster)


def resources_per_worker(cluster: ClusterConfig) -> dict[str, float]:
    """The resources that one worker asks Ray for."""
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return resources


@contextmanager
def ray_session(config: TrainConfig) -> Iterator[Any]:
    """Connect to, or start, the run's cluster, whose kind is not auto. Yields the simulated `Cluster`, or else None.

    Inside another session, as the jobs of a sweep are, that one's Ray is used and left running; this yields None.

    Raises:
        UserError: `cluster.kind` is unknown, or no cluster answers at `cluster.address`.
    """
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)  # not news
    kind = config.cluster.kind
    if kind not in ("local", "simulated", "address"):
        raise UserError(f'cluster.kind={kind} is unknown; use "local", "simulated" or "address"')
    if ray.is_initialized():
        yield None
    elif kind == "address":
        check_reachable(config)
        with _existing(config.cluster):
            yield None
    else:
        with own_directory() as root:
            if kind == "local":
                with own_token(root), _local(config):
                    yield None
            else:
                with _simulated(config.cluster) as cluster:
                    yield cluster


@contextmanager
def sweep_session(configs: Sequence[TrainConfig]) -> Iterator[None]:
    """One cluster for all jobs of a sweep, large enough for the largest job.

    Jobs that ask for different clusters start their own.
    """
    if len(configs) < 2 or any(config.cluster != configs[0].cluster for config in configs):
        yield
    else:
        with shared_session(configs):
            yield


@contextmanager
def shared_session(configs: Sequence[TrainConfig]) -> Iterator[None]:
    """One cluster that is large enough for the largest of these runs."""
    with ray_session(resolve(max(configs, key=max_workers))):
        yield


def _common(cluster: ClusterConfig) -> dict[str, Any]:
    return {
        "object_store_memory": max(int(cluster.object_store_gib * GIB), OBJECT_STORE_MIN_BYTES),
        "include_dashboard": cluster.dashboard,
    }


def start_patiently(start: Callable[[], T], undo: Callable[[], None]) -> T:
    """Start Ray, and again where a node did not start in Ray's own time. `undo` ends what a failed start has left."""
    for _ in range(START_TRIES - 1):
        try:
            return start()
        except Exception as error:
            if SLOW_START not in str(error):
                raise
            print("elastic_moe: note: this machine is so busy that Ray did not start; once more", file=sys.stderr)
            undo()
    return start()


@contextmanager
def _local(config: TrainConfig) -> Iterator[None]:
    cluster = config.cluster
    num_cpus = max(1, math.ceil(cluster.cpus_per_worker * max_workers(config)))
    quiet = {"namespace": NAMESPACE, "logging_level": logging.WARNING, "log_to_driver": False}
    start_patiently(lambda: ray.init(address="local", num_cpus=num_cpus, **quiet, **_common(cluster)), ray.shutdown)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _simulated(cluster: ClusterConfig) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {
        "include_log_monitor": False,  # nobody reads what it collects
        "num_cpus": math.ceil(cluster.cpus_per_worker * cluster.workers_per_node),
        "num_gpus": math.ceil(cluster.gpus_per_worker * cluster.workers_per_node),
        **_common(cluster),
    }
    nodes: Any = Cluster()

    def start() -> None:
        nodes.add_node(**(node | {"num_cpus": 0, "num_gpus": 0, "no_monitor": True}))  # nothing scales it
        for _ in range(cluster.nodes):
            nodes.add_node(**node)

    try:
        start_patiently(start, nodes.shutdown)
        ray.init(address=nodes.address, namespace=NAMESPACE, logging_level=logging.WARNING, log_to_driver=False)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


@contextmanager
def _existing(cluster: ClusterConfig) -> Iterator[None]:
    """Join a cluster. Unless a job's own runtime environment brings the package, it is shipped with the job."""
    address = _address(cluster)
    shipped = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or "site-packages" in PACKAGE.parts
    runtime_env = {} if shipped else {"py_modules": [str(PACKAGE)]}
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            runtime_env=runtime_env,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    except (AuthenticationError, ConnectionError) as error:
        raise UserError(f"cluster.address: {silent(address)}; start one, or set RAY_ADDRESS") from error
    try:
        yield
    finally:
        ray.shutdown()
