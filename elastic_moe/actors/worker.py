"""A worker's process in Ray: Ray Train's worker actor, made elastic, and the train function that runs in it."""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from typing import Any

import ray
from ray._raylet import RAY_NODE_GROUP_KEY, RAY_NODE_MARKET_TYPE_KEY  # pyright: ignore[reportAttributeAccessIssue]
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.util.placement_group import get_current_placement_group, remove_placement_group

from elastic_moe.actors.link import fetch_token, train_names
from elastic_moe.control.goodput import node_kind
from elastic_moe.types import Origin

CHECKS = 20
PROGRAM = "elastic_moe.runtime.worker"  # what the train function runs; importing it takes seconds

logger = logging.getLogger(__name__)


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
        threading.Thread(target=importlib.import_module, args=(PROGRAM,), name="program", daemon=True).start()
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


def train_function(settings: dict[str, Any]) -> dict[str, Any]:
    """The train function of every Ray Train worker. Its id is its actor's, by which the controller names it too."""
    from elastic_moe.actors.metrics import WorkerExporter
    from elastic_moe.runtime.worker import run_worker

    config, find = settings["config"], settings["find"]
    context = ray.get_runtime_context()
    worker = context.get_actor_id()
    assert worker is not None, "a train function runs in an actor"
    names, token = train_names(find.name, config.run.dir), fetch_token(find.name)
    with WorkerExporter(names, get_train_context().get_world_rank(), worker):
        node, prepared = context.get_node_id(), settings["prepared"]
        return run_worker(config, find, token, node, prepared, worker, names.name, origin())
