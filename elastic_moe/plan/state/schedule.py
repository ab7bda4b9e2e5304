"""The exchange schedule of one generation on one rank: the units that it sends to and receives from every rank.

The schedule follows from the units, the view, the ownership and the placement. Every rank computes its own part once
per reconfiguration or change of placement; a step then only copies tensors and calls collectives. The sender and the
receiver list the same units in the same order, so messages carry no names.

A rank *computes with* a unit if its forward pass uses the unit's weights: with every dense unit, and with the experts
in its slots. Draining ranks compute with dense units too, although they process no tokens.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.placement import Placement
from elastic_moe.plan.state.buckets import assign_buckets, assign_early_buckets
from elastic_moe.plan.state.ownership import Ownership
from elastic_moe.plan.state.units import Units
from elastic_moe.types import Unit, View

ExpertKey = tuple[int, int]  # (MoE layer, expert)
Ints = NDArray[np.int64]


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

    def only(self, wanted: Container[int]) -> Schedule:
        """The same exchange of these units alone."""
        send, receive = (
            tuple(tuple(unit for unit in units if unit in wanted) for units in units_R)
            for units_R in (self.send, self.receive)
        )
        return Schedule(send, receive)

    def split(self, bucket_U: NDArray[np.int64]) -> list[Schedule]:
        """The same exchange in buckets, one after another. `bucket_U`: int64 [U], see `plan/state/buckets.py`."""
        count, ranks = int(bucket_U.max(initial=0)) + 1, len(self.send)
        if count == 1:
            return [self]
        of_unit: list[int] = bucket_U.tolist()
        cut: list[list[list[list[int]]]] = []
        for units_R in (self.send, self.receive):
            parts: list[list[list[int]]] = [[[] for _ in range(ranks)] for _ in range(count)]
            for rank, units in enumerate(units_R):
                for unit in units:
                    parts[of_unit[unit]][rank].append(unit)
            cut.append(parts)
        return [
            Schedule(tuple(map(tuple, send)), tuple(map(tuple, receive))) for send, receive in zip(*cut, strict=True)
        ]

    def without(self, rank: int) -> Schedule:
        """The same exchange without the units that `rank`, whose part this is, sends to itself."""
        send, receive = ((*units[:rank], (), *units[rank + 1 :]) for units in (self.send, self.receive))
        return Schedule(send, receive)


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
        apart_nodes: nodes between which no rows travel; 1 where they do.
        counts_for: the number of the node, among these, whose rows this rank counts in the vote; None: it counts none.
        slot_of: (MoE layer, expert) -> index among this rank's slots.
        gradients: gradients, from each rank that computes with a unit to the unit's primary.
        mirrors: reduced gradients, from primaries to mirrors.
        dense_weights: updated weights of dense units, to every rank: from itself where it holds the unit, as primary or
            mirror, else from the primary.
        expert_weights: updated weights of experts, in the same way to the ranks that have a copy.
        frozen_weights: weights without updates, dense units and experts alike; sent only on entering a view.
        bucket_U: int64 [U], the bucket in which each unit travels; see `Schedule.split`.
        early_bucket_U: int64 [U], that of its gradient where gradients may leave in the backward pass, else None. They
            may where ranks are on several nodes, since rows have a group of their own there. On one node the exchange
            has no wire to wait for, and takes the cores from the pass.
    """

    def __init__(
        self, units: Sequence[Unit], view: View, rank: int, ownership: Ownership, placement: Placement
    ) -> None:
        self.units, self.view, self.rank = Units.of(units), view, rank
        self.ownership, self.placement = ownership, placement
        self.slot_of = slots_by_expert(placement, rank)
        node_R = placement.node_of_rank if placement.in_nodes else None
        self.apart_nodes = 1 if node_R is None else int(node_R.max()) + 1
        own_node = 0 if node_R is None else int(node_R[rank])
        self.counts_for = own_node if placement.reach(rank)[0][0] == rank else None
        self._numels: list[int] = self.units.numel_U.tolist()
        is_dense_U, published_U = self.units.expert_U < 0, self.units.published_U
        parts = _ComputingRanks(self.units, view.world_size, rank, ownership, placement)
        self.bucket_U = assign_buckets(
            self.units.numel_U, ownership.primary, parts.copies_U, view.world_size, ownership.mirrors.shape[1]
        )
        self.early_bucket_U: Ints | None = None
        if (placement.everywhere or placement.rows_apart) and len({member.node for member in view.members}) > 1:
            self.early_bucket_U = assign_early_buckets(
                self.units.numel_U, ownership.primary, parts.copies_U, view.world_size, self.units.stage_U
            )
        self.gradients = parts.to_primaries(self.units.has_gradient_U)
        self.mirrors = _to_mirrors(view.world_size, rank, ownership, self.units.has_gradient_U)
        self.dense_weights = parts.from_holders(published_U & is_dense_U)
        self.expert_weights = parts.from_holders(published_U & ~is_dense_U)
        self.frozen_weights = parts.from_holders(~published_U)

    def sizes(self, units_R: Sequence[Sequence[int]]) -> list[int]:
        """Elements of the units per rank, for `send` or `receive` of a schedule."""
        return [sum(self._numels[u] for u in units) for units in units_R]


class _ComputingRanks:
    """One rank's part in the exchanges between the primaries and the ranks that compute with a unit.

    Legend: C pairs of a unit that the rank owns and a rank that computes with it; M units that the rank computes with.

    Args: as for `Layout`.

    Attributes:
        copies_U: int64 [U], ranks that compute with each unit, at most; two slots of a rank count twice.

    Raises:
        KeyError: an expert's unit has no copy.
    """

    def __init__(self, units: Units, num_ranks: int, rank: int, ownership: Ownership, placement: Placement) -> None:
        self._num_ranks, self._rank = num_ranks, rank
        self._primary_U, self._mirrors_UM = ownership.primary, ownership.mirrors
        expert_units = np.flatnonzero(units.expert_U >= 0)
        unit_LE = np.full(placement.home.shape, -1, dtype=np.int64)
        unit_LE[units.layer_U[expert_units], units.expert_U[expert_units]] = expert_units
        layer_S, slot_S = np.nonzero(placement.expert_of_slot >= 0)
        unit_S, rank_S = unit_LE[layer_S, placement.expert_of_slot[layer_S, slot_S]], placement.rank_of_slot[slot_S]
        without_copy = np.setdiff1d(expert_units, unit_S)
        if without_copy.size:
            raise KeyError(f"there is no copy of {units[int(without_copy[0])].name}")
        dense_units = np.flatnonzero(units.expert_U < 0)
        self.copies_U = np.where(units.expert_U < 0, num_ranks, np.bincount(unit_S[unit_S >= 0], minlength=len(units)))
        owned = dense_units[self._primary_U[dense_units] == rank]
        copies = np.flatnonzero((unit_S >= 0) & (self._primary_U[unit_S] == rank))
        self._owned_C = np.concatenate([np.repeat(owned, num_ranks), unit_S[copies]])
        self._rank_C = np.concatenate([np.tile(np.arange(num_ranks), len(owned)), rank_S[copies]])
        self._unit_M = np.concatenate([dense_units, unit_S[(rank_S == rank) & (unit_S >= 0)]])

    def to_primaries(self, wanted_U: NDArray[np.bool_]) -> Schedule:
        """Wanted units from each rank that computes with them to their primaries."""
        sent_C, unit_M = wanted_U[self._owned_C], self._unit_M[wanted_U[self._unit_M]]
        return Schedule(
            _by_peer(self._num_ranks, self._primary_U[unit_M], unit_M),
            _by_peer(self._num_ranks, self._rank_C[sent_C], self._owned_C[sent_C]),
        )

    def from_holders(self, wanted_U: NDArray[np.bool_]) -> Schedule:
        """Wanted units to each rank that computes with them: from itself if it mirrors them, else from the primary."""
        unit_M = self._unit_M[wanted_U[self._unit_M]]
        mirrored_M = self._mirrors(unit_M, np.full(len(unit_M), self._rank))
        source_M = np.where(mirrored_M, self._rank, self._primary_U[unit_M])
        sent_C = wanted_U[self._owned_C] & ~self._mirrors(self._owned_C, self._rank_C)
        to_itself = unit_M[mirrored_M]
        receiver = np.concatenate([self._rank_C[sent_C], np.full(len(to_itself), self._rank)])
        sent = np.concatenate([self._owned_C[sent_C], to_itself])
        return Schedule(_by_peer(self._num_ranks, receiver, sent), _by_peer(self._num_ranks, source_M, unit_M))

    def _mirrors(self, unit_N: Ints, rank_N: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Whether each rank mirrors the unit."""
        return (self._mirrors_UM[unit_N] == rank_N[:, None]).any(axis=1)


def _to_mirrors(num_ranks: int, rank: int, ownership: Ownership, wanted_U: NDArray[np.bool_]) -> Schedule:
    """Wanted units from their primaries to their mirrors."""
    sent, column = np.nonzero((ownership.mirrors >= 0) & (wanted_U & (ownership.primary == rank))[:, None])
    received = np.flatnonzero(wanted_U & (ownership.mirrors == rank).any(axis=1))
    return Schedule(
        _by_peer(num_ranks, ownership.mirrors[sent, column], sent),
        _by_peer(num_ranks, ownership.primary[received], received),
    )


def _by_peer(num_ranks: int, peer_N: NDArray[np.integer], unit_N: Ints) -> tuple[tuple[int, ...], ...]:
    """Units per peer, ascending, each once."""
    peer_N, unit_N = np.divmod(np.unique(peer_N.astype(np.int64) * (1 << 32) + unit_N), 1 << 32)
    units: list[int] = unit_N.tolist()
    cuts: list[int] = np.searchsorted(peer_N, np.arange(num_ranks + 1)).tolist()
    return tuple(tuple(units[begin:end]) for begin, end in pairwise(cuts))
