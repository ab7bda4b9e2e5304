"""Runs a trainer to its end; where its Ray Train controller dies, another one goes on.

Ray ends every actor whose owner has died, and the controller owns the workers: they get SIGTERM, and are ended within a
tenth of a second. So a controller's death is the death of all workers. The coordinator belongs to the driver and
outlives it. The new controller's workers go on from the newest durable checkpoint.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray._private.state import actors
from ray.exceptions import ActorDiedError
from ray.util.placement_group import get_placement_group, placement_group_table, remove_placement_group

from elastic_moe.actors.controller import ElasticTrainer
from elastic_moe.actors.link import CoordinatorLink

DEATHS = 3  # controllers that may die one after another without a step between them
PATIENCE_S = 60.0  # for Ray to end the workers, and for the coordinator's answer
POLL_S = 0.05
REASON = "its Ray Train controller died"


def fit(make: Callable[[], ElasticTrainer], link: CoordinatorLink) -> None:
    """Train until the run is over.

    Args:
        make: makes a trainer; it is called again for every controller.
        link: to the run's coordinator, for this call alone.

    Raises:
        ActorDiedError: `DEATHS` controllers have died without a step between them, or Ray has been shut down.
        Exception: the error that ended the run.
    """
    died, step = 0, -1
    while True:
        trainer = make()
        try:
            trainer.fit()
            return
        except ActorDiedError:
            if not ray.is_initialized():
                raise
            status = _answer(link)
            died = died + 1 if status.get("step", -1) == step else 1
            step = status.get("step", -1)
            if died >= DEATHS:
                raise
            print(
                "the Ray Train controller died, and Ray ended its workers: they are started again, and go on from the "
                "newest checkpoint",
                file=sys.stderr,
            )
            _remove_placement_groups(trainer.train_run_context.run_id)
            _report_dead(link, [(member[0], member[1], member[2]) for member in status.get("members", ())])


def _answer(link: CoordinatorLink) -> dict[str, Any]:
    """A status that the coordinator gave after this call; {} if it gives none in time."""
    link.forget()
    deadline_s = time.monotonic() + PATIENCE_S
    while not (status := link.poll()) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    return status


def _report_dead(link: CoordinatorLink, members: list[tuple[str, str, int]]) -> None:
    """Tell the coordinator of every member (worker, node, pid) that Ray has ended.

    It waits for members of whom it only knows that their connection is closed, since they may hold the last state.
    """
    deadline_s = time.monotonic() + PATIENCE_S
    while members and time.monotonic() < deadline_s:
        dead = [member for member in members if actors(member[0]).get("State") == "DEAD"]
        for worker, node, pid in dead:
            link.submit({"event": "worker_lost", "worker": worker, "node": node, "pid": pid, "reason": REASON})
        members = [member for member in members if member not in dead]
        time.sleep(POLL_S)


def _remove_placement_groups(run_id: str) -> None:
    """Return a dead controller's placement groups to Ray, which keeps them for as long as the driver lives."""
    for entry in placement_group_table().values():
        if entry["name"].startswith(run_id) and entry["state"] != "REMOVED":
            with suppress(ValueError):  # it was removed in the meantime
                remove_placement_group(get_placement_group(entry["name"]))
