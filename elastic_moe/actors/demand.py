"""What Ray lacks for the workers that are not there yet, as a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from elastic_moe.actors.kept import placement_entries

Resources = Mapping[str, float]
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
    """

    asked: int
    pending: int
    need: Resources
    nodes: Sequence[Resources]
    free: Resources

    def sentence(self) -> str:
        """What is missing."""
        if not self.asked:
            return "none is asked of Ray yet: the Ray Train controller starts"
        if not self.pending:
            return "Ray has room for all others, and they start"
        wanted = ", ".join(f"{name} {amount:g}" for name, amount in self.need.items())
        asked = f"{self.pending} more are asked of Ray, each with {wanted}"
        if not any(_fits(self.need, node) for node in self.nodes):
            most = ", ".join(f"{name} {max((n.get(name, 0) for n in self.nodes), default=0):g}" for name in self.need)
            return f"{asked}: none of its {len(self.nodes)} nodes is so large (at most {most}), only a new node helps"
        free = ", ".join(f"{name} {self.free.get(name, 0):g}" for name in self.need)
        return f"{asked}: its {len(self.nodes)} nodes are large enough, but others use them (free: {free})"


def demand(coordinator: str, need: Resources) -> Demand:
    """The demand of the run with this coordinator, whose workers need these resources."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    asked = placement_entries(coordinator)
    pending = sum(entry["state"] in PENDING for entry in asked)
    return Demand(len(asked), pending, need, nodes, ray.available_resources())


def pending_workers(coordinator: str) -> int:
    """Number of the run's workers for which Ray has no room yet."""
    return sum(entry["state"] in PENDING for entry in placement_entries(coordinator))


def _fits(need: Resources, has: Resources) -> bool:
    return all(has.get(name, 0) >= amount for name, amount in need.items())
