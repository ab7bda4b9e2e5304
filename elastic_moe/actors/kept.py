"""Workers that outlive the process that started them: their names, who finds them again, and how they end.

Ray ends what a dead process owned, 50 ms after a SIGTERM. The workers and their placement groups are therefore detached
(Ray: "Named actors", "Actor lifetimes"): nobody owns them. A controller that takes another one's place finds them by
their names. They end in one of four ways: the controller ends them; the driver, when it is done; the coordinator, once
their state is saved, when the driver has died; or they end themselves, when nobody collects what they have trained.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from elastic_moe.actors.link import NAMESPACE, named_actors


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
