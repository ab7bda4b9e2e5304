"""Workers that outlive the process that started them: their names, who finds them again, and how they end.

Ray ends what a dead process owned, 50 ms after a SIGTERM. The workers and their placement groups are therefore detached
(Ray: "Named actors", "Actor lifetimes"): nobody owns them. A controller that takes another one's place finds them by
their names. They end in one of four ways: the controller ends them; the driver, when it is done; the coordinator, once
their state is saved, when the driver has died; or they end themselves, when nobody collects what they have trained.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

import ray
from ray._raylet import RAY_NODE_GROUP_KEY, RAY_NODE_MARKET_TYPE_KEY  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import RayError
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group_table,
    remove_placement_group,
)

from elastic_moe.actors.link import NAMESPACE, named_actors
from elastic_moe.control.goodput import node_kind
from elastic_moe.types import Origin

CHECKS = 20

logger = logging.getLogger(__name__)


def new_name(coordinator: str) -> str:
    """A name for a worker of this coordinator's run and for its placement group."""
    return f"{_prefix(coordinator)}{uuid.uuid4().hex}"


def worker_names(coordinator: str) -> list[str]:
    """Names of the run's workers that Ray knows: those that live, and those that are being started."""
    return named_actors(_prefix(coordinator))


def placement_entries(coordinator: str) -> list[dict[str, Any]]:
    """What Ray tells of the run's placement groups: one for each worker that it was asked for, pending ones too."""
    table: list[Any] = list(placement_group_table().values())
    prefix = _prefix(coordinator)
    return [entry for entry in table if entry["name"].startswith(prefix) and entry["state"] != "REMOVED"]


def placements(coordinator: str) -> dict[str, PlacementGroup]:
    """The run's placement groups by name, pending ones too."""
    entries = placement_entries(coordinator)
    return {e["name"]: PlacementGroup(ray.PlacementGroupID(bytes.fromhex(e["placement_group_id"]))) for e in entries}


def end_all(coordinator: str) -> None:
    """End every worker of a run, and return every placement group to Ray. Nothing is saved here."""
    for name in worker_names(coordinator):
        end_actor(name)
    for placement in placements(coordinator).values():
        with suppress(ValueError, RayError):  # it was removed in the meantime
            remove_placement_group(placement)


def end_actor(name: str) -> None:
    """End one named actor of a run at once. The placement group of a worker stays."""
    with suppress(ValueError, RayError):  # it ended in the meantime
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))


def _prefix(coordinator: str) -> str:
    return f"{coordinator}/"


class ElasticWorker(RayTrainWorker):
    """Ray Train's worker, which ends itself where it does not train and no controller asks for it any more.

    Args:
        placed_s: wall clock at which Ray had reserved its room.

    Attributes:
        placed_s: of the one worker of this process; 0 before there is one.
        uncollected_s: it waits for a question for so many seconds, and looks `CHECKS` times meanwhile.
    """

    uncollected_s = 180.0
    placed_s = 0.0

    def __init__(self, placed_s: float) -> None:
        super().__init__()
        ElasticWorker.placed_s = placed_s
        self._asked_s = time.monotonic()
        threading.Thread(target=self._watch, name="uncollected", daemon=True).start()

    def poll_status(self) -> WorkerStatus:
        """The state of the train function; the controller asks for it again and again."""
        self._asked_s = time.monotonic()
        return super().poll_status()

    def _watch(self) -> None:
        while True:
            time.sleep(self.uncollected_s / CHECKS)
            if _trains():
                self._asked_s = time.monotonic()
            elif (silent_s := time.monotonic() - self._asked_s) > self.uncollected_s:
                logger.warning("nobody asked for this worker for %.0f s, and it does not train: it ends", silent_s)
                try:
                    if (placement := get_current_placement_group()) is not None:
                        remove_placement_group(placement)
                finally:
                    os._exit(0)


def origin() -> Origin:
    """When and on what kind of node the worker of this process was placed."""
    labels: Any = ray.get_runtime_context().get_node_labels()
    kind = node_kind(labels.get(RAY_NODE_MARKET_TYPE_KEY, ""), labels.get(RAY_NODE_GROUP_KEY, ""))
    return Origin(ElasticWorker.placed_s, kind)


def _trains() -> bool:
    """Whether a train function runs in this process."""
    try:
        return get_train_context().execution_context.training_thread_runner.is_running()
    except RuntimeError:  # there was none yet
        return False
