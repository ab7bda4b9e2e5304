"""Values that placement and token split share: the topology of the ranks, and the expert in each slot.

A *slot* is room for one expert's weights on a rank. A *copy* is an expert in a slot. One copy is the expert's *home*:
its rank keeps the expert's optimizer state. The other copies are *replicas*. Legend: L MoE layers, E experts, R ranks,
P slots of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_APART = 256  # ranks that may have a second connection to each other one, for rows
LOST = -1  # home of an expert whose home rank has left


@dataclass(frozen=True, slots=True)
class Topology:
    """Where the ranks are, and how rows may travel.

    Attributes:
        nodes: node (fault domain) of every rank.
        speeds: relative speed of every rank.
        in_nodes: each node has a copy of every expert, and rows stay in their node.
    """

    nodes: tuple[str, ...]
    speeds: tuple[float, ...]
    in_nodes: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """The expert of each slot, for all MoE layers.

    Attributes:
        expert_of_slot: int32[L, P], EMPTY for a slot without expert; within a rank, homes come before replicas.
        rank_of_slot: int32[P], non-decreasing.
        home: int32[L, E], the home rank of each expert.
        node_of_rank: int32[R], the node's number; None if all ranks are on one node.
        time_L: float64[L], the slowest rank's time on the load planned for, with an optimal split; 1 is the mean.
            None if unknown.
        in_nodes: each node whose ranks have slots has a copy of every expert, and rows stay in their node.
    """

    expert_of_slot: NDArray[np.int32]
    rank_of_slot: NDArray[np.int32]
    home: NDArray[np.int32]
    node_of_rank: NDArray[np.int32] | None = None
    time_L: NDArray[np.float64] | None = None
    in_nodes: bool = False

    def remap_ranks(self, rank_of: Sequence[int]) -> Placement:
        """This placement in the ranks of a new membership; slots of ranks that have left get rank LOST.

        Args:
            rank_of: new rank of each old rank; LOST for a rank that has left.
        """
        rank_of_R = np.asarray(rank_of, dtype=np.int32)
        return Placement(self.expert_of_slot, rank_of_R[self.rank_of_slot], rank_of_R[self.home])

    @property
    def everywhere(self) -> bool:
        """Whether every rank that has slots has a copy of each expert."""
        num_experts = self.home.shape[1]
        all_E: NDArray[np.int64] = np.arange(num_experts, dtype=np.int64)
        for rank in np.unique(self.rank_of_slot).tolist():
            experts_LE = np.sort(self.expert_of_slot[:, self.slots_of(rank)], axis=1)[:, -num_experts:]
            if experts_LE.shape[1] < num_experts or not (experts_LE == all_E).all():
                return False
        return True

    @property
    def rows_apart(self) -> bool:
        """Whether rows are to have a group of their own, so that gradients may leave in the backward pass by the other.

        They are where ranks are on several nodes. With very many ranks the second connection of each pair would cost
        more than that brings, unless rows stay in their node.
        """
        return self.in_nodes or (
            self.node_of_rank is not None
            and len(self.node_of_rank) <= MOST_APART
            and len(np.unique(self.node_of_rank)) > 1
        )

    def reach(self, rank: int) -> tuple[tuple[int, ...], Placement]:
        """The ranks to which rows of a rank may travel, in order, and the placement on them, in their order."""
        if not self.in_nodes or self.node_of_rank is None:
            return tuple(range(self._num_ranks)), self
        ranks = np.flatnonzero(self.node_of_rank == self.node_of_rank[rank])
        here_P = np.isin(self.rank_of_slot, ranks)
        rank_P = np.searchsorted(ranks, self.rank_of_slot[here_P]).astype(np.int32)
        local_R = np.full(self._num_ranks, LOST, dtype=np.int32)
        local_R[ranks] = np.arange(len(ranks))
        home_LE = np.where(self.home == LOST, LOST, local_R[self.home]).astype(np.int32)
        node_R = np.zeros(len(ranks), dtype=np.int32)
        return tuple(ranks.tolist()), Placement(self.expert_of_slot[:, here_P], rank_P, home_LE, node_R)

    @property
    def _num_ranks(self) -> int:
        if self.node_of_rank is not None:
            return len(self.node_of_rank)
        return int(self.rank_of_slot.max(initial=LOST)) + 1

    def slots_of(self, rank: int) -> slice:
        """The slots of one rank."""
        start, stop = np.searchsorted(self.rank_of_slot, [rank, rank + 1])
        return slice(int(start), int(stop))
