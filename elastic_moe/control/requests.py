"""Requests to the coordinator by others than workers (driver, controller, watcher of nodes), as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DrainRequest:
    """A worker, or all workers of a node, should hand over and leave within `deadline_s` seconds (0: the default)."""

    worker: str = ""
    node: str = ""
    deadline_s: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class WorkerLostRequest:
    """A worker's process has died."""

    worker: str
    node: str = ""
    pid: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class NodeLostRequest:
    """A node has died, with all its workers."""

    node: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class FailRequest:
    """The run should end as failed, once its members have saved their state."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class StopRequest:
    """The run should end after the step in flight."""

    reason: str = ""


Request = DrainRequest | WorkerLostRequest | NodeLostRequest | StopRequest | FailRequest

REQUESTS: Mapping[str, type[Request]] = {
    "drain": DrainRequest,
    "worker_lost": WorkerLostRequest,
    "node_lost": NodeLostRequest,
    "stop": StopRequest,
    "fail": FailRequest,
}
REQUEST_NAMES: Mapping[type, str] = {cls: name for name, cls in REQUESTS.items()}
