"""The exchange schedule of one generation on one rank: the units that it sends to and receives from every rank.

The schedule follows from the units, the view, the ownership and the placement. Every rank computes its own part once
per reconfiguration or change of placement; a step then only copies tensors and calls collectives. The sender and the
receiver list the same units in the same order, so messages carry no names.

A rank *computes with* a unit if its forward pass uses the unit's weights: with every dense unit, and with the experts
in its slots. Draining ranks compute with dense units too, although they process no tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from elastic_moe.plan.placement import Placement
from elastic_moe.plan.state.ownership import Ownership
from elastic_moe.types import Unit, View

ExpertKey = tuple[int, int]  # (MoE layer, expert)
Route = tuple[int, Collection[int], Collection[int]]  # unit, ranks that send it, ranks that each sender sends it to


@dataclass(frozen=True, slots=True)
class Schedule:
    """One exchange of whole units, as one rank takes part in it.

    Attributes:
        send: per receiving rank, the units sent to it, ascending.
        receive: per sending rank, the units that it sends to this rank, ascending.
    """

    send: tuple[tuple[int, ...], ...]
    receive: tuple[tuple[int, ...], ...]

    @property
    def sent_units(self) -> list[int]:
        """All sent units, in the order of the send buffer."""
        return [unit for units in self.send for unit in units]

    @property
    def received_units(self) -> list[int]:
        """All received units, in the order of the receive buffer. A unit occurs once for every rank that sends it."""
        return [unit for units in self.receive for unit in units]


def schedule_of(rank: int, num_ranks: int, routes: Iterable[Route]) -> Schedule:
    """The part of `rank` in an exchange.

    Args:
        rank: this rank.
        num_ranks: ranks of the view.
        routes: the whole exchange, the same on every rank, ascending by unit.
    """
    send: list[list[int]] = [[] for _ in range(num_ranks)]
    receive: list[list[int]] = [[] for _ in range(num_ranks)]
    for unit, sources, destinations in routes:
        if rank in sources:
            for destination in destinations:
                send[destination].append(unit)
        if rank in destinations:
            for source in sources:
                receive[source].append(unit)
    return Schedule(tuple(map(tuple, send)), tuple(map(tuple, receive)))


def slots_by_expert(placement: Placement, rank: int) -> dict[ExpertKey, int]:
    """(MoE layer, expert) -> index among the slots of `rank`, for the experts that it has a copy of."""
    experts_LS = placement.expert_of_slot[:, placement.slots_of(rank)].tolist()
    return {
        (layer, expert): slot
        for layer, experts in enumerate(experts_LS)
        for slot, expert in enumerate(experts)
        if expert >= 0
    }


class Layout:
    """The exchanges of one generation on one rank.

    Args:
        units: all units.
        view: the membership.
        rank: this worker's rank in it.
        ownership: primary and mirrors of every unit.
        placement: experts in slots.

    Attributes:
        slot_of: (MoE layer, expert) -> index among this rank's slots.
        gradients: gradients, from each rank that computes with a unit to the unit's primary.
        mirrors: reduced gradients, from primaries to mirrors.
        dense_weights: updated weights of dense units, from primaries to every rank.
        expert_weights: updated weights of experts, from primaries to the ranks that have a copy.
        frozen_weights: weights without updates, dense units and experts alike; sent only on entering a view.
    """

    def __init__(
        self, units: Sequence[Unit], view: View, rank: int, ownership: Ownership, placement: Placement
    ) -> None:
        self.units, self.view, self.rank = units, view, rank
        self.ownership, self.placement = ownership, placement
        num_ranks = view.world_size
        slots_R = [slots_by_expert(placement, r) for r in range(num_ranks)]
        self.slot_of = slots_R[rank]
        primary_U: list[int] = ownership.primary.tolist()
        computing_U = _computing_ranks(units, slots_R)
        reduced = [u for u, unit in enumerate(units) if unit.rule.has_gradient]
        published = [u for u, unit in enumerate(units) if unit.rule.published_each_step]
        frozen = [u for u, unit in enumerate(units) if not unit.rule.published_each_step]

        def weights(kind: Iterable[int]) -> Schedule:
            return schedule_of(rank, num_ranks, ((u, (primary_U[u],), computing_U[u]) for u in kind))

        self.gradients = schedule_of(rank, num_ranks, ((u, computing_U[u], (primary_U[u],)) for u in reduced))
        self.mirrors = schedule_of(rank, num_ranks, _mirror_routes(reduced, ownership))
        self.dense_weights = weights(u for u in published if _expert_key(units[u]) is None)
        self.expert_weights = weights(u for u in published if _expert_key(units[u]) is not None)
        self.frozen_weights = weights(frozen)

    def sizes(self, units_R: Sequence[Sequence[int]]) -> list[int]:
        """Elements of the units per rank, for `send` or `receive` of a schedule."""
        return [sum(self.units[u].numel for u in units) for units in units_R]


def _expert_key(unit: Unit) -> ExpertKey | None:
    """(MoE layer, expert) of an expert's unit, None of a dense unit."""
    return None if unit.expert is None or unit.moe_layer is None else (unit.moe_layer, unit.expert)


def _computing_ranks(units: Sequence[Unit], slots_R: Sequence[dict[ExpertKey, int]]) -> list[Collection[int]]:
    """Per unit, the ranks that compute with it, ascending."""
    ranks_of: dict[ExpertKey, list[int]] = {}
    for rank, slots in enumerate(slots_R):
        for key in slots:
            ranks_of.setdefault(key, []).append(rank)
    keys = (_expert_key(unit) for unit in units)
    return [range(len(slots_R)) if key is None else ranks_of[key] for key in keys]


def _mirror_routes(units: Iterable[int], ownership: Ownership) -> Iterable[Route]:
    """Each unit from its primary to its mirrors."""
    primary_U, mirrors_UK = ownership.primary.tolist(), ownership.mirrors.tolist()
    for unit in units:
        yield unit, (primary_U[unit],), [rank for rank in mirrors_UK[unit] if rank >= 0]
