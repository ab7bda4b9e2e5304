"""What Ray lacks for the workers that are not there yet, as a sentence; and whether waiting for them can ever end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from elastic_moe.actors.autoscaler import Autoscaler, Resources, find_autoscaler, fits
from elastic_moe.actors.kept import placement_entries
from elastic_moe.config.schema import ClusterConfig
from elastic_moe.errors import UserError

LOOK_S = 2.0
PENDING = ("PENDING", "RESCHEDULING")


@dataclass(frozen=True)
class Demand:
    """What is asked of Ray, and what it has.

    Attributes:
        asked: workers that Ray was asked for.
        pending: those of them for which there is no room.
        need: resources of each.
        nodes: all resources of each living node.
        free: resources of the whole cluster that nobody uses.
        autoscaler: what Ray tells of one.
    """

    asked: int
    pending: int
    need: Resources
    nodes: Sequence[Resources]
    free: Resources
    autoscaler: Autoscaler

    @property
    def hopeless(self) -> bool:
        """Whether no node can hold a worker, and none that could comes by itself."""
        return self.pending > 0 and self.nodes_too_small and self.autoscaler.never_brings(self.need)

    @property
    def nodes_too_small(self) -> bool:
        """Whether no living node could hold a worker, even if nobody else used it."""
        return not any(fits(self.need, node) for node in self.nodes)

    def sentence(self) -> str:
        """What is missing."""
        if not self.asked:
            return "none is asked of Ray yet: the Ray Train controller starts"
        if not self.pending:
            return "Ray has room for all others, and they start"
        asked = f"{self.pending} more are asked of Ray, each with {_told(self.need)}"
        answer = self.autoscaler.sentence(self.need)
        if self.nodes_too_small:
            small = f"none of its {len(self.nodes)} nodes is so large (at most {_told(self.largest())})"
            return f"{asked}: {small}, only a new node helps, and {answer}"
        free = _told({name: self.free.get(name, 0) for name in self.need})
        return f"{asked}: its {len(self.nodes)} nodes are large enough, but others use them (free: {free}); {answer}"

    def largest(self) -> Resources:
        """The most that one node has of each resource that a worker needs."""
        return {name: max((node.get(name, 0) for node in self.nodes), default=0) for name in self.need}


def demand(coordinator: str, need: Resources) -> Demand:
    """The demand of the run with this coordinator, whose workers need these resources."""
    nodes = ray.nodes()
    living = [node["Resources"] for node in nodes if node["Alive"]]
    asked = placement_entries(coordinator)
    pending = sum(entry["state"] in PENDING for entry in asked)
    autoscaler = find_autoscaler([node["NodeID"] for node in nodes])
    return Demand(len(asked), pending, need, living, ray.available_resources(), autoscaler)


def pending_workers(coordinator: str) -> int:
    """Number of the run's workers for which Ray has no room yet."""
    return sum(entry["state"] in PENDING for entry in placement_entries(coordinator))


def _told(resources: Resources) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())


class EndlessWait:
    """Finds out that a run waits for its first worker and that none can ever be placed.

    A cluster may get its nodes by hand, so it has some patience. Where workers were there before, their nodes may come
    back: then `elastic.wait_below_min_s` is the limit.

    Args:
        ask: for the demand; it may raise.
        patience_s: so long may nothing be large enough; None: for ever.
        clock: monotonic seconds.
    """

    def __init__(
        self, ask: Callable[[], Demand], patience_s: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask, self._patience_s, self._clock = ask, patience_s or 0.0, clock
        self._since_s: float | None = None  # nothing is large enough since
        self._next_s = 0.0
        self._over = patience_s is None

    def look(self, status: Mapping[str, Any]) -> UserError | None:
        """The error that ends the run, if it is time.

        Args:
            status: newest of the coordinator.
        """
        self._over = self._over or status.get("workers", 0) > 0
        if self._over or status.get("phase") != "waiting" or self._clock() < self._next_s:
            return None
        self._next_s = self._clock() + LOOK_S
        try:
            demand = self._ask()
        except Exception:  # noqa: BLE001 - Ray's head is busy or away: nothing is known
            return None
        if not demand.hopeless:
            self._since_s = None
            return None
        self._since_s = self._clock() if self._since_s is None else self._since_s
        if self._clock() - self._since_s < self._patience_s:
            return None
        return UserError(never_placed(demand))


def patience(cluster: ClusterConfig) -> float | None:
    """For how long a run waits for a node that is large enough: a cluster that the run has started gets none."""
    if cluster.kind != "address":
        return 0.0
    return cluster.nodes_timeout_s or None


def never_placed(demand: Demand) -> str:
    """Why no worker can ever be placed."""
    short = [name for name, most in demand.largest().items() if most < demand.need[name]] or list(demand.need)
    keys = " and ".join(f"cluster.{name.lower()}s_per_worker={demand.need[name]:g}" for name in short)
    nodes = f"the {len(demand.nodes)} nodes of the cluster have at most {_told(demand.largest())} each"
    return f"{keys}: no node can ever hold a worker; {nodes}, and {demand.autoscaler.sentence(demand.need)}"
