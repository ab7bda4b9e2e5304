"""Requests to the coordinator by others than workers (driver, controller, operator), as frozen values."""

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


@dataclass(frozen=True, slots=True)
class CheckpointRequest:
    """A checkpoint of the newest step should be written."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class ScaleRequest:
    """The run should go on with at most so many workers. More than before are asked of Ray, fewer are drained."""

    workers: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PauseRequest:
    """The run should make no step until it is resumed. Its workers save their state and keep it."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class ResumeRequest:
    """A paused run should go on."""

    reason: str = ""


Request = (
    DrainRequest
    | WorkerLostRequest
    | NodeLostRequest
    | StopRequest
    | FailRequest
    | CheckpointRequest
    | ScaleRequest
    | PauseRequest
    | ResumeRequest
)

REQUESTS: Mapping[str, type[Request]] = {
    "drain": DrainRequest,
    "worker_lost": WorkerLostRequest,
    "node_lost": NodeLostRequest,
    "stop": StopRequest,
    "fail": FailRequest,
    "checkpoint": CheckpointRequest,
    "scale": ScaleRequest,
    "pause": PauseRequest,
    "resume": ResumeRequest,
}
REQUEST_NAMES: Mapping[type, str] = {cls: name for name, cls in REQUESTS.items()}
